"""How everything is trained."""

from dataclasses import dataclass
from pathlib import Path

from runs import REFERENCE, Run

FOLDER = Path("lightning_logs") / "paper"
"""Where results go, if it is not said."""

BATCHES = (1, 64)
"""Images that are timed together."""


@dataclass(frozen=True)
class Settings:
    """How everything is trained.

    Attributes:
        folder: Where JSON, networks and checkpoints go.
        data_dir: As in ``examples/cifar10.py``.
        epochs: Of each run but the reference; of 0.5, half the images are seen.
        reference_epochs: Of the reference.
        reference: A file of its weights, so that it is not trained.
        held_out: Training images to measure accuracy on; 0 for the test images.
        answers: Augmentations of each image that teachers are asked about once, to learn from the
            mean of their answers; 0 to ask them at every step.
        learning_rate: The largest of the cycle; None for that of each run.
        batches: A limit for each epoch, for tests.
        processes: Runs trained at the same time; if there are several, they show no progress bars,
            which would be written over each other.
    """

    folder: Path
    data_dir: Path
    epochs: float = 15
    reference_epochs: int = 30
    reference: Path | None = None
    held_out: int = 0
    answers: int = 0
    batch_size: int = 128
    learning_rate: float | None = None
    device: str = "auto"
    precision: str = "32-true"
    batches: int | None = None
    processes: int = 1

    def epochs_of(self, run: Run) -> float:
        """The epochs of one run, without those of the run that it goes on with."""
        return self.reference_epochs if run == REFERENCE else self.epochs

    def learning_rate_of(self, run: Run) -> float | None:
        """The largest of the run's cycle; None if its weights are read from a file."""
        if run == REFERENCE and self.reference:
            return None
        return self.learning_rate or run.learning_rate

    def path(self, run: Run, seed: int) -> Path:
        """The JSON of a run; its networks lie beside it."""
        return self.folder / f"{run.name}-seed{seed}.json"
