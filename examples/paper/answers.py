"""The reference's answers to a fixed number of augmentations, computed once and kept in a file.

On a CPU its forward pass costs a hundred times what a small student's step does.
"""

from pathlib import Path
from typing import Any

import torch
from data import CIFAR10, Images, crop_and_flip
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Remembered(nn.Module):
    """Gives the answers that belong to the batch at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = torch.empty(0)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) that the teacher gave for ``images`` when it was asked."""
        return self.answers


class AnsweredCIFAR10(CIFAR10):
    """CIFAR-10 in ``versions`` fixed augmentations, one an epoch, in turn, each with answers.

    Args:
        file: Where answers are kept.
        versions: How many augmentations of the training images there are.
        data: As for :class:`data.CIFAR10`.
    """

    augmented = False  # it is done here, the same way each time

    def __init__(self, file: Path, versions: int, **data: Any) -> None:
        super().__init__(**data)
        self.file, self.versions = file, versions
        self.teacher = Remembered()

    def ask(self, network: nn.Module) -> None:
        """Compute the answers of ``network`` to what was set up, unless they are in the file."""
        if self.file.exists():
            self.answers = torch.load(self.file)
            return
        parts = [self._version(v) for v in range(self.versions)]
        parts.append(self.validation.images)
        network.eval()
        with torch.inference_mode():
            self.answers = [
                torch.cat([network(self.normalize(batch)) for batch in images.split(250)])
                for images in parts
            ]
        partial = self.file.with_suffix(".partial")
        torch.save(self.answers, partial)
        partial.rename(self.file)

    def _version(self, number: int) -> Tensor:
        with torch.random.fork_rng([]):
            torch.manual_seed(number)
            return torch.cat([crop_and_flip(batch) for batch in self.train.images.split(1000)])

    def train_dataloader(self) -> DataLoader[Any]:
        """Another augmentation each epoch; needs ``reload_dataloaders_every_n_epochs=1``."""
        number = self.trainer.current_epoch % self.versions if self.trainer else 0
        images, answers = self._version(number), self.answers[number]
        return self._loader(Answered(images, self.train.labels, answers), shuffle=True)

    def val_dataloader(self) -> Any:
        """The images to measure on, with answers."""
        return self._loader(
            Answered(self.validation.images, self.validation.labels, self.answers[-1])
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Tell the teacher what it answered; the batch goes on without it."""
        if isinstance(batch, Tensor):
            return batch
        images, labels, self.teacher.answers = batch
        return self.normalize(images), labels


class Answered(Images):
    """Images and labels with the answers to them (n, classes)."""

    def __init__(self, images: Tensor, labels: Tensor, answers: Tensor) -> None:
        super().__init__(images, labels)
        self.answers = answers

    def __getitems__(self, indices: list[int]) -> Any:
        """A whole batch."""
        return *super().__getitems__(indices), self.answers[indices]
