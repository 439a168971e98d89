"""The teachers' answers to the training images, computed once and kept in files.

On a CPU the reference's forward pass costs a hundred times what a small student's step does.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
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
    """CIFAR-10 with an answer to each image, taken to hold for all its augmentations.

    Args:
        folder: Where answers are kept, below a folder of their own for each teacher and set of
            images, a file for each augmentation: what is there is not asked again, whichever images
            are held out.
        versions: How many augmentations of an image the answers of each teacher are the mean of.
        data: As for :class:`data.CIFAR10`.
    """

    def __init__(self, folder: Path, versions: int, **data: Any) -> None:
        super().__init__(**data)
        self.folder, self.versions = folder, versions
        self.teacher = Remembered()

    def setup(self, stage: str) -> None:
        """Read the images; an augmentation is the same for all ways to hold images out."""
        if not hasattr(self, "test"):
            super().setup(stage)
            self.whole = torch.cat([self.validation.images, self.train.images])

    def ask(self, networks: Sequence[nn.Module]) -> None:
        """Have the mean answers of ``networks``, from files or by computing them."""
        answers = [self._answers(network) for network in networks]
        plain, augmented = (torch.stack(both).mean(0) for both in zip(*answers, strict=True))
        self.plain, self.answers = plain, augmented[self.held_out :]

    def _answers(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """Those to the images to measure on, and to augmentations of all others."""
        folder = self.folder / digest(
            [self.whole, self.test.images, *network.state_dict().values()]
        )
        folder.mkdir(parents=True, exist_ok=True)
        number = len(self.validation)
        stem = folder / f"{'test' if self.validation is self.test else 'held-out'}-{number}"
        plain = self._remembered(stem, network, lambda: self.validation.images)
        versions = [
            self._remembered(folder / f"version-{v}", network, lambda v=v: self._version(v))
            for v in range(self.versions)
        ]
        return plain, torch.stack(versions).mean(0)

    def _remembered(self, stem: Path, network: nn.Module, images: Callable[[], Tensor]) -> Tensor:
        file, partial = stem.with_suffix(".pt"), stem.with_suffix(f".{os.getpid()}.partial")
        if not file.exists():
            batches = images().split(250)
            fast = slimnets.accelerate(network.eval(), self.normalize(batches[0]))
            with torch.inference_mode():
                answers = torch.cat([fast(self.normalize(batch)) for batch in batches])
            torch.save(answers, partial)
            partial.rename(file)
        return torch.load(file)  # type: ignore[no-any-return]

    def _version(self, number: int) -> Tensor:
        with torch.random.fork_rng([]):
            torch.manual_seed(number)
            return torch.cat([crop_and_flip(batch) for batch in self.whole.split(1000)])

    def train_dataloader(self) -> DataLoader[Any]:
        """The training images, with answers."""
        return self._loader(Answered(self.train, self.answers), shuffle=True)

    def val_dataloader(self) -> Any:
        """The images to measure on, with answers."""
        return self._loader(Answered(self.validation, self.plain))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Tell the teacher what it answered; the batch goes on without it."""
        if not isinstance(batch, Tensor):
            *batch, self.teacher.answers = batch
        return super().on_after_batch_transfer(batch, dataloader_idx)


class Answered(Images):
    """Images and labels with the answers to them (n, classes)."""

    def __init__(self, images: Images, answers: Tensor) -> None:
        super().__init__(images.images, images.labels)
        self.answers = answers

    def __getitems__(self, indices: list[int]) -> Any:
        """A whole batch."""
        return *super().__getitems__(indices), self.answers[indices]


def digest(tensors: Iterable[Tensor]) -> str:
    """A short name for the values of ``tensors``."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.numpy(force=True).tobytes())
    return found.hexdigest()[:12]


@cache
def digest_of_images(data_dir: Path) -> str:
    """A short name for the images and labels to train and test on."""
    data = CIFAR10(data_dir, held_out=0)
    data.prepare_data()
    data.setup("fit")
    parts = (data.train, data.test)
    return digest(tensor for part in parts for tensor in (part.images, part.labels))
