"""Tables and plots of what ``reproduce.py`` has trained.

    python examples/paper/results.py --folder paper --out docs

writes ``results.md``, its plots and the figures that they were made of. What has not been trained
is left out.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from runs import DENSE, REFERENCE, SPARSITIES, STUDENTS, TABLES, Run, factorized, pruned

Figures = list[dict[str, Any]]  # of one run, one for each seed
Cell = Callable[[Figures], str]

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


class Results:
    """The figures of all runs, by run."""

    def __init__(self, folder: Path) -> None:
        self.found: dict[str, Figures] = {}
        for path in sorted(folder.glob("*-seed*.json")):
            figures = json.loads(path.read_text())
            self.found.setdefault(figures["run"], []).append(figures)

    def of(self, run: Run) -> Figures:
        """Of every seed."""
        return self.found.get(run.name, [])

    def table(self, runs: Iterable[Run], columns: dict[str, Cell]) -> str:
        """One row for each run that there is, one column for each of ``columns``."""
        lines = ["| run | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for run in dict.fromkeys(runs):
            if figures := self.of(run):
                cells = " | ".join(cell(figures) for cell in columns.values())
                lines.append(f"| {run.name} | {cells} |")
        return "\n".join(lines) if len(lines) > 2 else ""

    def relative(self, figures: Figures, form: str = "float32") -> str:
        """Accuracy as a share of the dense network's that was trained for as long."""
        dense = self.of(DENSE) or self.of(REFERENCE)
        base = mean(accuracies(dense)) if dense else 0
        return f"{mean(accuracies(figures, form)) / base:.1%}" if base else ""


def accuracies(figures: Figures, form: str = "float32") -> list[float]:
    """One for each seed, in [0, 1]."""
    return [one["files"][form]["accuracy"] for one in figures]


mean = statistics.fmean


def accuracy(form: str = "float32") -> Cell:
    """Mean and standard deviation over seeds, in per cent."""

    def cell(figures: Figures) -> str:
        values = [100 * value for value in accuracies(figures, form)]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{mean(values):.2f}{spread}"

    return cell


def smaller(form: str) -> Cell:
    """Bytes of the file, and times fewer than those of the dense network."""

    def cell(figures: Figures) -> str:
        own = mean(one["files"][form]["bytes"] for one in figures)
        return f"{own:,.0f} ({figures[0]['dense_bytes'] / own:.0f}x)"

    return cell


def count(key: str) -> Cell:
    """A number that all seeds share, nearly."""
    return lambda figures: f"{figures[0][key]:,}"


def faster(batch: int) -> Cell:
    """Times as fast as the dense network."""

    def cell(figures: Figures) -> str:
        ratios = [one["speed"][str(batch)] for one in figures if one["speed"]]
        return f"{statistics.median(ratios):.1f}" if ratios else ""

    return cell


def trained_for(figures: Figures) -> str:
    """Epochs and seeds."""
    return f"{figures[0]['epochs']}, {len(figures)}"


def page(results: Results, command: str) -> str:
    """The whole page."""
    basic = {"accuracy, %": accuracy(), "of dense": results.relative, "epochs, seeds": trained_for}
    sizes = {"bytes": smaller("float32"), "bytes, int8": smaller("int8")}
    int8 = {
        "accuracy, int8, %": accuracy("int8"),
        "of dense, int8": lambda figures: results.relative(figures, "int8"),
    }
    speeds = {"speed, batch 1": faster(1), "speed, batch 64": faster(64)}
    work = {"non-zeros": count("nonzeros"), "effective MACs": count("effective_macs")}
    sections = {
        "Gradual against one-shot pruning": (TABLES["gradual"], {**basic, **sizes}),
        "Low rank": (TABLES["low-rank"], {**basic, **sizes, **speeds}),
        "Students, alone and distilled": (TABLES["students"], basic),
        "The methods compared": (TABLES["methods"], {**basic, **sizes, **work, **speeds}),
        "All at once, from random weights": (
            TABLES["stacked"],
            {**basic, **int8, **sizes, **speeds},
        ),
    }
    for network in ("residual", "vgg19", "nin", "narrow"):
        runs = [run.of for run in TABLES[f"combined-{network}"] if run.of]
        columns = {**basic, **int8, **sizes, **speeds}
        sections[f"Combined: {runs[0].network}"] = (
            [*runs, *TABLES[f"combined-{network}"]],
            columns,
        )
    parts = [HEAD.format(command=command)]
    for title, (runs, columns) in sections.items():
        if table := results.table([REFERENCE, *runs], columns):
            parts += [f"## {title}", table]
    return "\n\n".join([*parts, "## Pictures", *PICTURES]) + "\n"


HEAD = """# The paper's tables, trained with slimnets

Trained by

    {command}

and written by `python examples/paper/results.py`. CIFAR-10, accuracy on the 10,000 test images
after the last epoch, mean ± standard deviation over seeds; no hyper-parameter was chosen on them.
`epochs` are all that the weights have seen, those of the network that they begin with included.
Bytes are those of the one file of `slimnets.save`, as multiples of the dense `torch.save` file;
speed is that of `slimnets.accelerate` in times of the dense network in eager PyTorch, one thread,
measured in turn."""

PICTURES = (
    "![accuracy against bytes](results/bytes.png)",
    "![gradual against one-shot](results/gradual.png)",
    "![low rank](results/low-rank.png)",
    "![students](results/students.png)",
)


def plot_bytes(results: Results, path: Path) -> None:
    """Accuracy relative to the dense network against bytes, for every run, and the paper's."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    dense = results.of(DENSE) or results.of(REFERENCE)
    base = mean(accuracies(dense))
    for form, marker in (("float32", "o"), ("int8", "s")):
        points = [
            (one["files"][form]["bytes"], one["files"][form]["accuracy"] / base)
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


def plot_lines(
    path: Path, label: str, lines: dict[str, list[tuple[Any, float]]], log: bool = False
) -> None:
    """Accuracy in per cent along ``lines`` of (x, accuracy)."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        if points:
            style = "x:" if name.startswith("the paper") else "o-"
            axes.plot(*zip(*points, strict=True), style, label=name)
    axes.set(xlabel=label, ylabel="test accuracy, %", xscale="log" if log else axes.get_xscale())
    axes.legend()
    figure.savefig(path, dpi=150)


def plots(results: Results, folder: Path) -> None:
    """All of them."""
    folder.mkdir(parents=True, exist_ok=True)
    plot_bytes(results, folder / "bytes.png")

    def points(pairs: Iterable[tuple[Any, Run]]) -> list[tuple[Any, float]]:
        found = [(x, results.of(run)) for x, run in pairs]
        return [(x, 100 * mean(accuracies(figures))) for x, figures in found if figures]

    ways = {"gradual": True, "one-shot": False}
    lines = {
        name: points((100 * s, pruned(s, gradual)) for s in SPARSITIES)
        for name, gradual in ways.items()
    }
    for i, name in enumerate(ways):
        lines[f"the paper, {name}"] = [(100 * s, both[i]) for s, both in PAPER_GRADUAL.items()]
    plot_lines(folder / "gradual.png", "zeros, %", lines)

    lines = {}
    for scheme in ("spatial", "channel"):
        runs = [factorized(r, scheme) for r in (0.1, 0.2, 0.4)]  # type: ignore[arg-type]
        lines[scheme] = points(
            (mean(one["files"]["float32"]["bytes"] for one in results.of(run)), run)
            for run in runs
            if results.of(run)
        )
    plot_lines(folder / "low-rank.png", "bytes of the file", lines, log=True)

    lines = {
        name: points((student, Run(student, distilled=taught)) for student in STUDENTS)
        for name, taught in (("alone", False), ("distilled", True))
    }
    for i, name in enumerate(("alone", "distilled")):
        lines[f"the paper, {name}"] = [(s, both[i]) for s, both in PAPER_STUDENTS.items()]
    plot_lines(folder / "students.png", "student", lines)


def main(arguments: list[str] | None = None) -> None:
    """Read what there is, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("paper"), help="of reproduce.py")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--command", default="python examples/paper/reproduce.py all")
    options = parser.parse_args(arguments)
    results = Results(options.folder)
    if not results.found:
        raise SystemExit(f"--folder {options.folder}: no figures there; run reproduce.py first")
    plots(results, options.out / "results")
    everything = json.dumps(list(results.found.values()), indent=1)
    (options.out / "results" / "figures.json").write_text(everything + "\n")
    (options.out / "results.md").write_text(page(results, options.command))
    print(options.out / "results.md")


if __name__ == "__main__":
    main()
