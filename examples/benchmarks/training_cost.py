"""What pruning, factorizing and distilling cost in training, beside what a user would pick instead.

    python examples/benchmarks/training_cost.py

Every time is a ratio to another that was measured in turn, A B A B, in this process; the median,
and the smallest and largest. Steps are those of Lightning Trainers that take turns step by step, in
their second epoch. Peaks of memory are those of a process for each.
"""

import argparse
import copy
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peak_memory import BESIDE, memory
from rich.table import Table
from shared import keep, machine, show
from torch import nn
from torch.nn import functional as F
from turns import Row, Turns, compare, in_turn, rows_of, timed
from workload import (
    Work,
    full_svd,
    gradual,
    lightnings,
    prune_globally,
    quiet,
    sgd,
    torch_globally,
)

from slimnets.lowrank.decompose import as_matrix, factors
from slimnets.pruning.masks import lowest
from slimnets.pruning.pruner import Pruner
from slimnets.pruning.weights import target_sparsity


def steps(work: Work) -> list[Row]:
    """Of pruning and distilling."""

    def fit(*what: Callable[[], object]) -> Callable[[Turns], None]:
        return lambda turns: work.fit(*what, last=turns)  # type: ignore[arg-type]

    def compared(against: str, fits: dict[str, Callable[[Turns], None]]) -> list[Row]:
        second = [seconds[work.steps :] for seconds in in_turn(list(fits.values()))]  # epochs
        return rows_of(against, dict(zip(fits, second, strict=True)))

    plain, apart = "plain step", "student's step + teacher's forward"
    pruned = {
        plain: fit(work.plain),
        "step under GradualPrune": fit(work.plain, gradual),
        "step under Lightning's ModelPruning": fit(work.plain, lightnings),
    }
    distilled = {apart: fit(work.apart), "distillation step": fit(work.distilled)}
    return compared(plain, pruned) + compared(apart, distilled)


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


def factorizing(work: Work, rounds: int) -> list[Row]:
    """The paper's ranks against a full SVD of every layer."""
    pairs = work.convolutions()
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
    options = parser.parse_args(arguments)
    quiet(options.threads)
    width, batch, rounds = (1 / 8, 4, 1) if options.quick else (1, options.batch, options.rounds)
    work = Work(width, batch, rounds, options.threads)
    counts = [10**5, 2 * 10**5] if options.quick else [20 * 10**6, 100 * 10**6, 300 * 10**6]

    rows = [
        *steps(work),
        *masking(work),
        *updates(work, counts, min(rounds, 3)),
        *factorizing(work, min(rounds, 3)),
    ]
    names = list(BESIDE)[:1] if options.quick else list(BESIDE)
    peak = memory(Work(width, min(batch, 8), 2, options.threads), names)
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
