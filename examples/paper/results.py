"""Tables and plots of what ``reproduce.py`` has trained.

    python examples/paper/results.py --out docs

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

from figures import Figures, Results, accuracies, has_form, mean, speed, timed_on
from plots import plots
from runs import BEST, REFERENCE, SMALL, TABLES, Run, needed
from settings import BATCHES, FOLDER, Settings
from targets import targets

Cell = Callable[[Figures], str]


def accuracy(form: str = "float32") -> Cell:
    """Mean and standard deviation over seeds, in per cent."""

    def cell(figures: Figures) -> str:
        if not has_form(figures, form):
            return "-"
        values = [100 * value for value in accuracies(figures, form)]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{mean(values):.2f}{spread}"

    return cell


def smaller(form: str) -> Cell:
    """Bytes of the file, and times fewer than those of the dense network."""

    def cell(figures: Figures) -> str:
        if not has_form(figures, form):
            return "-"
        own = mean(one["files"][form]["bytes"] for one in figures)
        times = figures[0]["dense_bytes"] / own
        return f"{own:,.0f} ({f'{times:.3g}' if times < 1000 else f'{times:,.0f}'}x)"

    return cell


def count(key: str) -> Cell:
    """The mean of a number."""
    return lambda figures: f"{mean(one[key] for one in figures):,.0f}"


def faster(results: Results, batch: int) -> Cell:
    """Times as fast as the dense network."""

    def cell(figures: Figures) -> str:
        ratio = speed(figures, batch)
        return "not timed" if math.isnan(ratio) else f"{ratio:.1f}{results.elsewhere(figures)}"

    return cell


def table(results: Results, runs: Iterable[Run], columns: dict[str, Cell]) -> str:
    """One row for the reference and each run that there is; "" if no method was applied in any."""
    runs = list(runs)
    if not any(results.of(run) for run in runs if run != Run(run.network, run.of)):
        return ""
    lines = ["| run | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for run in dict.fromkeys([REFERENCE, *runs]):
        if figures := results.of(run):
            cells = " | ".join(cell(figures) for cell in columns.values())
            lines.append(f"| {run.name} | {cells} |")
    return "\n".join(lines)


def relative(results: Results, form: str) -> Cell:
    """Accuracy as a share of the dense network's."""

    def cell(figures: Figures) -> str:
        return f"{results.relative(figures, form):.1%}" if has_form(figures, form) else "-"

    return cell


def page(results: Results, pictures: dict[str, str], options: argparse.Namespace) -> str:
    """The whole page."""
    basic = {
        "accuracy, %": accuracy(),
        "of dense": relative(results, "float32"),
        "epochs, seeds": results.trained_for,
    }

    def rounded(form: str) -> dict[str, Cell]:
        return {
            f"accuracy, {form}, %": accuracy(form),
            f"of dense, {form}": relative(results, form),
            "bytes": smaller("float32"),
            f"bytes, {form}": smaller(form),
        }

    sizes = {"bytes": smaller("float32"), "bytes, int8": smaller("int8")}
    speeds = {f"speed, batch {batch}": faster(results, batch) for batch in BATCHES}
    counts = {"non-zeros": "nonzeros", "MACs": "macs", "effective MACs": "effective_macs"}
    work = {title: count(key) for title, key in counts.items()}
    everything = {**basic, **rounded("int8"), **speeds}
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
        "A small residual network, pruned while it is distilled": (
            TABLES["stacked"],
            {**basic, **rounded("int6"), **speeds},
        ),
    }
    for network in ("residual", "vgg19", "nin", "narrow", "cnn"):
        runs = TABLES[f"combined-{network}"]
        begun = dict.fromkeys(run.of for run in runs if run.of)
        sections[f"Combined: {runs[0].network}"] = ([*begun, *runs], everything)
    parts = [
        head(results),
        "## Where the targets stand",
        TARGETS_HERE,
        targets(results),
    ]
    if results.of(BEST):
        parts += ["## The network that is kept", KEPT_HERE]
    for title, (runs, columns) in sections.items():
        if rows := table(results, runs, columns):
            parts += [f"## {title}", rows]
    parts.append("## Pictures")
    for file, caption in pictures.items():
        parts += [f"![{caption}](results/{file})", f"*{caption}*"]
    given = f"--folder FOLDER --data {json.dumps(options.data)} --out {options.out}"
    parts += [
        "## Commands",
        "These train everything, in this order, each with `--folder FOLDER --data-dir DIR`:",
        commands(results),
        f"and this page written by `python examples/paper/results.py {given}`.",
    ]
    heading = HEADING.format(data=options.data, machines=trainers(results))
    return "\n\n".join([heading, *parts]) + "\n"


HEADING = """# The paper's tables, trained with slimnets

SlimNets (arXiv 1808.00496) compresses VGG-19 on CIFAR-10 by gradual pruning, low-rank convolutions,
distillation, and by all of them together. This page repeats its experiments with slimnets, as far
as they have been trained. Images: {data}.
Trained on: {machines}."""

HEAD = """**The reference, `{dense}`, classifies {reference:.2%} of {measured_on} correctly, after
{epochs:g} epochs (seeds: {seeds}); the paper's had 92.4 %.** A weak reference flatters whatever is
compared with it. Everything is relative to it, and `vgg19` teaches the runs that are called
`distilled`{answers}.

- `A-then-B` is the trained network A, changed by B and trained on. `gradual75` and `oneshot75`:
  75 % zeros, reached gradually or at the first step. `spatial0.3`, `channel0.3`: layers replaced
  by low-rank pairs of 0.3 of their full rank; `spatialpaper`: of the paper's ranks;
  `spatialbudget0.1`: of ranks that `LowRank(budget=0.1)` chooses, for a tenth of the weights of all
  layers together.
  `gradual75global`: 75 % of all weights together, not of each layer; `gradual75lamp`: the same,
  chosen by `slimnets.pruning.lamp`. `gradualtapered`: fewer zeros in early layers (`TAPERED` in
  `examples/paper/runs.py`). `distilled2`, `distilled3`: taught by one
  or two more networks, too (`LARGE`, `BESIDE` there). What is pruned twice to the same share keeps
  its zeros, and is only trained on, as is a factorized network that is distilled once more (`again`
  there).
- `accuracy` is that after the last epoch, mean ± standard deviation over seeds, in per cent;
  `of dense` is its share of the reference's. `epochs` include those of the network that a run goes
  on with; where they are more than the reference's, they are marked with *. `vgg19-then-dense` is
  `vgg19` trained on in the same way, without compression; where it is better, it is the reference.
  A `-` was not measured.
- `bytes` are those of the file of `slimnets.save`, and how many times smaller it is than the dense
  network's of `torch.save` ({dense_bytes:,} bytes). `int8` is saved with `dtype=torch.int8`; `int6`
  with `bits=6` besides, and with batch norm's statistics taken anew, from 10,000 training images,
  after rounding.
- `speed`: how many times as fast as the dense network in eager PyTorch the network of a run's
  smallest file is, when it runs through `slimnets.accelerate`; the median of passes that took
  turns, on one thread{machine}.
  The row `vgg19` is the dense network through `accelerate`.{elsewhere}
- MACs are the multiplications for one image; effective ones are those by weights that are not zero.
- Learning rates of `cnn-1k`, `snn-1k` and `nin` were compared on 5,000 held-out training images
  (`examples/paper/runs.py`); other settings are the paper's or guesses. Nothing of a run was chosen
  by its own test accuracy, but which of two is the reference, and that networks with 10,000 hidden
  units have a lower rate than the other students, with which a seed of one had collapsed; and what
  to train next was decided knowing that of earlier runs."""

TARGETS_HERE = """Points are those of accuracy in per cent, above or below the reference's; of a
student, above or below the student alone. Its spread is the larger of the standard deviations over
seeds, alone and distilled."""

KEPT_HERE = f"""`examples/paper/{BEST.network}.safetensors` is the int6 file of
`{BEST.name}`, seed 0;
`python examples/paper/best.py --data-dir DIR --reference FILE` measures it."""


def head(results: Results) -> str:
    """What was compared with what, and what the words mean."""
    reference, dense = results.of(REFERENCE)[0], results.dense[0]
    held_out = results.settings["held_out"]
    taught = [one for one in results.found.values() if one[0].get("distillation")]
    answers = {one[0]["settings"]["answers"] for one in taught} - {0}
    spelled = " or ".join(map(str, sorted(answers)))
    timed = timed_on([reference])
    elsewhere = {timed_on(one) for one in results.found.values() if results.elsewhere(one)}
    return HEAD.format(
        dense=dense["run"],
        reference=results.reference,
        measured_on=f"{held_out:,} held-out training images" if held_out else "the test images",
        epochs=dense["epochs"],
        seeds=len(results.dense),
        answers=f", by the mean of its logits for {spelled} augmentations of an image"
        if answers
        else "",
        dense_bytes=reference["dense_bytes"],
        machine=f" ({timed})" if timed else "",
        elsewhere=f"\n  Those marked † were measured on {', '.join(sorted(elsewhere))}."
        if elsewhere
        else "",
    )


def trainers(results: Results) -> str:
    """The processors that trained what is shown, with their PyTorch."""
    everything = [one for figures in results.found.values() for one in figures]
    machines = [
        one["machine"]
        for one in everything
        if one["run"] != REFERENCE.name or not one["settings"]["reference"]
    ]
    spelled = {
        "{}, torch {torch}".format(one.get("gpu", one["processor"]), **one) for one in machines
    }
    return "; ".join(sorted(spelled))


def commands(results: Results) -> str:
    """What trains all that is shown, in order: what others go on with or learn from comes first."""
    everything = (one for runs in TABLES.values() for run in runs for one in needed(run))
    stages = {run.name: len(needed(run)) for run in everything} | {REFERENCE.name: 0}
    groups: dict[tuple[int, str], list[str]] = {}
    defaults = {one.name: one.default for one in fields(Settings)}
    for name, figures in results.found.items():
        settings = {**figures[0]["settings"], "seeds": max(one["seed"] for one in figures) + 1}
        del settings["images"]
        if name != REFERENCE.name:
            settings["epochs"] = f"{settings['epochs']:g}"
        elif settings["reference"]:
            continue  # it is not trained
        else:
            del settings["epochs"]  # of others
        given = [
            f"--{key.replace('_', '-')} {value}"
            for key, value in sorted(settings.items())
            if value != defaults.get(key) or (key == "reference_epochs" and settings["reference"])
        ]
        groups.setdefault((stages.get(name, 0), " ".join(given)), []).append(name)
    return "\n".join(
        f"    python examples/paper/reproduce.py all --only {' '.join(names)} {given}"
        for (_, given), names in sorted(groups.items())
    )


def main(arguments: list[str] | None = None) -> None:
    """Read what there is, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of reproduce.py")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--data", default="CIFAR-10", help="what the images are")
    options = parser.parse_args(arguments)
    results = Results(options.folder)
    pictures = plots(results, options.out / "results")
    everything = json.dumps(list(results.found.values()), indent=1)
    (options.out / "results" / "figures.json").write_text(everything + "\n")
    (options.out / "results.md").write_text(page(results, pictures, options))
    print(options.out / "results.md")


if __name__ == "__main__":
    main()
