"""How long calls take, measured in turn so that a slow moment hits all of them."""

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

ROUNDS = 7
SECONDS = 1.5

IN_A_ROW = 2
"""Calls at a time: threads of another library spin on for a while, and hold up the first."""


def shortest_times(
    calls: Mapping[str, Callable[[], Any]], seconds: float = SECONDS
) -> dict[str, float]:
    """The shortest time of each call, in seconds; every call runs at least twice."""
    best = {}
    for name, call in calls.items():
        call()
        best[name] = float("inf")
    begin = perf_counter()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            for _ in range(IN_A_ROW):
                start = perf_counter()
                call()
                best[name] = min(best[name], perf_counter() - start)
        if perf_counter() - begin > seconds:
            break
    return best


def fastest(times: Mapping[str, float], least_gain: float) -> str:
    """The shortest call; the first, where no other is ``least_gain`` times as fast as that."""
    first, best = next(iter(times)), min(times, key=times.__getitem__)
    return best if times[best] * least_gain <= times[first] else first
