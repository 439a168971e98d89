"""Everything from a YAML file: the student, the teacher with its weights, the methods, the data.

    python examples/quickstart.py                               # trains the teacher
    python examples/cli.py fit --config examples/compress.yaml

Needs ``pip install ".[examples]"``. Like any LightningCLI it takes each value from the command
line too: ``--trainer.max_epochs 5``.
"""

from pathlib import Path

import lightning as L
from lightning.pytorch.cli import LightningCLI

import slimnets


class CompressionCLI(LightningCLI):
    """Saves the compressed student when the training is over."""

    def after_fit(self) -> None:
        """Write the student's file beside the logs."""
        folder = self.trainer.log_dir or self.trainer.default_root_dir  # asked on every rank
        if not self.trainer.is_global_zero:
            return
        path = Path(folder) / "student.safetensors"
        slimnets.save(self.model, path)
        print(f"\n{slimnets.summarize(self.model)}\n\n{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    CompressionCLI(
        slimnets.DistillationModule,
        L.LightningDataModule,
        subclass_mode_data=True,
        seed_everything_default=0,
        # its --optimizer would be made before LowRank replaces the layers
        auto_configure_optimizers=False,
    )
