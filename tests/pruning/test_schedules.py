import pytest

from slimnets.pruning.schedules import check_schedule, cubic, linear, one_shot


def test_cubic_is_equation_one_of_zhu_and_gupta():
    initial, final, begin, updates, every = 0.2, 0.9, 100, 10, 50
    for t in range(begin, begin + updates * every + 1, every):
        published = final + (initial - final) * (1 - (t - begin) / (updates * every)) ** 3
        ours = initial + (final - initial) * cubic((t - begin) / (updates * every))
        assert ours == pytest.approx(published)


@pytest.mark.parametrize("schedule", [cubic, linear, one_shot])
def test_schedules_grow_and_end_at_one(schedule):
    values = [schedule(i / 100) for i in range(101)]
    assert values == sorted(values)
    assert values[-1] == 1.0
    check_schedule(schedule)


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        ("cubic", TypeError, "schedule='cubic': expected a callable"),
        (lambda p: p / 2, ValueError, r"expected schedule\(1.0\) to be 1.0, got 0.5"),
        (lambda p: 2 * p, ValueError, r"expected schedule\(0.51\) to be a share .* got 1.02"),
        (lambda p: p - 1, ValueError, r"schedule\(0.0\) to be a share in \[0, 1\], got -1.0"),
        (lambda p: float("nan"), ValueError, r"schedule\(0.0\) to be a share"),
    ],
)
def test_what_is_no_schedule(schedule, error, message):
    with pytest.raises(error, match=message):
        check_schedule(schedule)
