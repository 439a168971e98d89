"""A part of a network that the engine computes, as a module."""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimnets.acceleration.build import Table, build
from slimnets.acceleration.engine import interpret
from slimnets.acceleration.measure import shortest_times
from slimnets.acceleration.steps import Shape, Step
from slimnets.acceleration.threads import together
from slimnets.acceleration.weights import aligned

ARENA_BYTES = 16 << 20
"""What the activations of all samples computed at once may take: most of a last-level cache."""

MOST_ARENA_BYTES = 64 << 20
"""What they may take at most where dense weights, which are read for every piece of a batch, do."""

MOST_SAMPLES = 256
SHAPES_KEPT = 8
FORGOTTEN = ("plans", "turned_away", "lock")
"""What a copy of a region does without."""

PROFILE_RUNS = 3
PROFILE_SECONDS = 0.2
EVERYBODY = 1 << 40
"""More arrivals at a barrier than a table has steps for."""

PRODUCTS_WORTH_A_THREAD = 1_000_000  # waking one takes a tenth of a millisecond or two


@dataclass(frozen=True)
class Port:
    """How a value enters or leaves: images keep their form, features are the last dimension."""

    value: int
    features: bool
    argument: int = 0  # its place among the arguments of the region

    def takes(self, value: Any) -> bool:
        """Whether ``value`` is a tensor of the type, device and rank that can enter here."""
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return False
        has_rank = value.dim() >= 2 if self.features else value.dim() == 4
        return has_rank and value.device.type == "cpu"


class _Plan:
    """Tables for one shape of input, one for each number of samples, and their arenas."""

    def __init__(
        self, steps: Sequence[Step], inputs: list[tuple[int, Shape]], outputs: list[int]
    ) -> None:
        self.arguments = (steps, inputs, outputs)
        self.inputs = [shape for _, shape in inputs]
        self.tables: dict[tuple[int, int], Table] = {}  # by samples and threads
        self.arenas: dict[tuple[int, int], list[tuple[Any, int]]] = {}  # and their addresses
        self.lock = threading.Lock()
        self.outputs, self.work = self.table(1).outputs, self.table(1).work
        sizes = [shape.size for shape in (*self.inputs, *self.outputs)]
        self.sample_bytes = 4 * np.array(sizes, np.int64)

    def table(self, samples: int, threads: int = 1) -> Table:
        key = samples, threads
        with self.lock:
            if key not in self.tables:
                self.tables[key] = build(*self.arguments, *key)
            return self.tables[key]

    def pieces(self, batch: int, threads: int = 1) -> list[tuple[int, int]]:
        """Cut the samples into (first, number): powers of two that fit a cache."""
        table = self.table(1)
        fitting = max(ARENA_BYTES, min(table.dense_bytes, MOST_ARENA_BYTES))
        most = min(MOST_SAMPLES, fitting // (4 * (table.arena + table.scratch)))
        if threads > 1:
            most = min(most, batch // threads)
        first, found = 0, []
        while first < batch:
            samples = 1 << (max(1, min(most, batch - first)).bit_length() - 1)
            found.append((first, samples))
            first += samples
        return found

    def profile(self, batch: int, io: Any) -> dict[str, float]:
        """Seconds that each step takes in one thread, by its name."""
        seconds: dict[str, float] = {}
        for first, samples in self.pieces(batch):
            table = self.table(samples)
            _memory, base = _zeros(table.arena + table.scratch)
            at = (base, base + 4 * table.arena, self._addresses(io, first), 0, 0, 1)
            best = [float("inf")] * len(table.ops)
            for _ in range(PROFILE_RUNS):
                for i in range(len(table.ops)):
                    start = perf_counter()
                    interpret(table.ops[i : i + 1], table.floats[i : i + 1], *at)
                    best[i] = min(best[i], perf_counter() - start)
            for owner, time in zip(table.owners, best, strict=True):
                seconds[owner] = seconds.get(owner, 0.0) + time
        return seconds

    def run(self, batch: int, io: Any, most_threads: int) -> None:
        """Compute all samples; threads share out the samples, or one sample's work if they must."""
        threads = max(1, min(most_threads, batch * self.work // PRODUCTS_WORTH_A_THREAD))
        if batch < threads or threads == 1:
            for first, samples in self.pieces(batch):
                self._piece(samples, self._addresses(io, first), threads)
            return
        pieces = self.pieces(batch, threads)
        for _, samples in pieces:
            self.table(samples)
        waiting = iter(pieces)  # the threads take from it in turn

        def share(thread: int, threads: int) -> None:
            for first, samples in waiting:
                self._piece(samples, self._addresses(io, first), 1)

        together(share, threads, stop=lambda: deque(waiting, maxlen=0))

    def _piece(self, samples: int, io: Any, threads: int) -> None:
        table = self.table(samples, threads)
        arenas = self.arenas.setdefault((samples, threads), [])
        try:  # not shared between Python threads; pop and append are atomic
            memory, base = arenas.pop()
        except IndexError:
            memory, base = _zeros(table.arena + threads * table.scratch)
        if threads == 1:
            interpret(table.ops, table.floats, base, base + 4 * table.arena, io, 0, 0, 1)
            arenas.append((memory, base))
            return
        barrier = np.zeros(16, np.int64)

        def job(thread: int, threads: int) -> None:
            scratch = base + 4 * (table.arena + thread * table.scratch)
            at = (base, scratch, io, int(barrier.ctypes.data), thread, threads)
            interpret(table.ops, table.floats, *at)

        together(job, threads, stop=lambda: barrier.fill(EVERYBODY))
        arenas.append((memory, base))

    def _addresses(self, io: Any, first: int) -> Any:
        return io + first * self.sample_bytes if first else io


Run = Callable[[_Plan, int, Any], None]
Sizes = tuple[tuple[int, ...], ...]


def _zeros(floats: int) -> tuple[Any, int]:
    """Memory that begins with a cache line, and its address."""
    memory = aligned(floats + 64)
    return memory, int(memory.ctypes.data)


class Region(nn.Module):
    """Computes ``steps`` with the engine; other shapes and types in PyTorch.

    Tables are kept for a few sizes of images. Where more take turns, a size that has not come twice
    among the last few new ones is computed in PyTorch.

    Args:
        steps: What to compute, in order.
        inputs: The values that the arguments of ``forward`` are.
        outputs: The values to return: a tensor if there is one, else a tuple.
        fallback: The same part of the network in PyTorch.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        inputs: Sequence[Port],
        outputs: Sequence[Port],
        fallback: nn.Module,
    ) -> None:
        super().__init__()
        self.steps, self.inputs, self.outputs = list(steps), list(inputs), list(outputs)
        self.fallback = fallback
        self._forget()

    def _forget(self) -> None:
        self.plans: OrderedDict[Sizes, _Plan | None] = OrderedDict()
        self.turned_away: deque[Sizes] = deque(maxlen=SHAPES_KEPT)
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in FORGOTTEN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def forward(self, *arguments: Any) -> Any:
        """The outputs for these tensors; numbers among them are for the fallback."""
        threads = torch.get_num_threads()
        return self._forward(arguments, lambda plan, batch, io: plan.run(batch, io, threads))

    def _forward(self, arguments: tuple[Any, ...], run: Run) -> Any:
        used = [arguments[port.argument] for port in self.inputs]
        plan, batch = self._plan(used)
        if plan is None or batch == 0:
            return self.fallback(*arguments)
        tensors = [t.contiguous().resolve_neg() for t in used]  # their memory is read as it is
        lead = tensors[0].shape[:-1] if self.inputs[0].features else tensors[0].shape[:1]
        results = []
        for port, shape in zip(self.outputs, plan.outputs, strict=True):
            tail = (shape.size,) if port.features else (shape.channels, shape.height, shape.width)
            # not the default type and device, which may have been changed since
            results.append(torch.empty(*lead, *tail, dtype=torch.float32, device="cpu"))
        run(plan, batch, np.array([t.data_ptr() for t in (*tensors, *results)], np.int64))
        return results[0] if len(results) == 1 else tuple(results)

    def profile(self, *arguments: Any) -> dict[str, float]:
        """Seconds that each step takes for these arguments; "" are the borders.

        Steps are measured in one thread. What several threads gain is shared out among them all.
        """
        seconds: dict[str, float] = {}

        def add(plan: _Plan, batch: int, io: Any) -> None:
            seconds.update(plan.profile(batch, io))

        self._forward(arguments, add)
        if torch.get_num_threads() > 1:
            whole = shortest_times({"": lambda: self(*arguments)}, PROFILE_SECONDS)[""]
            gain = whole / sum(seconds.values())
            seconds = {name: gain * time for name, time in seconds.items()}
        return seconds

    def _plan(self, tensors: Sequence[Any]) -> tuple[_Plan | None, int]:
        sizes, leads = [], set()
        for tensor, port in zip(tensors, self.inputs, strict=True):
            if not port.takes(tensor):
                return None, 0
            cut = -1 if port.features else 1
            sizes.append(tuple(tensor.shape[cut:]))
            leads.add(tuple(tensor.shape[:cut]))
        if len(leads) != 1 or any(0 in size for size in sizes):
            return None, 0
        return self._plan_for(tuple(sizes)), prod(leads.pop())

    def _plan_for(self, sizes: Sizes) -> _Plan | None:
        with self.lock:
            if sizes in self.plans:
                self.plans.move_to_end(sizes)
                return self.plans[sizes]
            if len(self.plans) == SHAPES_KEPT and sizes not in self.turned_away:
                self.turned_away.append(sizes)  # tables take longer than one batch in PyTorch
                return None
            inputs = [
                (port.value, Shape(size[0], *(size[1:] or (1, 1))))
                for port, size in zip(self.inputs, sizes, strict=True)
            ]
            try:
                plan = _Plan(self.steps, inputs, [p.value for p in self.outputs])
            except ValueError:
                plan = None
            if len(self.plans) == SHAPES_KEPT:
                self.plans.popitem(last=False)
            self.plans[sizes] = plan
            return plan
