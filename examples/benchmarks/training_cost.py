"""What pruning, factorizing and distilling cost in training, beside what a user would pick instead.

    python examples/benchmarks/training_cost.py

Every time is a ratio to another that was measured in turn, A B A B, in this process; the median,
and the smallest and largest. Steps are those of Lightning Trainers that take turns step by step, in
their second epoch. Peaks of memory are those of a process for each.
"""

import argparse
import copy
import logging
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Semaphore
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelPruning
from rich.table import Table
from shared import PAPER_RANKS, keep, machine, random_vgg19, show
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, TensorDataset

import slimnets
from slimnets.lowrank.decompose import as_matrix, factors
from slimnets.pruning.masks import lowest
from slimnets.pruning.pruner import Pruner
from slimnets.pruning.weights import target_sparsity

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
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


class Plain(L.LightningModule):
    """A network trained by SGD, and maybe a teacher that is only asked."""

    def __init__(self, network: nn.Module, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network
        self.asked = [teacher] if teacher else []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The cross entropy."""
        images, labels = batch
        for teacher in self.asked:
            with torch.no_grad():
                teacher(images)
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return sgd(self.network.parameters())


def sgd(parameters: object) -> torch.optim.Optimizer:
    """With momentum, and too slow to get anywhere."""
    return torch.optim.SGD(parameters, lr=1e-5, momentum=0.9)  # type: ignore[arg-type]


def gradual() -> list[L.Callback]:
    """90 % zeros from the first step on."""
    return [slimnets.GradualPrune(0.9, begin=0, end=0, every=1)]


def lightnings() -> list[L.Callback]:
    """Lightning's callback; it prunes after the first epoch, by ``torch.nn.utils.prune``."""
    return [ModelPruning("l1_unstructured", amount=0.9, make_pruning_permanent=False)]


def nothing() -> list[L.Callback]:
    """No callback at all."""
    return []


@dataclass
class Work:
    """What is trained, and how much."""

    width: float
    batch: int
    steps: int
    threads: int

    def network(self) -> nn.Module:
        """VGG-19, the same each time."""
        torch.manual_seed(0)
        return random_vgg19(self.width)

    def plain(self) -> L.LightningModule:
        """The network alone."""
        return Plain(self.network())

    def apart(self) -> L.LightningModule:
        """The network, and a teacher that is only asked."""
        return Plain(self.network(), self.network().eval().requires_grad_(False))

    def distilled(self) -> L.LightningModule:
        """The network with a teacher."""
        return slimnets.DistillationModule(self.network(), self.network(), optimizer=sgd)

    def fit(
        self,
        module: Callable[[], L.LightningModule],
        callbacks: Callable[[], list[L.Callback]] = nothing,
        turns: Turns | None = None,
    ) -> None:
        """Train for two epochs."""
        torch.set_num_threads(self.threads)  # which counts for one Python thread only
        count = self.batch * self.steps
        data = TensorDataset(torch.randn(count, 3, 32, 32), torch.randint(10, (count,)))
        own = [*callbacks(), *([turns] if turns else [])]
        trainer = L.Trainer(max_epochs=2, callbacks=own, **QUIET)  # type: ignore[arg-type]
        trainer.fit(module(), DataLoader(data, self.batch))

    def in_turn(self, against: str, fits: Mapping[str, Callable[[Turns], None]]) -> list[Row]:
        """Compare the steps of the second epoch, those of all trainings in turn, A B A B."""
        gates = [Semaphore(int(i == 0)) for i in range(len(fits))]
        turns = [Turns(*pair) for pair in zip(gates, [*gates[1:], gates[0]], strict=True)]
        with ThreadPoolExecutor(len(fits)) as pool:
            for done in [pool.submit(*one) for one in zip(fits.values(), turns, strict=True)]:
                done.result()
        second = [one.seconds[self.steps :] for one in turns]
        return rows_of(against, dict(zip(fits, second, strict=True)))

    def ranks(self) -> list[int]:
        """The paper's, as far as the network is as wide."""
        return [max(1, round(rank * self.width)) for rank in PAPER_RANKS.values()]


def steps(work: Work) -> list[Row]:
    """Of pruning and distilling."""

    def fit(*what: Callable[[], object]) -> Callable[[Turns], None]:
        return lambda turns: work.fit(*what, turns=turns)  # type: ignore[arg-type]

    plain, apart = "plain step", "student's step + teacher's forward"
    pruned = {
        plain: fit(work.plain),
        "step under GradualPrune": fit(work.plain, gradual),
        "step under Lightning's ModelPruning": fit(work.plain, lightnings),
    }
    distilled = {apart: fit(work.apart), "distillation step": fit(work.distilled)}
    return work.in_turn(plain, pruned) + work.in_turn(apart, distilled)


def masking(work: Work) -> list[Row]:
    """What GradualPrune does in a step, in times of the rest of that very step.

    A step varies by far more than that from one to the next, and this does not.
    """
    torch.set_num_threads(work.threads)
    network = work.network()
    pruner = Pruner(*target_sparsity(network, 0.9))
    pruner.grow(pruner.targets)
    optimizer, images = sgd(network.parameters()), torch.randn(work.batch, 3, 32, 32)
    labels = torch.randint(10, (work.batch,))

    def forward_and_backward() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()

    parts: list[Callable[[], object]] = [
        forward_and_backward,
        pruner.mask_gradients,
        optimizer.step,
        partial(pruner.apply, pruner.parameters),
    ]
    times = [[timed(part)() for part in parts] for _ in range(work.steps + 1)][1:]
    seconds = {
        "the rest of the step": [one[0] + one[2] for one in times],
        "masks of GradualPrune": [one[1] + one[3] for one in times],
    }
    return rows_of("the rest of the step", seconds)


def prune_globally(network: nn.Module) -> None:
    """90 % of all weights, by slimnets."""
    slimnets.prune(network, 0.9, scope="global")


def torch_globally(network: nn.Module) -> None:
    """90 % of all weights, by torch."""
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    torch_prune.global_unstructured(
        [(layer, "weight") for layer in layers], torch_prune.L1Unstructured, amount=0.9
    )


def updates(work: Work, sizes: list[int], rounds: int) -> list[Row]:
    """A mask update against torch's; and one of more weights against one of the fewest."""
    network, theirs = work.network(), "prune.global_unstructured"

    def of_a_copy(update: Callable[[nn.Module], None]) -> float:
        copied = copy.deepcopy(network)
        return timed(partial(update, copied))()

    calls = {
        theirs: partial(of_a_copy, torch_globally),
        "mask update, global": partial(of_a_copy, prune_globally),
    }
    rows = compare(theirs, calls, rounds)
    selections = {
        f"selection among {size / 1e6:g} M weights": timed(
            partial(lowest, [torch.randn(size)], int(0.9 * size))
        )
        for size in sizes
    }
    return rows + compare(next(iter(selections)), selections, rounds)


def full_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """What factorizing is measured against."""
    u, s, vh = torch.linalg.svd(as_matrix(weight), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def convolutions(network: nn.Module) -> list[Tensor]:
    """The weights of all convolutions."""
    return [m.weight.detach() for m in network.modules() if isinstance(m, nn.Conv2d)]


def factorizing(work: Work, rounds: int) -> list[Row]:
    """The paper's ranks against a full SVD of every layer."""
    pairs = list(zip(convolutions(work.network()), work.ranks(), strict=True))
    for weight, rank in pairs:
        (first, second), (left, right) = factors(weight, rank), full_svd(weight, rank)
        own = (weight - torch.einsum("nk...,kc...->nc...", second, first)).norm()
        best = (as_matrix(weight) - left @ right).norm()
        if own > 1.01 * best:
            raise SystemExit(f"error {own:.4g}, that of the full SVD {best:.4g}")
    calls = {
        "full SVD per layer": timed(lambda: [full_svd(*pair) for pair in pairs]),
        "factorize, the paper's ranks": timed(lambda: [factors(*pair) for pair in pairs]),
    }
    return compare("full SVD per layer", calls, rounds)


def peaks(work: Work) -> dict[str, Callable[[], object]]:
    """What is run in a process of its own; of each pair the second is beside the first."""
    return {
        "plain training": lambda: work.fit(work.plain),
        "GradualPrune": lambda: work.fit(work.plain, gradual),
        "ModelPruning": lambda: work.fit(work.plain, lightnings),
        "student and teacher apart": lambda: work.fit(work.apart),
        "DistillationModule": lambda: work.fit(work.distilled),
        "no mask update": lambda: work.network(),
        "mask update, global": lambda: prune_globally(work.network()),
        "prune.global_unstructured": lambda: torch_globally(work.network()),
        "factorize": lambda: [
            factors(*pair) for pair in zip(convolutions(work.network()), work.ranks(), strict=True)
        ],
        "full SVD per layer": lambda: [
            full_svd(*pair) for pair in zip(convolutions(work.network()), work.ranks(), strict=True)
        ],
    }


def peak_bytes() -> int:
    """The most memory that this process has had resident."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts the parent's peak in what getrusage says of a new process
        (line,) = (one for one in status.read_text().splitlines() if one.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


BESIDE = {
    "GradualPrune": "plain training",
    "ModelPruning": "plain training",
    "DistillationModule": "student and teacher apart",
    "mask update, global": "no mask update",
    "prune.global_unstructured": "no mask update",
    "factorize": "no mask update",
    "full SVD per layer": "no mask update",
}


def memory(work: Work, names: list[str], arguments: list[str]) -> dict[str, float]:
    """Bytes of peak memory per prunable weight, beyond that of what each stands beside."""
    weights = sum(p.numel() for p in work.network().parameters() if p.dim() > 1)
    found = {}
    for name in dict.fromkeys([*names, *(BESIDE[name] for name in names)]):
        command = [sys.executable, __file__, *arguments, "--peak", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = int(done.stdout.split()[-1])
    return {name: (found[name] - found[BESIDE[name]]) / weights for name in names}


def tables(figures: dict[str, Any]) -> tuple[Table, Table]:
    """Times, and peaks of memory."""
    on = ", ".join(f"{name} {number}" for name, number in figures["machine"].items())
    times = Table("", "in times of", "ratio", "smallest to largest", "seconds")
    times.title = f"VGG-19, batch {figures['batch']}; {figures['threads']} thread(s); {on}"
    for row in figures["rows"]:
        spread = f"{row['smallest']:.3f} to {row['largest']:.3f}"
        numbers = (f"{row['ratio']:.3f}", spread, f"{row['seconds']:.3f}")
        times.add_row(row["what"], row["against"], *numbers)
    sizes = Table("", "beyond", "bytes per prunable weight", title="peak memory")
    for name, share in figures["peak_bytes_per_weight"].items():
        sizes.add_row(name, BESIDE[name], f"{share:+.2f}")
    return times, sizes


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--out", type=Path, help="folder for training_cost.json and training_cost.md"
    )
    parser.add_argument("--quick", action="store_true", help="a narrow network, each time once")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    width, batch, rounds = (1 / 8, 4, 1) if options.quick else (1, options.batch, options.rounds)
    work = Work(width, batch, 2 if options.peak else rounds, options.threads)
    counts = [10**5, 2 * 10**5] if options.quick else [20 * 10**6, 100 * 10**6, 300 * 10**6]
    if options.peak:
        peaks(work)[options.peak]()
        print(peak_bytes())
        return

    rows = [
        *steps(work),
        *masking(work),
        *updates(work, counts, min(rounds, 3)),
        *factorizing(work, min(rounds, 3)),
    ]
    small = ["--quick"] if options.quick else ["--batch", "8"]
    names = list(BESIDE)[:1] if options.quick else list(BESIDE)
    peak = memory(work, names, [*small, "--threads", str(options.threads)])
    figures = {
        "threads": options.threads,
        "batch": work.batch,
        "machine": machine("lightning"),
        "rows": [asdict(row) for row in rows],
        "peak_bytes_per_weight": peak,
    }
    times, sizes = tables(figures)
    times.caption = f"median of {rounds} rounds in turn, of three of updates and factorizing"
    for one in (times, sizes):
        show(one)
    if options.out:
        keep(options.out, "training_cost", figures, times, sizes)


if __name__ == "__main__":
    main()
