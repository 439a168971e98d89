"""Compress the paper's networks on CIFAR-10, with VGG-19 as teacher.

    python examples/cifar10.py                     # downloads CIFAR-10 to ./data
    python examples/cifar10.py --data-dir DIR      # has DIR/train/CLASS/* and DIR/test/CLASS/*
    python examples/cifar10.py --teacher vgg19.safetensors --student vgg19 --rank paper

Needs ``pip install ".[examples,fast]"``. Without a file of the teacher's weights, VGG-19
is trained first, for as many epochs as the student.
"""
# ruff: noqa: D102 -- what the hooks of a LightningModule do is known

import argparse
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from data import CIFAR10
from lightning.pytorch.loggers import TensorBoardLogger
from networks import NETWORKS, PAPER_RANKS
from report import report
from torch import Tensor, nn
from torch.nn import functional as F

import slimnets
from slimnets import DistillationModule, GradualPrune, LowRank

FOLDER = Path("lightning_logs")


def sgd(parameters: Iterable[nn.Parameter], learning_rate: float = 0.1) -> torch.optim.SGD:
    """The paper's optimizer."""
    return torch.optim.SGD(
        parameters, learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True
    )


class Classifier(L.LightningModule):
    """A network that is trained alone."""

    def __init__(self, network: nn.Module, optimizer: Callable[..., Any] = sgd) -> None:
        super().__init__()
        self.network, self.optimizer = network, optimizer

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val/accuracy", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


def cosine(learning_rate: float, epochs: int) -> Callable[..., dict[str, Any]]:
    """The paper's optimizer, with a cosine from ``learning_rate`` to zero over the run."""

    def make(parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
        optimizer = sgd(parameters, learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    return make


def rank(text: str) -> float | dict[str, int]:
    """``--rank`` as ``LowRank`` takes it."""
    if text == "paper":
        return PAPER_RANKS
    return float(text) if "." in text else int(text)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data"), help="of images, or for the download")
    add("--teacher", type=Path, help="file of VGG-19's weights: safetensors, torch.save, ckpt")
    add("--student", choices=NETWORKS, default="nin", help="vgg19 starts as a copy of the teacher")
    add("--epochs", type=int, default=30)
    add("--sparsity", type=float, default=0.9, help="share of zeros at the end; 0 for no pruning")
    add("--rank", type=rank, help="a number, a fraction of the full rank, or 'paper' for vgg19")
    add("--budget", type=float, help="in place of --rank: the share of their weights that is left")
    add("--held-out", type=int, default=5000, help="training images to validate on instead")
    add("--batch-size", type=int, default=128)
    add("--learning-rate", type=float, default=0.01)
    add("--precision", default="32-true", help="of the Trainer, for example bf16-mixed")
    add("--fast", action="store_true", help="a few batches only; the figures mean nothing")
    args = parser.parse_args()
    for option in ("epochs", "batch_size"):
        if (value := getattr(args, option)) < 1:
            parser.error(f"--{option.replace('_', '-')} {value}: give a number of at least 1")
    if args.rank is PAPER_RANKS and args.student != "vgg19":
        parser.error(f"--rank paper: of vgg19's layers, not of {args.student}'s; --student vgg19")
    return args


def main() -> None:
    """Train a teacher unless there is one, compress the student, save, load, compare."""
    args = arguments()
    methods: list[L.Callback] = []  # made at once: they refuse arguments, and a teacher takes long
    if args.sparsity:
        methods.append(GradualPrune(args.sparsity))
    if args.rank is not None or args.budget is not None:
        methods.append(LowRank(args.rank, budget=args.budget))
    L.seed_everything(0)
    data = CIFAR10(args.data_dir, args.batch_size, args.held_out)
    epochs = 1 if args.fast else args.epochs
    optimizer = cosine(args.learning_rate, epochs)
    settings: dict[str, Any] = {
        "devices": 1,
        "precision": args.precision,
        "enable_model_summary": False,
    }
    if args.fast:
        settings |= dict.fromkeys(("limit_train_batches", "limit_val_batches"), 4)
        settings |= {"limit_test_batches": 4, "log_every_n_steps": 1}

    teacher = NETWORKS["vgg19"]()
    if args.teacher is None:
        logger = TensorBoardLogger(FOLDER, name="vgg19")
        trainer = L.Trainer(max_epochs=epochs, logger=logger, **settings)
        trainer.fit(Classifier(teacher, optimizer), data)

    student = NETWORKS[args.student]()
    module = DistillationModule(student, teacher, optimizer=optimizer, teacher_weights=args.teacher)
    if args.student == "vgg19":
        student.load_state_dict(teacher.state_dict())
    logger = TensorBoardLogger(FOLDER, name=f"{args.student}-compressed")
    trainer = L.Trainer(max_epochs=epochs, logger=logger, callbacks=methods, **settings)
    trainer.fit(module, data)

    folder = Path(trainer.log_dir)
    torch.save(teacher.state_dict(), folder / "teacher.pt")
    slimnets.save(module, folder / "student.safetensors")
    loaded = slimnets.load(folder / "student.safetensors", NETWORKS[args.student]())

    image = torch.randn(1, 3, 32, 32)
    accelerated = slimnets.accelerate(loaded, image)

    tester = L.Trainer(logger=False, **settings)
    (accuracy,) = tester.test(DistillationModule(loaded, teacher), data, verbose=False)
    report(
        teacher,
        loaded,
        accelerated,
        image,
        accuracies=(accuracy["test/teacher_accuracy"], accuracy["test/student_accuracy"]),
        files=(folder / "teacher.pt", folder / "student.safetensors"),
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", ".*does not have many workers")
    main()
