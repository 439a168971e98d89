"""Prune, factorize and distill a network on real images, all in one run of about a minute.

    python examples/quickstart.py
    tensorboard --logdir lightning_logs

Needs ``pip install ".[examples,fast]"``. Scikit-learn's handwritten digits are the data, so that
nothing has to be downloaded.
"""
# ruff: noqa: D102 -- what the hooks of a LightningModule do is known

import argparse
import copy
import warnings
from pathlib import Path

import lightning as L
import torch
from data import Digits
from lightning.pytorch.loggers import TensorBoardLogger
from report import report
from torch import Tensor, nn
from torch.nn import functional as F

import slimnets
from slimnets import DistillationModule, GradualPrune, LowRank

FOLDER = Path("lightning_logs")


class Classifier(L.LightningModule):
    """A network as anybody writes it; nothing in it knows that it will be compressed."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            *convolution(1, 32),
            *convolution(32, 64),
            nn.MaxPool2d(2),
            *convolution(64, 128),
            nn.Flatten(),
            nn.Linear(128 * 4 * 4, 256),
            nn.ReLU(),
            nn.Linear(256, 10),
        )
        self.example_input_array = torch.zeros(64, 1, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val/accuracy", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("test/accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def convolution(channels: int, out: int) -> tuple[nn.Module, ...]:
    """Three by three, batch norm, ReLU."""
    return nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()


def main(epochs: int) -> None:
    """Train a teacher, compress a copy of it for twice as many epochs, save, load, compare."""
    L.seed_everything(0)
    torch.set_num_threads(1)  # more of them would only wait for each other on images this small
    data = Digits()
    settings = {"devices": 1, "log_every_n_steps": 5, "enable_model_summary": False}

    teacher = Classifier()
    logger = TensorBoardLogger(FOLDER, name="teacher", default_hp_metric=False)
    L.Trainer(max_epochs=epochs, logger=logger, **settings).fit(teacher, data)

    student = copy.deepcopy(teacher)
    logger = TensorBoardLogger(FOLDER, name="student", default_hp_metric=False)
    methods = [GradualPrune(0.9), LowRank(r=16)]
    trainer = L.Trainer(max_epochs=2 * epochs, logger=logger, callbacks=methods, **settings)
    trainer.fit(DistillationModule(student=student, teacher=teacher), data)

    torch.save(teacher.state_dict(), FOLDER / "teacher.pt")
    slimnets.save(student, FOLDER / "student.safetensors")
    loaded = slimnets.load(FOLDER / "student.safetensors", Classifier())
    accelerated = slimnets.accelerate(loaded, loaded.example_input_array)

    tester = L.Trainer(devices=1, logger=False, enable_model_summary=False)
    dense, compressed = (
        tester.test(network, data, verbose=False)[0]["test/accuracy"]
        for network in (teacher, loaded)
    )
    report(
        teacher,
        loaded,
        accelerated,
        loaded.example_input_array,
        accuracies=(dense, compressed),
        files=(FOLDER / "teacher.pt", FOLDER / "student.safetensors"),
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", ".*does not have many workers")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="of the teacher; default: 10")
    options = parser.parse_args()
    if options.epochs < 1:
        parser.error(f"--epochs {options.epochs}: give a number of at least 1")
    main(options.epochs)
