"""The data modules give what they say, and only training is augmented."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.data import CIFAR10, Digits, crop_and_flip


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 2)):
        for label in range(10):
            folder = tmp_path / part / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path


def test_digits_are_split_without_overlap() -> None:
    data = Digits()
    data.setup("fit")
    parts = [data.train, data.validation, data.test]
    assert [len(part) for part in parts] == [1257, 180, 360]
    everything = torch.cat([part.images for part in parts]).flatten(1)
    assert everything.max() == 16
    # the handwritten digits hold no image twice, so neither may the parts together
    assert len(everything.unique(dim=0)) == 1797


def test_digits_arrive_normalized() -> None:
    data = Digits()
    data.setup("fit")
    images = data.normalize(data.train.images)
    assert images.mean().abs() < 0.02
    assert images.std() == pytest.approx(1, abs=0.02)


def test_cifar10_from_a_folder_of_images(image_folder: Path) -> None:
    data = CIFAR10(image_folder, batch_size=8, held_out=20)
    data.prepare_data()
    data.setup("fit")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [40, 20, 20]
    assert data.test.images.dtype == torch.uint8
    first = np.asarray(Image.open(image_folder / "test" / "class0" / "0.png"))
    assert np.array_equal(data.test.images[0].permute(1, 2, 0), first)
    assert data.test.labels.tolist() == [label for label in range(10) for _ in range(2)]
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 32, 32)
    assert labels.shape == (8,)


def test_cifar10_as_torchvision_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    for number, name in enumerate((*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")):
        two = slice(2 * number, 2 * number + 2)
        batch = {"data": pixels[two].reshape(2, -1), "labels": [number, 9 - number]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    data = CIFAR10(tmp_path, held_out=0)
    data.prepare_data()
    data.setup("fit")
    assert np.array_equal(data.test.images, pixels[10:])
    assert data.test.labels.tolist() == [5, 4]
    assert sorted(data.train.labels.tolist()) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_without_held_out_images_nothing_is_validated(image_folder: Path) -> None:
    data = CIFAR10(image_folder, held_out=0)
    data.setup("fit")
    assert len(data.train) == 60
    assert data.val_dataloader() == []


def test_every_augmented_image_is_a_shifted_and_perhaps_mirrored_original() -> None:
    images = torch.randint(1, 256, (64, 3, 8, 8), dtype=torch.uint8)
    augmented = crop_and_flip(images, padding=1)
    assert augmented.shape == images.shape
    assert augmented.dtype == torch.uint8
    padded = torch.nn.functional.pad(images, [1] * 4)
    seen = set()
    for original, image in zip(padded, augmented, strict=True):
        options = {
            (y, x, mirrored): shifted.flip(-1) if mirrored else shifted
            for y in range(3)
            for x in range(3)
            for mirrored in (False, True)
            for shifted in [original[:, y : y + 8, x : x + 8]]
        }
        (found,) = [key for key, option in options.items() if torch.equal(option, image)]
        seen.add(found)
    assert len(seen) > 12  # of 18 ways


def test_the_example_of_a_module_passes_untouched(image_folder: Path) -> None:
    example = torch.randn(2, 3, 32, 32)
    assert CIFAR10(image_folder).on_after_batch_transfer(example, 0) is example
