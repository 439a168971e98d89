"""What every test may use: a fixed seed and a quiet Trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """A factory of Trainers on the CPU that print and write nothing unless told to."""

    def make(**arguments: Any) -> L.Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(**{**defaults, **arguments})

    return make
