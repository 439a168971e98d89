"""Pictures of what the runs gave, with the paper's figures in them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import Results, effort, has_form, mean
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from runs import (
    BUDGETS,
    COMBINED,
    FACTORIZED_BY_THREE,
    FACTORIZED_BY_TWO,
    PRUNED_BY_THREE,
    PRUNED_BY_TWO,
    RANKS,
    REFERENCE,
    SMALL,
    SPARSITIES,
    STUDENTS,
    WAYS,
    Run,
    again,
    factorized,
    pruned,
)

Lines = dict[str, list[tuple[Any, float]]]

LABEL = "accuracy / that of the dense VGG-19"
BYTES = "bytes of the file"
LEAST = 0.6  # of the accuracy, in the picture of all runs
NEAR: dict[str, Any] = {"textcoords": "offset points", "xytext": (4, -10), "fontsize": 7}

PAPER_DENSE = 92.4  # per cent
PAPER_GRADUAL = {0.4: (92.22, 89.69), 0.75: (91.57, 89.13), 0.875: (88.82, 86.16)}
PAPER_STUDENTS = {
    "snn-1k": (76.96, 77.87),
    "snn-10k": (77.17, 79.19),
    "cnn-1k": (79.07, 81.23),
    "cnn-10k": (80.85, 82.23),
    "alexnet": (72.27, 80.78),
    "nin": (88.88, 90.57),
}
PAPER_POINTS = {  # bytes of the non-zero weights, and the accuracy relative to the dense network
    "dense": (78.4 * 2**20, 1.0),
    "pruned": (78.4 * 2**20 / 4, 91.57 / PAPER_DENSE),
    "low rank": (32.3 * 2**20, 93.27 / PAPER_DENSE),
    "distilled": (78.4 * 2**20 / 20.7, 90.57 / PAPER_DENSE),
    "distilled and pruned": (78.4 * 2**20 / 83, 88.69 / PAPER_DENSE),
}


def plot_bytes(results: Results, path: Path) -> int:
    """Accuracy relative to the dense network against bytes, for every run, and the paper's.

    Returns:
        How many runs are below the picture.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    shares = [results.relative(figures) for figures in results.found.values()]
    for form, marker in (("float32", "o"), ("int8", "s"), ("int6", "^")):
        points = [
            (mean(one["files"][form]["bytes"] for one in figures), results.relative(figures, form))
            for figures in results.found.values()
            if has_form(figures, form)
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), marker=marker, s=18, label=f"slimnets, {form}")
    axes.scatter(
        *zip(*PAPER_POINTS.values(), strict=True), marker="x", color="black", label="the paper"
    )
    for name, point in PAPER_POINTS.items():
        axes.annotate(name, point, **NEAR)
    if run := results.first(COMBINED):
        best = results.of(run)
        point = (best[0]["files"]["int6"]["bytes"], results.relative(best, "int6"))
        axes.annotate(run.network, point, **NEAR)
    axes.set(xlabel="bytes (the paper's: of the non-zero weights)")
    _in_bytes(axes, labels=(1,))
    axes.set(ylabel=LABEL, ylim=(LEAST, None))
    axes.margins(x=0.1)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=150)
    return sum(share < LEAST for share in shares)


def plot_lines(path: Path, label: str, lines: Lines, log: bool) -> None:
    """Accuracy relative to the dense network along ``lines`` of (x, accuracy)."""
    figure = Figure(figsize=(6, 4.8), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        if points:
            joined = len(points) > 1 and not isinstance(points[0][0], str)
            style = (
                ("x:" if joined else "x")
                if name.startswith("the paper")
                else "o-"
                if joined
                else "o"
            )
            axes.plot(*zip(*points, strict=True), style, label=name)
    axes.set(xlabel=label, ylabel=LABEL)
    if log:
        _in_bytes(axes, labels=(1, 2, 3, 5))  # a decade or two
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=150)


def _in_bytes(axes: Any, labels: Sequence[int]) -> None:
    """A logarithmic axis with these multiples of each power of ten written out."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=labels))
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def gradual_curves(network: Run) -> dict[str, list[tuple[Any, Run]]]:
    """Name of each curve to its shares of zeros, in per cent, and runs."""
    kinds: dict[str, dict[str, Any]] = {
        "gradual": {},
        "gradual, all weights together": {"scope": "global"},
        "gradual, all weights together, distilled": {"scope": "global", "distilled": True},
        "gradual, all weights together, LAMP": {"scope": "lamp"},
        "one-shot": {"gradual": False},
    }
    curves = {
        name: [(100 * s, pruned(s, of=network, **kind)) for s in SPARSITIES]
        for name, kind in kinds.items()
    }
    if network == REFERENCE:
        by_two, by_three = (
            [(100 * s, run) for s, run in by.items()] for by in (PRUNED_BY_TWO, PRUNED_BY_THREE)
        )
        curves["gradual, all weights together, distilled from two"] = by_two
        curves["gradual, all weights together, distilled from three"] = by_three
        curves["the same, trained on"] = [(s, again(run)) for s, run in by_three]
    return curves


def rank_curves(network: Run) -> dict[str, list[Run]]:
    """Name of each curve to its runs."""
    curves = {
        **{way: [factorized(rank, way, network) for rank in RANKS] for way in WAYS},
        **{
            f"{way}, budget": [factorized(None, way, network, budget=one) for one in BUDGETS]
            for way in WAYS
        },
    }
    if network != REFERENCE:
        return {**curves}
    once = again(FACTORIZED_BY_THREE)
    return {
        **curves,
        "spatial, the paper's ranks": [factorized("paper")],
        "spatial, the paper's ranks, distilled": [factorized("paper", distilled=True)],
        "spatial, the paper's ranks, distilled from two": [FACTORIZED_BY_TWO],
        "spatial, the paper's ranks, distilled from three": [FACTORIZED_BY_THREE],
        "the same, trained on": [once, again(once)],
    }


def plots(results: Results, folder: Path) -> dict[str, str]:
    """Write those that there are runs for, and give the caption of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    below = plot_bytes(results, folder / "bytes.png")
    captions = {
        "bytes.png": f"Accuracy against bytes, every run: {effort(results.found.values())}; "
        f"{below} runs below {LEAST:.0%} are not shown"
    }

    def point(x: Any, run: Run) -> list[tuple[Any, float]]:
        figures = results.of(run)
        return [(x, results.relative(figures))] if figures else []

    def size(run: Run) -> float:
        return mean([one["files"]["float32"]["bytes"] for one in results.of(run)] or [0])

    def draw(
        file: str, title: str, label: str, runs: dict[str, list[tuple[Any, Run]]], paper: Lines
    ) -> None:
        lines = {
            name: [one for pair in pairs for one in point(*pair)] for name, pairs in runs.items()
        }
        if any(lines.values()):
            plot_lines(folder / file, label, {**paper, **lines}, log=label == BYTES)
            found = [results.of(run) for pairs in runs.values() for _, run in pairs]
            captions[file] = f"{title}: {effort(found)}"

    for network in (REFERENCE, SMALL):
        is_paper = network == REFERENCE
        draw(
            f"gradual-{network.network}.png",
            f"Gradual against one-shot pruning of {network.network}",
            "zeros, %",
            gradual_curves(network),
            {
                f"the paper, {name}": [
                    (100 * s, both[i] / PAPER_DENSE) for s, both in PAPER_GRADUAL.items()
                ]
                for i, name in enumerate(("gradual", "one-shot"))
                if is_paper
            },
        )
        draw(
            f"low-rank-{network.network}.png",
            f"Low rank {network.network}",
            BYTES,
            {
                name: [(size(run), run) for run in runs]
                for name, runs in rank_curves(network).items()
            },
            {"the paper": [PAPER_POINTS["low rank"]]} if is_paper else {},
        )
    both = {"alone": False, "distilled": True}
    draw(
        "students.png",
        "Students, alone and distilled",
        "student",
        {
            name: [(student, Run(student, distilled=taught)) for student in STUDENTS]
            for name, taught in both.items()
        },
        {
            f"the paper, {name}": [
                (student, pair[i] / PAPER_DENSE) for student, pair in PAPER_STUDENTS.items()
            ]
            for i, name in enumerate(both)
        },
    )
    return captions
