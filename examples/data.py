"""Data modules of images that are decoded once and augmented a batch at a time, on the device."""

from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from typing_extensions import override

Batch = tuple[Tensor, Tensor]


class Images(Dataset[Batch]):
    """Images (n, channels, height, width) uint8 and labels (n,), indexed by whole batches."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    @override
    def __getitem__(self, index: int) -> Batch:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        """The whole batch at once, which is what the data loader asks for where it is offered."""
        return self.images[indices], self.labels[indices]

    def split(self, held_out: int) -> tuple["Images", "Images"]:
        """All but ``held_out`` of the images, and those; always the same ones."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        kept, out = order[held_out:], order[:held_out]
        return Images(*self.__getitems__(kept)), Images(*self.__getitems__(out))


class ImageData(L.LightningDataModule):
    """Loaders over images in memory; batches arrive normalized, those of training augmented."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmented = False

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.train, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        return self._loader(self.validation) if len(self.validation) else []

    @override
    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.test)

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, Tensor):  # a module's example_input_array comes by here, as it is
            return batch
        images, labels = batch
        if self.augmented and self.trainer is not None and self.trainer.training:
            images = crop_and_flip(images)
        images = self.normalize(images)
        if self.trainer is not None:  # has converted the batch before, of bytes
            images = images.to(self.trainer.lightning_module.dtype)
        return images, labels

    def normalize(self, images: Tensor) -> Tensor:
        """Bytes (..., channels, height, width) as floats of about mean 0 and variance 1."""
        mean, std = (_of_channels(values, images.device) for values in (self.mean, self.std))
        return (images - mean) / std

    def _loader(self, images: Images, shuffle: bool = False) -> DataLoader[Batch]:
        return DataLoader(images, self.batch_size, shuffle=shuffle, collate_fn=_as_is)


class Digits(ImageData):
    """Scikit-learn's handwritten digits, (1, 8, 8): 1,257 to train on, 180 and 360 held out."""

    mean, std = (4.88,), (6.02,)

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__(batch_size)

    @override
    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.from_numpy(digits.images).to(torch.uint8)[:, None]
        rest, self.test = Images(images, torch.from_numpy(digits.target)).split(360)
        self.train, self.validation = rest.split(180)


class CIFAR10(ImageData):
    """CIFAR-10, (3, 32, 32): 50,000 images to train on, 10,000 to test on.

    Args:
        data_dir: A folder with ``train/CLASS/*`` and ``test/CLASS/*`` images; or the one where
            torchvision keeps the original, which it downloads if need be.
        batch_size: Images a batch.
        held_out: How many training images are kept for validation instead.
    """

    mean = (0.4914 * 255, 0.4822 * 255, 0.4465 * 255)
    std = (0.2470 * 255, 0.2435 * 255, 0.2616 * 255)
    augmented = True

    def __init__(
        self, data_dir: str | Path = "data", batch_size: int = 128, held_out: int = 5000
    ) -> None:
        super().__init__(batch_size)
        self.data_dir, self.held_out = Path(data_dir), held_out

    @override
    def prepare_data(self) -> None:
        if not _is_image_folder(self.data_dir):
            datasets.CIFAR10(str(self.data_dir), download=True)

    @override
    def setup(self, stage: str) -> None:
        if not hasattr(self, "test"):  # every stage comes by
            self.train, self.validation = _read(self.data_dir, "train").split(self.held_out)
            self.test = _read(self.data_dir, "test")


def _is_image_folder(data_dir: Path) -> bool:
    return (data_dir / "train").is_dir() and (data_dir / "test").is_dir()


@cache  # decoding takes some seconds, and each run of several makes a data module
def _read(data_dir: Path, part: str) -> Images:
    if not _is_image_folder(data_dir):
        original = datasets.CIFAR10(str(data_dir), train=part == "train")
        return Images(_channels_first(original.data), torch.tensor(original.targets))
    folder = datasets.ImageFolder(str(data_dir / part), transform=np.asarray)
    pixels = np.stack([image for image, _ in folder])
    return Images(_channels_first(pixels), torch.tensor(folder.targets))


def crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Shift each image by up to ``padding`` pixels, zeros behind it, and mirror half of them.

    Args:
        images: (batch, channels, height, width).
        padding: The largest shift, in pixels.
    """
    batch, channels, height, width = images.shape
    device = images.device
    padded = F.pad(images, [padding] * 4)
    shift = torch.randint(2 * padding + 1, (2, batch, 1), device=device)
    rows = shift[0] + torch.arange(height, device=device)
    columns = shift[1] + torch.arange(width, device=device)
    mirrored = torch.rand(batch, 1, device=device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return padded[
        torch.arange(batch, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


@cache  # copying to a GPU would wait for all that it has to do
@torch.inference_mode(False)
def _of_channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)[:, None, None]


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _as_is(batch: Batch) -> Batch:
    return batch
