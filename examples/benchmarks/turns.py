"""Times of what takes turns, A B A B, and how they compare."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Semaphore

import lightning as L

Seconds = Callable[[], float]


@dataclass
class Row:
    """One comparison: the time of ``what`` in times of that of ``against``."""

    what: str
    against: str
    ratio: float
    smallest: float
    largest: float
    seconds: float


def compare(against: str, calls: Mapping[str, Seconds], rounds: int) -> list[Row]:
    """The seconds of all others in times of those of the call ``against``, taken in turn."""
    for call in calls.values():
        call()
    times = [{name: call() for name, call in calls.items()} for _ in range(rounds)]
    return rows_of(against, {name: [one[name] for one in times] for name in calls})


def rows_of(against: str, seconds: Mapping[str, list[float]]) -> list[Row]:
    """The ratios of all others to ``against``."""
    rows = []
    for name, own in seconds.items():
        if name != against:
            ratios = [a / b for a, b in zip(own, seconds[against], strict=True)]
            figures = (statistics.median(ratios), min(ratios), max(ratios), statistics.median(own))
            rows.append(Row(name, against, *figures))
    return rows


def timed(call: Callable[[], object]) -> Seconds:
    """``call``, giving the seconds that it takes."""

    def seconds() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return seconds


class Turns(L.Callback):
    """Trains one step whenever it is its turn; the last callback, so that it times the others."""

    def __init__(self, mine: Semaphore, following: Semaphore) -> None:
        self.mine, self.following = mine, following
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        """Wait."""
        if not self.mine.acquire(timeout=600):
            raise TimeoutError("another training has failed")
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        """Let the next one go on."""
        self.seconds.append(time.perf_counter() - self.start)
        self.following.release()


def in_turn(fits: Sequence[Callable[[Turns], None]]) -> list[list[float]]:
    """The seconds of the steps of each training, when all train together, a step each in turn."""
    gates = [Semaphore(int(i == 0)) for i in range(len(fits))]
    turns = [Turns(*pair) for pair in zip(gates, [*gates[1:], gates[0]], strict=True)]
    with ThreadPoolExecutor(len(fits)) as pool:
        for done in [pool.submit(*one) for one in zip(fits, turns, strict=True)]:
            done.result()
    return [one.seconds for one in turns]
