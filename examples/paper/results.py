"""Tables and plots of what ``reproduce.py`` has trained.

    python examples/paper/results.py --folder paper --out docs

writes ``results.md``, its plots and the figures that they were made of. What has not been trained
is left out.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import fields
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
from settings import Settings

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
        times = figures[0]["dense_bytes"] / own
        return f"{own:,.0f} ({f'{times:.3g}' if times < 1000 else f'{times:,.0f}'}x)"

    return cell


def count(key: str) -> Cell:
    """A number that all seeds share, nearly."""
    return lambda figures: f"{figures[0][key]:,}"


def speed(figures: Figures, batch: int) -> float:
    """Times as fast as the dense network; nan where it was not timed."""
    return statistics.median(one.get("speed", {}).get(str(batch), math.nan) for one in figures)


def faster(batch: int) -> Cell:
    """Times as fast as the dense network."""

    def cell(figures: Figures) -> str:
        ratio = speed(figures, batch)
        return "" if math.isnan(ratio) else f"{ratio:.1f}"

    return cell


def table(results: Results, runs: Iterable[Run], columns: dict[str, Cell]) -> str:
    """One row for the reference and each run that there is; "" if no method was applied in any."""
    runs = list(runs)
    if not any(results.of(run) for run in runs if run.sparsity or run.rank or run.distilled):
        return ""
    lines = ["| run | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for run in dict.fromkeys([REFERENCE, *runs]):
        if figures := results.of(run):
            cells = " | ".join(cell(figures) for cell in columns.values())
            lines.append(f"| {run.name} | {cells} |")
    return "\n".join(lines)


def trained_for(figures: Figures) -> str:
    """Epochs and seeds."""
    epochs = sorted({f"{one['epochs']:g}" for one in figures})
    return f"{' and '.join(epochs)}, {len(figures)}"


TARGETS: list[tuple[str, Run, str, dict[str, float]]] = [
    ("gradual, 75 %", pruned(0.75), "float32", {"points": 0}),
    ("gradual, 87.5 %", pruned(0.875), "float32", {"points": -0.3}),
    ("gradual, 95 %", pruned(0.95), "float32", {"points": -0.5}),
    (
        "low rank, the paper's ranks",
        factorized("paper"),
        "float32",
        {"points": 0, "times fewer bytes": 1 / 0.41, "times as fast at batch 64": 1.8},
    ),
    (
        "combined, first step",
        HEADLINE,
        "int8",
        {"times fewer bytes": 200, "% of the accuracy": 98, "times as fast at batch 1": 5},
    ),
    (
        "combined, the goal",
        HEADLINE,
        "int8",
        {
            "times fewer bytes": 500,
            "% of the accuracy": 99,
            "times as fast at batch 1": 20,
            "times as fast at batch 64": 10,
        },
    ),
]
"""What was to be reached at least, by which run, in which form."""


def measures(results: Results, figures: Figures, form: str) -> dict[str, float]:
    """What targets are about, relative to the dense network."""
    own = mean(accuracies(figures, form))
    bytes_ = mean(one["files"][form]["bytes"] for one in figures)
    return {
        "points": 100 * (own - results.reference),
        "% of the accuracy": 100 * own / results.reference,
        "times fewer bytes": figures[0]["dense_bytes"] / bytes_,
        **{f"times as fast at batch {batch}": speed(figures, batch) for batch in (1, 64)},
    }


def targets(results: Results) -> str:
    """What was to be reached, what was, and how much is missing."""
    lines = ["| | to reach | here | epochs, seeds | missing |", "|---|---|---|---|---|"]

    def add(*cells: str) -> None:
        lines.append(f"| {' | '.join(cells)} |")

    def spelled(values: dict[str, float]) -> str:
        return ", ".join(
            "not timed" if math.isnan(value) else f"{value:.3g} {name}"
            for name, value in values.items()
        )

    for title, run, form, wanted in TARGETS:
        figures = results.of(run)
        if not figures:
            add(title, spelled(wanted), "not trained", "", "all")
            continue
        found = measures(results, figures, form)
        missing = {
            name: least - found[name] for name, least in wanted.items() if not found[name] >= least
        }
        here = spelled({name: found[name] for name in wanted})
        add(
            f"{title}: {run.name}, {form}",
            spelled(wanted),
            here,
            trained_for(figures),
            spelled(missing) or "nothing",
        )
    for name in STUDENTS:
        alone, taught = (results.of(Run(name, distilled=d)) for d in (False, True))
        wanted_gain = "above 0 points, beyond the spread over seeds"
        if not (alone and taught):
            add(f"{name}, distilled against alone", wanted_gain, "not trained", "", "all")
            continue
        gain = 100 * (mean(accuracies(taught)) - mean(accuracies(alone)))
        enough = min(len(alone), len(taught)) > 1
        both = (alone, taught) if enough else ()
        spread = max((100 * statistics.stdev(accuracies(one)) for one in both), default=0.0)
        add(
            f"{name}, distilled against alone",
            wanted_gain,
            f"{gain:+.2f} points" + (f", spread {spread:.2f}" if enough else ""),
            trained_for(taught),
            ("nothing" if gain > spread else "it") if enough else "more seeds",
        )
    return "\n".join(lines)


def commands(results: Results) -> str:
    """What trains all that is shown, in order: runs that others go on with come first."""
    groups: dict[str, list[Figures]] = {}
    for figures in results.found.values():
        if figures[0]["run"] != REFERENCE.name:
            seeds = max(one["seed"] for one in figures) + 1
            options = {**figures[0]["settings"], "seeds": seeds}
            options["epochs"] = f"{options['epochs']:g}"
            groups.setdefault(json.dumps(options, sort_keys=True), []).append(figures)
    lines = []
    for options, runs in groups.items():
        names = [figures[0]["run"] for figures in runs]
        defaults = {one.name: one.default for one in fields(Settings)}
        given = [
            f"--{key.replace('_', '-')} {value}"
            for key, value in json.loads(options).items()
            if value != defaults.get(key)
        ]
        line = ["python examples/paper/reproduce.py all --only", *names, *given]
        lines.append((any("-then-" in name for name in names), " ".join(line)))
    return "\n".join(f"    {line}" for _, line in sorted(lines))


def page(results: Results, pictures: dict[str, str], data: str) -> str:
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
        HEAD.format(commands=commands(results), data=data, measured_on=measured_on(results)),
        "## Where the targets stand",
        targets(results),
    ]
    for title, (runs, columns) in sections.items():
        if rows := table(results, runs, columns):
            parts += [f"## {title}", rows]
    shown = [f"![{name}](results/{file})" for file, name in pictures.items()]
    return "\n\n".join([*parts, "## Pictures", *shown]) + "\n"


HEAD = """# The paper's tables, trained with slimnets

Written by `python examples/paper/results.py` from what these trained, with `--data-dir`:

{commands}

{data}. Accuracy on {measured_on} after the last epoch, mean ± standard deviation over seeds.
What has not been trained is left out. vgg19 is the reference: all is relative to it, and it teaches
those that are distilled; with `--answers`, by the mean of its logits for so many augmentations of
an image, computed once. `epochs` are all that the weights have seen, those of the network that they
begin with included. Bytes are those of the one file of `slimnets.save`, as multiples of the dense
`torch.save` file; speed is that of `slimnets.accelerate` on the int8 file's network, in times of
the dense network as PyTorch runs it by default (eager, contiguous), on one thread, in turn."""


def measured_on(results: Results) -> str:
    """Which images all figures are of."""
    held_out = {
        one["settings"]["held_out"] for figures in results.found.values() for one in figures
    }
    if len(held_out) > 1:
        raise SystemExit(f"figures of unequal --held-out cannot be compared: {sorted(held_out)}")
    number = held_out.pop()
    return f"{number:,} held-out training images" if number else "the 10,000 test images"


def main(arguments: list[str] | None = None) -> None:
    """Read what there is, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("paper"), help="of reproduce.py")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--data", default="CIFAR-10", help="what the images are")
    options = parser.parse_args(arguments)
    results = Results(options.folder)
    if not results.of(REFERENCE):
        raise SystemExit(
            f"--folder {options.folder}: no figures of {REFERENCE.name} there, which all is "
            "compared with; run reproduce.py first"
        )
    pictures = plots(results, options.out / "results")
    everything = json.dumps(list(results.found.values()), indent=1)
    (options.out / "results" / "figures.json").write_text(everything + "\n")
    (options.out / "results.md").write_text(page(results, pictures, options.data))
    print(options.out / "results.md")


if __name__ == "__main__":
    main()
