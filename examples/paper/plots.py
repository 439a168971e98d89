"""Pictures of what the runs gave, with the paper's figures in them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from figures import Results, accuracies, mean
from matplotlib.figure import Figure
from runs import RANKS, REFERENCE, SMALL, SPARSITIES, STUDENTS, WAYS, Run, factorized, pruned

Lines = dict[str, list[tuple[Any, float]]]

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
    "pruned": (78.4 * 2**20 / 4, 91.57 / 92.4),
    "low rank": (32.3 * 2**20, 93.27 / 92.4),
    "distilled": (78.4 * 2**20 / 20.7, 90.57 / 92.4),
    "distilled and pruned": (78.4 * 2**20 / 83, 88.69 / 92.4),
}


def plot_bytes(results: Results, path: Path) -> None:
    """Accuracy relative to the dense network against bytes, for every run, and the paper's."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for form, marker in (("float32", "o"), ("int8", "s")):
        points = [
            (one["files"][form]["bytes"], one["files"][form]["accuracy"] / results.reference)
            for figures in results.found.values()
            for one in figures
        ]
        axes.scatter(*zip(*points, strict=True), marker=marker, s=18, label=f"slimnets, {form}")
    axes.scatter(
        *zip(*PAPER_POINTS.values(), strict=True), marker="x", color="black", label="the paper"
    )
    for name, point in PAPER_POINTS.items():
        axes.annotate(name, point, textcoords="offset points", xytext=(4, -10), fontsize=7)
    axes.set(xscale="log", xlabel="bytes (the paper's: of the non-zero weights)")
    axes.set(ylabel="accuracy, of the dense VGG-19's")
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_lines(path: Path, label: str, lines: Lines, log: bool) -> None:
    """Accuracy in per cent along ``lines`` of (x, accuracy)."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        if points:
            style = "x:" if name.startswith("the paper") else "o-"
            axes.plot(*zip(*points, strict=True), style, label=name)
    axes.set(xlabel=label, ylabel="test accuracy, %")
    if log:
        axes.set_xscale("log")
    axes.legend()
    figure.savefig(path, dpi=150)


def plots(results: Results, folder: Path) -> dict[str, str]:
    """Write those that there are runs for, and give what each file shows."""
    folder.mkdir(parents=True, exist_ok=True)
    plot_bytes(results, folder / "bytes.png")
    shown = {"bytes.png": "accuracy against bytes"}

    def points(pairs: Iterable[tuple[Any, Run]]) -> list[tuple[Any, float]]:
        found = [(x, results.of(run)) for x, run in pairs]
        return [(x, 100 * mean(accuracies(figures))) for x, figures in found if figures]

    def draw(file: str, title: str, label: str, lines: Lines, paper: Lines, log: bool) -> None:
        if any(lines.values()):
            plot_lines(folder / file, label, {**paper, **lines}, log)
            shown[file] = title

    paper: Lines = {
        "the paper, gradual": [(100 * s, both[0]) for s, both in PAPER_GRADUAL.items()],
        "the paper, one-shot": [(100 * s, both[1]) for s, both in PAPER_GRADUAL.items()],
    }
    for network in (REFERENCE, SMALL):
        lines = {
            name: points((100 * s, pruned(s, gradual, network)) for s in SPARSITIES)
            for name, gradual in (("gradual", True), ("one-shot", False))
        }
        title = f"{network.network}: gradual against one-shot"
        theirs = paper if network == REFERENCE else {}
        draw(f"gradual-{network.network}.png", title, "zeros, %", lines, theirs, log=False)

        lines = {}
        for way in WAYS:
            runs = [factorized(rank, way, network) for rank in RANKS]
            lines[way] = points(
                (mean(one["files"]["float32"]["bytes"] for one in results.of(run)), run)
                for run in runs
                if results.of(run)
            )
        title = f"{network.network}: low rank"
        draw(f"low-rank-{network.network}.png", title, "bytes of the file", lines, {}, log=True)

    kinds = {"alone": False, "distilled": True}
    lines = {
        name: points((student, Run(student, distilled=taught)) for student in STUDENTS)
        for name, taught in kinds.items()
    }
    paper = {
        f"the paper, {name}": [(student, both[i]) for student, both in PAPER_STUDENTS.items()]
        for i, name in enumerate(kinds)
    }
    draw("students.png", "students", "student", lines, paper, log=False)
    return shown
