from slimnets.acceleration.measure import fastest, shortest_times


def test_calls_are_measured_in_turn_and_twice_in_a_row():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("eager", "fast")}
    assert list(shortest_times(calls, seconds=0)) == ["eager", "fast"]
    assert order == ["eager", "fast", "eager", "eager", "fast", "fast"]


def test_the_first_stays_where_no_other_is_so_much_faster():
    assert fastest({"eager": 1.0, "fast": 0.9}, least_gain=1.05) == "fast"
    assert fastest({"eager": 1.0, "fast": 0.99}, least_gain=1.05) == "eager"
