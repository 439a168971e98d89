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

from figures import Figures, Results, accuracies, mean
from plots import plots
from runs import (
    HEADLINE,
    REFERENCE,
    SMALL,
    STUDENTS,
    TABLES,
    Run,
    factorized,
    pruned,
)

Cell = Callable[[Figures], str]


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
        return f"{own:,.0f} ({figures[0]['dense_bytes'] / own:.3g}x)"

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


def table(results: Results, runs: Iterable[Run], columns: dict[str, Cell]) -> str:
    """One row for the reference and each run that there is; "" if there is none."""
    lines = ["| run | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for run in dict.fromkeys([REFERENCE, *runs]):
        if figures := results.of(run):
            cells = " | ".join(cell(figures) for cell in columns.values())
            lines.append(f"| {run.name} | {cells} |")
    return "\n".join(lines) if len(lines) > 3 else ""


def trained_for(figures: Figures) -> str:
    """Epochs and seeds."""
    return f"{figures[0]['epochs']:g}, {len(figures)}"


def against_dense(results: Results, run: Run) -> str:
    """How many points the run is above the dense network that was trained for as long."""
    found = results.of(run)
    if not found or not results.dense:
        return "not trained"
    return f"{100 * (mean(accuracies(found)) - mean(accuracies(results.dense))):+.2f} points"


def distilled_gain(results: Results) -> str:
    """For every student, how many points distillation brings, and the spread over seeds."""
    parts = []
    for name in STUDENTS:
        alone, taught = (results.of(Run(name, distilled=d)) for d in (False, True))
        if alone and taught:
            gain = 100 * (mean(accuracies(taught)) - mean(accuracies(alone)))
            spread = [
                100 * statistics.stdev(accuracies(one)) for one in (alone, taught) if len(one) > 1
            ]
            parts.append(f"{name} {gain:+.2f}" + (f" (± {max(spread):.2f})" if spread else ""))
    missing = len(STUDENTS) - len(parts)
    return ", ".join([*parts, *([f"{missing} not trained"] if missing else [])])


def all_of(results: Results, run: Run, form: str) -> str:
    """Bytes, accuracy and speed of a combined run."""
    figures = results.of(run)
    if not figures:
        return "not trained"
    bytes_ = mean(one["files"][form]["bytes"] for one in figures)
    return (
        f"{run.name}, {form}: {figures[0]['dense_bytes'] / bytes_:.0f} times, "
        f"{results.relative(figures, form)}, {faster(1)(figures)} and {faster(64)(figures)} times"
    )


def targets(results: Results) -> str:
    """What was to be reached, and what was."""
    paper_ranks = results.of(factorized("paper"))
    low_rank = "not trained"
    if paper_ranks:
        share = paper_ranks[0]["files"]["float32"]["bytes"] / paper_ranks[0]["dense_bytes"]
        low_rank = f"{share:.0%}, {against_dense(results, factorized('paper'))}, "
        low_rank += f"{faster(64)(paper_ranks)} times"
    rows = {
        "gradual, 75 %: no loss": against_dense(results, pruned(0.75)),
        "gradual, 87.5 %: -0.3 points or better": against_dense(results, pruned(0.875)),
        "gradual, 95 %: -0.5 points or better": against_dense(results, pruned(0.95)),
        "the paper's ranks: at most 41 % of the bytes, no loss, 1.8 times as fast": low_rank,
        "distilled against alone, points: above 0 for all six": distilled_gain(results),
        "combined: 200 times fewer bytes, 98 % of the accuracy, 5 times as fast at batch 1; then "
        "500 times, 99 %, 20 times, and 10 times at batch 64": all_of(results, HEADLINE, "int8"),
    }
    lines = ["| to reach | here |", "|---|---|"]
    return "\n".join([*lines, *(f"| {wanted} | {found} |" for wanted, found in rows.items())])


def page(results: Results, pictures: dict[str, str], command: str, data: str) -> str:
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
        "Gradual against one-shot pruning, a small network": (
            [SMALL, *TABLES["gradual-cnn"]],
            {**basic, **sizes},
        ),
        "Low rank": (TABLES["low-rank"], {**basic, **sizes, **speeds}),
        "Low rank, a small network": (
            [SMALL, *TABLES["low-rank-cnn"]],
            {**basic, **sizes, **speeds},
        ),
        "Students, alone and distilled": (TABLES["students"], basic),
        "The methods compared": (TABLES["methods"], {**basic, **sizes, **work, **speeds}),
        "All at once, from random weights": (
            TABLES["stacked"],
            {**basic, **int8, **sizes, **speeds},
        ),
    }
    for network in ("residual", "vgg19", "nin", "narrow", "cnn"):
        runs = [run.of for run in TABLES[f"combined-{network}"] if run.of]
        columns = {**basic, **int8, **sizes, **speeds}
        sections[f"Combined: {runs[0].network}"] = (
            [*runs, *TABLES[f"combined-{network}"]],
            columns,
        )
    parts = [
        HEAD.format(command=command, data=data),
        "## Where the targets stand",
        targets(results),
    ]
    for title, (runs, columns) in sections.items():
        if rows := table(results, runs, columns):
            parts += [f"## {title}", rows]
    shown = [f"![{name}](results/{file})" for file, name in pictures.items()]
    return "\n\n".join([*parts, "## Pictures", *shown]) + "\n"


HEAD = """# The paper's tables, trained with slimnets

Trained by

    {command}

and written by `python examples/paper/results.py`. {data}, accuracy on the 10,000 test images
after the last epoch, mean ± standard deviation over seeds; no hyper-parameter was chosen on them.
What has not been trained is left out.
`epochs` are all that the weights have seen, those of the network that they begin with included.
Bytes are those of the one file of `slimnets.save`, as multiples of the dense `torch.save` file;
speed is that of `slimnets.accelerate` in times of the dense network in eager PyTorch, one thread,
measured in turn."""


def main(arguments: list[str] | None = None) -> None:
    """Read what there is, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("paper"), help="of reproduce.py")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--data", default="CIFAR-10", help="what the images are")
    parser.add_argument("--command", default="python examples/paper/reproduce.py all")
    options = parser.parse_args(arguments)
    results = Results(options.folder)
    if not results.found:
        raise SystemExit(f"--folder {options.folder}: no figures there; run reproduce.py first")
    pictures = plots(results, options.out / "results")
    everything = json.dumps(list(results.found.values()), indent=1)
    (options.out / "results" / "figures.json").write_text(everything + "\n")
    (options.out / "results.md").write_text(page(results, pictures, options.command, options.data))
    print(options.out / "results.md")


if __name__ == "__main__":
    main()
