"""What the runs gave, read from their JSON."""

import json
import statistics
from pathlib import Path
from typing import Any

from runs import REFERENCE, Run

Figures = list[dict[str, Any]]  # of one run, one for each seed

mean = statistics.fmean


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

    @property
    def reference(self) -> float:
        """The accuracy of the dense network."""
        return mean(accuracies(self.of(REFERENCE)))

    def relative(self, figures: Figures, form: str = "float32") -> str:
        """Accuracy as a share of the dense network's."""
        return f"{mean(accuracies(figures, form)) / self.reference:.1%}"


def accuracies(figures: Figures, form: str = "float32") -> list[float]:
    """One for each seed, in [0, 1]."""
    return [one["files"][form]["accuracy"] for one in figures]
