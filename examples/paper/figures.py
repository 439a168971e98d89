"""What the runs gave, read from their JSON."""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runs import CONTROL, REFERENCE, Run

Figures = list[dict[str, Any]]  # of one run, one for each seed

mean = statistics.fmean


class Results:
    """The figures of all runs, by run.

    Raises:
        SystemExit: If some cannot be compared with others, or none are of the reference.
    """

    def __init__(self, folder: Path) -> None:
        self.found: dict[str, Figures] = {}
        for path in sorted(folder.glob("*-seed*.json")):
            figures = json.loads(path.read_text())
            self.found.setdefault(figures["run"], []).append(figures)
        if not self.of(REFERENCE):
            raise SystemExit(
                f"--folder {folder}: no figures of {REFERENCE.name} there, which all is compared "
                "with; run reproduce.py first"
            )
        everything = [one for figures in self.found.values() for one in figures]
        keys = ("images", "held_out", "reference", "reference_epochs", "batches")
        _refuse_unequal(everything, keys, "all")
        for name, figures in self.found.items():
            _refuse_unequal(figures, ("epochs", "learning_rate", "answers", "batch_size"), name)
        self.settings: dict[str, Any] = everything[0]["settings"]

    def of(self, run: Run) -> Figures:
        """Of every seed."""
        return self.found.get(run.name, [])

    def first(self, runs: Iterable[Run]) -> Run | None:
        """The first of ``runs`` that there are figures of."""
        return next((run for run in runs if self.of(run)), None)

    @property
    def dense(self) -> Figures:
        """Of what all is compared with: the reference, or the reference trained on if it is better.

        What begins with the reference has more epochs than the reference itself.
        """
        both = [self.of(run) for run in (REFERENCE, CONTROL) if self.of(run)]
        return max(both, key=lambda figures: mean(accuracies(figures)))

    @property
    def reference(self) -> float:
        """The accuracy of the dense network."""
        return mean(accuracies(self.dense))

    def relative(self, figures: Figures, form: str = "float32") -> float:
        """Accuracy as a share of the dense network's."""
        return mean(accuracies(figures, form)) / self.reference

    def elsewhere(self, figures: Figures) -> str:
        """A mark, if their speed was measured on another processor than the reference's."""
        own, reference = (timed_on(one) for one in (figures, self.of(REFERENCE)))
        return "†" if own and own != reference else ""

    def trained_for(self, figures: Figures) -> str:
        """Epochs, marked if they are more than those of the dense network, and seeds."""
        epochs = figures[0]["epochs"]
        mark = "*" if epochs > self.dense[0]["epochs"] else ""
        return f"{epochs:g}{mark}, {len(figures)}"


def has_form(figures: Figures, form: str) -> bool:
    """Whether all seeds have a file of this form."""
    return all(form in one["files"] for one in figures)


def accuracies(figures: Figures, form: str = "float32") -> list[float]:
    """One for each seed, in [0, 1]."""
    return [one["files"][form]["accuracy"] for one in figures]


def speed(figures: Figures, batch: int) -> float:
    """Times as fast as the dense network, over the seeds that were timed; nan if none was."""
    timed = [
        one["speed"][str(batch)]["times_as_fast"]["median"] for one in figures if "speed" in one
    ]
    return statistics.median(timed) if timed else math.nan


def timed_on(figures: Figures) -> str:
    """The processor and the PyTorch that the speed was measured with; "" if it was not."""
    machines = [one["speed"]["machine"] for one in figures if "speed" in one]
    return (
        "{processor} with {instructions}, torch {torch}".format(**machines[0]) if machines else ""
    )


def effort(runs: Iterable[Figures]) -> str:
    """How many epochs and seeds were spent on each of ``runs``."""
    everything = [figures for figures in runs if figures]

    def spelled(values: list[float], what: str) -> str:
        least, most = min(values), max(values)
        numbers = f"{least:g}" if least == most else f"{least:g} to {most:g}"
        return f"{numbers} {what}{'s' if most != 1 else ''}"

    epochs = spelled([figures[0]["epochs"] for figures in everything], "epoch")
    return f"{epochs}, {spelled([len(figures) for figures in everything], 'seed')}"


def _refuse_unequal(everything: Figures, keys: Iterable[str], what: str) -> None:
    for key in keys:
        values = {one["settings"].get(key) for one in everything}
        if len(values) > 1:
            raise SystemExit(
                f"figures of {what} with unequal {key} cannot be compared: "
                f"{sorted(map(str, values))}; give each a folder of its own"
            )
