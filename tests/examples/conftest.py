"""Images for the examples."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 120 images in CIFAR-10's layout."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for label in range(10):
        image = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        for part, count in (("train", 8), ("test", 4)):
            (folder / part / f"class{label}").mkdir(parents=True)
            for index in range(count):
                image.save(folder / part / f"class{label}" / f"{index}.png")
    return folder
