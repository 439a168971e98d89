"""A training that `test_killed.py` starts in a process of its own, kills, and starts again."""

import io
import json
import logging
import os
import random
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from slimnets import DistillationModule, ExactResume, GradualPrune, LowRank
from slimnets.resume import last_checkpoint
from tests.support import Classifier, small_data, small_network

METHODS = {
    "prune": lambda: [GradualPrune(0.9, end=0.6)],
    "lowrank": lambda: [LowRank(r=0.5)],
    "energy": lambda: [LowRank(energy=0.7)],
    "midway": lambda: [GradualPrune(0.75, end=0.8), LowRank(r=0.5, at=9)],
    "distill": lambda: [],
    "stacked": lambda: [GradualPrune(0.75, end=0.6), LowRank(energy=0.7)],
    "averaged": lambda: [
        GradualPrune(0.75, end=0.6),
        EMAWeightAveraging(decay=0.9),
        LowRank(energy=0.7),
    ],
}
DISTILLED = ("distill", "stacked", "averaged")
ADAM = partial(torch.optim.Adam, lr=0.01)


class Augmented(Dataset):
    """Draws from every generator that an augmentation may draw from."""

    def __init__(self) -> None:
        self.images, self.labels = small_data().dataset.tensors

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index] + 0.1 * torch.randn(3, 8, 8)
        return image * (0.9 + 0.2 * random.random()) + 0.1 * np.random.rand(), self.labels[index]


class Lines(Logger):
    """Appends what is logged to a file, a line at once, so that nothing waits in a buffer."""

    name, version = "lines", 0

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([step, {key: float(value) for key, value in metrics.items()}]))
            file.write("\n")

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


class InPieces(TorchCheckpointIO):
    """Writes to a slow disk, and straight to the file, so that a kill can cut it short."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        data = buffer.getvalue()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb", buffering=0) as file:
            for start in range(0, len(data), len(data) // 4):
                file.write(data[start : start + len(data) // 4])
                time.sleep(0.01)


def train(folder: Path, method: str, every: int | None) -> None:
    """Train to the end from the last whole checkpoint in ``folder``, and leave ``result.pt``.

    Args:
        folder: Where the checkpoints and the log are.
        method: Of ``METHODS``.
        every: Steps between checkpoints; None for the end of every epoch.
    """
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student, teacher = small_network(dropout=0.5), small_network()
    checkpoint = last_checkpoint(folder)
    # what a resumed process begins with must not matter
    L.seed_everything(1 if checkpoint is None else os.getpid(), verbose=False)
    if method in DISTILLED:
        module = DistillationModule(student, teacher, optimizer=ADAM)
    else:
        module = Classifier(student, torch.optim.Adam, lr=0.01)
    loader = DataLoader if every is None else StatefulDataLoader
    save = ModelCheckpoint(folder, save_top_k=-1, filename="{step}", every_n_train_steps=every)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=4,
        callbacks=[*METHODS[method](), ExactResume(), save],
        logger=Lines(folder / "log.jsonl"),
        log_every_n_steps=1,
        plugins=[InPieces()],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(
        module, loader(Augmented(), batch_size=8, shuffle=True), small_data(8), ckpt_path=checkpoint
    )
    result = {
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "masks": [c.masks for c in trainer.callbacks if isinstance(c, GradualPrune)],
        "steps": [trainer.global_step, trainer.current_epoch],
        "random": [torch.get_rng_state(), random.random(), float(np.random.rand())],
    }
    torch.save(result, folder / "result.tmp")
    os.replace(folder / "result.tmp", folder / "result.pt")


def rows(folder: Path) -> dict[str, dict[int, float]]:
    """Of every name that was logged, the last value of each step."""
    curves: dict[str, dict[int, float]] = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        step, metrics = json.loads(line)
        for key, value in metrics.items():
            curves.setdefault(key, {})[step] = value
    return curves
