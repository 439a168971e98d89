"""The reference's answers to a fixed number of augmentations, computed once and kept in files.

On a CPU its forward pass costs a hundred times what a small student's step does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from data import CIFAR10, Images, crop_and_flip
from torch import Tensor, nn
from torch.utils.data import DataLoader

import slimnets


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

    Half of the images are mirrored anew each time; the answers are taken to stay the same.

    Args:
        folder: Where answers are kept, a file for each version: what is there is not asked again,
            whichever images are held out.
        versions: How many augmentations of the training images there are.
        data: As for :class:`data.CIFAR10`.
    """

    augmented = False  # it is done here, the same way each time

    def __init__(self, folder: Path, versions: int, **data: Any) -> None:
        super().__init__(**data)
        self.folder, self.versions = folder, versions
        self.teacher = Remembered()

    def setup(self, stage: str) -> None:
        """Read the images; an augmentation is the same for all ways to hold images out."""
        if not hasattr(self, "test"):
            super().setup(stage)
            self.whole = torch.cat([self.validation.images, self.train.images])

    def ask(self, network: nn.Module) -> None:
        """Have the answers of ``network`` to what was set up, from files or by computing them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = len(self.validation)
        plain = self.folder / f"{'test' if self.validation is self.test else 'held-out'}-{number}"
        self.plain = self._remembered(plain, network, lambda: self.validation.images)
        self.answers = [
            self._remembered(self.folder / f"version-{v}", network, lambda v=v: self._version(v))
            for v in range(self.versions)
        ]

    def _remembered(self, stem: Path, network: nn.Module, images: Callable[[], Tensor]) -> Tensor:
        file, partial = stem.with_suffix(".pt"), stem.with_suffix(".partial")
        if not file.exists():
            batches = [self.normalize(batch) for batch in images().split(250)]
            fast = slimnets.accelerate(network.eval(), batches[0])
            with torch.inference_mode():
                torch.save(torch.cat([fast(batch) for batch in batches]), partial)
            partial.rename(file)
        return torch.load(file)  # type: ignore[no-any-return]

    def _version(self, number: int) -> Tensor:
        with torch.random.fork_rng([]):
            torch.manual_seed(number)
            return torch.cat([crop_and_flip(batch) for batch in self.whole.split(1000)])

    def train_dataloader(self) -> DataLoader[Any]:
        """Another augmentation each epoch; needs ``reload_dataloaders_every_n_epochs=1``."""
        number = self.trainer.current_epoch % self.versions if self.trainer else 0
        images, answers = (
            tensor[self.held_out :] for tensor in (self._version(number), self.answers[number])
        )
        return self._loader(Answered(images, self.train.labels, answers), shuffle=True)

    def val_dataloader(self) -> Any:
        """The images to measure on, with answers."""
        return self._loader(Answered(self.validation.images, self.validation.labels, self.plain))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Tell the teacher what it answered; the batch goes on without it."""
        if isinstance(batch, Tensor):
            return batch
        images, labels, self.teacher.answers = batch
        if self.trainer is not None and self.trainer.training:
            mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
        return self.normalize(images), labels


class Answered(Images):
    """Images and labels with the answers to them (n, classes)."""

    def __init__(self, images: Tensor, labels: Tensor, answers: Tensor) -> None:
        super().__init__(images, labels)
        self.answers = answers

    def __getitems__(self, indices: list[int]) -> Any:
        """A whole batch."""
        return *super().__getitems__(indices), self.answers[indices]
