"""How long a forward pass takes, measured side by side with another one."""

import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import nn

from slimnets.generators import generators_kept

WARM_UP = 3
RUNS = (10, 200)


@dataclass(frozen=True)
class Spread:
    """The median of what was measured, and the first and third quartile around it."""

    median: float
    first: float
    third: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least two ``values``."""
        first, median, third = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, first, third)


def measure(
    *forwards: Callable[[], object], devices: Collection[torch.device], seconds: float = 1.0
) -> list[list[float]]:
    """Time each of ``forwards`` in turn, A B A B, so that what disturbs one disturbs all alike.

    Args:
        forwards: Each runs one forward pass.
        devices: Where they run; all are waited for.
        seconds: About how long the measurement may take for each; ten runs are made in any case,
            and 200 are enough.

    Returns:
        The times of each, in seconds, in the order in which they were measured.
    """
    for forward in forwards:
        for _ in range(WARM_UP):  # the first passes allocate, fill caches, compile
            forward()
    times: list[list[float]] = [[] for _ in forwards]
    least, most = RUNS
    end = _now(devices) + seconds * len(forwards)
    while len(times[0]) < least or (len(times[0]) < most and perf_counter() < end):
        for forward, own in zip(forwards, times, strict=True):
            start = _now(devices)
            forward()
            own.append(_now(devices) - start)
    return times


@contextmanager
def undisturbed(*networks: nn.Module) -> Iterator[None]:
    """Put ``networks`` in eval mode for a while, and their modes and the random states back."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    devices = {device_of(network) for network in networks} - {torch.device("cpu")}
    kind = next(iter(devices)).type if devices else "cuda"  # torch 2.6 takes no None
    with torch.random.fork_rng(devices, device_type=kind), generators_kept():
        try:
            for network in networks:
                network.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


def device_of(network: nn.Module) -> torch.device:
    """The device of the first parameter or buffer of ``network``, or the CPU."""
    for tensor in (*network.parameters(), *network.buffers()):
        return tensor.device
    return torch.device("cpu")


def _now(devices: Collection[torch.device]) -> float:
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    return perf_counter()
