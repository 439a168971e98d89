"""Small networks and data, and what else several tests use."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import Metric

from slimnets.lowrank.modules import LowRankPair


def small_network(*, norm: bool = True, dropout: float = 0.0) -> nn.Sequential:
    """A convolutional classifier of 3 x 8 x 8 images into 4 classes."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 4),
    )


def small_data(
    n: int = 48, batch_size: int = 8, *, shuffle: bool = False
) -> DataLoader[tuple[Tensor, ...]]:
    """``n`` random images whose class is the quadrant with the largest mean."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, 8, 8, generator=generator)
    labels = torch.nn.functional.adaptive_avg_pool2d(images, 2).mean(1).flatten(1).argmax(1)
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size, shuffle=shuffle)


class Classifier(L.LightningModule):
    """A user's own LightningModule around a network."""

    def __init__(
        self, network: nn.Module | None = None, optimizer: Any = None, **arguments: Any
    ) -> None:
        super().__init__()
        self.network = network if network is not None else small_network()
        self._optimizer = optimizer or torch.optim.SGD
        self._arguments = arguments or {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._optimizer(self.parameters(), **self._arguments)


class CalledModule(Classifier):
    """Keeps its network in ``module``, as AveragedModel does with what it averages."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.module = small_network()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class Perceptual(Metric):
    """The distance that a network of its own sees between images, as LPIPS."""

    def __init__(self) -> None:
        super().__init__()
        self.features = small_network()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, one: Tensor, two: Tensor) -> None:
        self.total += (self.features(one) - self.features(two)).square().mean()

    def compute(self) -> Tensor:
        return self.total


class Backbone(Classifier):
    """A backbone to be unfrozen in the middle of the run, and a head."""

    def __init__(self) -> None:
        super().__init__(lr=0.1, momentum=0.9)
        self.backbone, self.network = self.network[:7], self.network[7:]

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.backbone(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        live = [p for p in self.parameters() if p.requires_grad]
        return self._optimizer(live, **self._arguments)


def run_script(script: Path, *arguments: object, cwd: Path | None = None, **environ: str) -> str:
    """What a script prints, run on one thread in a process of its own."""
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    """Random images without end, and without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield torch.randn(3, 8, 8), torch.tensor(0)


class Save(L.Callback):
    """Saves at the end of every epoch, by the step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


class Gan(Classifier):
    """Two optimizers, one of them of a critic, under manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(4, 8)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.critic(self(batch[0])).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.SGD(self.network.parameters(), lr=0.1),
            torch.optim.Adam(self.critic.parameters()),
        ]


class Worse(Classifier):
    """Its validation loss only grows, as that of a network that is pruned."""

    def on_validation_epoch_end(self) -> None:
        self.log("loss", float(self.global_step))


def zeros(network: nn.Module) -> dict[str, int]:
    """How many there are in each weight."""
    return {n: int((p == 0).sum()) for n, p in network.named_parameters() if p.ndim > 1}


SPARSITY = 0.75  # of assert_compressed, and of what it is to follow
RANKS = {"0": 2, "3": 2, "7": 2, "9": 2}  # of all layers of small_network()


def assert_sparse(network: nn.Module, sparsity: float = SPARSITY) -> None:
    """Exactly that share of zeros in every weight."""
    for name, count in zeros(network).items():
        assert count == round(sparsity * network.get_parameter(name).numel()), name


def assert_compressed(network: nn.Module, expected: Mapping[str, int] = RANKS) -> None:
    """Exactly the ranks and the zeros that were asked for."""
    assert ranks(network) == expected
    assert_sparse(network)


def ranks(network: nn.Module) -> dict[str, int]:
    """Of each pair."""
    return {n: m.rank for n, m in network.named_modules() if isinstance(m, LowRankPair)}


def assert_equal(one: nn.Module, two: nn.Module | Mapping[str, Tensor]) -> None:
    """That ``one`` has the state of ``two``, bit for bit and in the same order."""
    found, expected = one.state_dict(), two.state_dict() if isinstance(two, nn.Module) else two
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def same_text_everywhere(show: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What ``show`` gives, which colours that are forced and a notebook do not change."""
    plain = show()
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert show() == plain
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert show() == plain
    return plain
