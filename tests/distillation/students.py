"""Networks and students that several tests here use, some named in configuration files."""

from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.support import Classifier, small_data


class Perceptron(nn.Module):
    """A classifier of 3 x 8 x 8 images into 4 classes with one hidden layer."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(192, hidden), nn.ReLU(), nn.Linear(hidden, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Student(Classifier):
    """A user's LightningModule that takes numbers only."""

    def __init__(self, hidden: int = 16, lr: float = 0.1) -> None:
        super().__init__(Perceptron(hidden), lr=lr)
        self.save_hyperparameters()


class Images(L.LightningDataModule):
    """The images of ``tests.support``."""

    def __init__(self, n: int = 32) -> None:
        super().__init__()
        self.n = n

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return small_data(self.n)


def half_the_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """A user's own loss."""
    return 0.5 * (student - teacher).square().mean()


SGD = partial(torch.optim.SGD, lr=0.1)


def first_batch() -> tuple[Tensor, Tensor]:
    return next(iter(small_data()))


def one_step(student: nn.Module, loss: Tensor, lr: float = 0.1) -> dict[str, Tensor]:
    """The weights of ``student`` after one step of gradient descent."""
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    return {
        name: parameter.detach() - lr * gradient
        for (name, parameter), gradient in zip(student.named_parameters(), gradients, strict=True)
    }


def assert_weights(network: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], msg=lambda m, n=name: n + m)


class Manual(Classifier):
    """Manual optimization with one optimizer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class InSubmodule(Classifier):
    """Logits are computed by a submodule, as in most LightningModules."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])
