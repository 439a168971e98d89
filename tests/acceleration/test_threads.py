"""Several threads compute what one does, however many there are from one call to the next."""

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

pytest.importorskip("numba", reason="the engine is compiled by numba")

from slimnets.acceleration.nodes import Recorder
from slimnets.acceleration.partition import annotate, cut
from slimnets.acceleration.region import Region, _Plan
from slimnets.acceleration.threads import together
from slimnets.acceleration.trace import trace


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def network() -> nn.Module:
    """Enough products for several threads, in many tiles and in few."""
    return nn.Sequential(
        nn.Conv2d(3, 40, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(40, 130, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Conv2d(130, 7, 3, padding=1),
        nn.Flatten(),
        nn.Linear(7 * 64, 33),
    ).eval()


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("batch", [1, 2, 3, 16, 37])
@torch.no_grad()
def test_any_number_of_threads_gives_the_same(batch: int, density: float) -> None:
    model, x = network(), torch.randn(batch, 3, 32, 32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(torch.rand_like(parameter) < density)
    graph = trace(model, 1)
    assert graph is not None
    Recorder(graph).run(x)
    cut(graph, annotate(graph))
    expected = model(x)
    for count in (1, 2, 3, 8, 2, 1):  # a run with more than the run before crashed once
        torch.set_num_threads(count)
        result = graph(x)
        assert (result - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_steps_are_timed_with_the_threads_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Plan, "profile", lambda *_: {"a": 1000.0, "b": 3000.0})  # in one thread
    model, x = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU()).eval(), torch.randn(2, 3, 32, 32)
    graph = trace(model, 1)
    assert graph is not None
    Recorder(graph).run(x)
    cut(graph, annotate(graph))
    (region,) = (module for module in graph.modules() if isinstance(module, Region))
    assert region.profile(x) == {"a": 1000.0, "b": 3000.0}
    torch.set_num_threads(2)
    seconds = region.profile(x)
    assert sum(seconds.values()) < 1000  # of a call, which takes milliseconds
    assert seconds["b"] == pytest.approx(3 * seconds["a"])


def test_an_error_in_another_thread_is_raised_here() -> None:
    def job(thread: int, threads: int) -> None:
        if thread == 1:
            raise MemoryError("no memory left")

    with pytest.raises(MemoryError, match="no memory left"):
        together(job, 2)
    found: list[int] = []
    together(lambda thread, threads: found.append(thread), 3)
    assert sorted(found) == [0, 1, 2]


def test_who_finds_the_others_busy_works_alone() -> None:
    started, done = threading.Event(), threading.Event()
    found: list[tuple[int, int]] = []

    def long(thread: int, threads: int) -> None:
        started.set()
        assert done.wait(60)

    first = threading.Thread(target=together, args=(long, 2))
    first.start()
    assert started.wait(60)
    together(lambda thread, threads: found.append((thread, threads)), 2)
    done.set()
    first.join()
    assert found == [(0, 1)]


def test_an_interruption_waits_for_the_others() -> None:
    """They hold addresses of memory that is freed when the exception leaves."""
    begun, ended, stopped = threading.Event(), threading.Event(), threading.Event()

    def job(thread: int, threads: int) -> None:
        if thread == 0:
            assert begun.wait(60)
            raise KeyboardInterrupt
        begun.set()
        assert stopped.wait(60)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        together(job, 2, stop=stopped.set)
    assert ended.is_set()
    found: list[int] = []
    together(lambda thread, threads: found.append(thread), 2)
    assert sorted(found) == [0, 1]


INTERRUPTED = """
import signal, sys, time
import torch
from torch import nn
from slimnets.acceleration.partition import annotate, cut
from slimnets.acceleration.nodes import Recorder
from slimnets.acceleration.trace import trace

torch.set_num_threads(2)
torch.set_grad_enabled(False)
network = nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
network[2].weight.mul_(torch.rand_like(network[2].weight) < 0.3)
batch = int(sys.argv[1])
graph = trace(network.eval(), 1)
x = torch.randn(batch, 16, 64, 64)
Recorder(graph).run(x)
cut(graph, annotate(graph))
graph(x)
signal.signal(signal.SIGALRM, signal.default_int_handler)
for delay in (0.001, 0.005, 0.02, 0.05):
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        while True:
            graph(torch.randn(batch, 16, 64, 64))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
expected = network(x)
assert (graph(x) - expected).abs().max() < 1e-4 * expected.abs().max()
"""


@pytest.mark.parametrize("batch", [1, 48])  # few samples share each layer, many are taken in turn
def test_a_process_survives_interruptions(batch: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(batch)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["interrupted"] * 4
