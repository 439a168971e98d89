"""What the cost of training is measured on: VGG-19, and ways to compress it."""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelPruning
from shared import PAPER_RANKS, random_vgg19
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, TensorDataset

import slimnets
from slimnets.lowrank.decompose import as_matrix

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def quiet(threads: int) -> None:
    """So many threads, and no advice of Lightning's."""
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(threads)


class Plain(L.LightningModule):
    """A network trained by SGD, and maybe a teacher that is only asked."""

    def __init__(self, network: nn.Module, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network
        self.asked = [teacher] if teacher else []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The cross entropy."""
        images, labels = batch
        for teacher in self.asked:
            with torch.no_grad():
                teacher(images)
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return sgd(self.network.parameters())


def sgd(parameters: object) -> torch.optim.Optimizer:
    """With momentum, and too slow to get anywhere."""
    return torch.optim.SGD(parameters, lr=1e-5, momentum=0.9)  # type: ignore[arg-type]


def gradual() -> list[L.Callback]:
    """90 % zeros from the first step on."""
    return [slimnets.GradualPrune(0.9, begin=0, end=0, every=1)]


def lightnings() -> list[L.Callback]:
    """Lightning's callback; it prunes after the first epoch, by ``torch.nn.utils.prune``."""
    return [ModelPruning("l1_unstructured", amount=0.9, make_pruning_permanent=False)]


def nothing() -> list[L.Callback]:
    """No callback at all."""
    return []


@dataclass
class Work:
    """What is trained, and how much."""

    width: float
    batch: int
    steps: int
    threads: int

    def network(self) -> nn.Module:
        """VGG-19, the same each time."""
        torch.manual_seed(0)
        return random_vgg19(self.width)

    def plain(self) -> L.LightningModule:
        """The network alone."""
        return Plain(self.network())

    def apart(self) -> L.LightningModule:
        """The network, and a teacher that is only asked."""
        return Plain(self.network(), self.network().eval().requires_grad_(False))

    def distilled(self) -> L.LightningModule:
        """The network with a teacher."""
        return slimnets.DistillationModule(self.network(), self.network(), optimizer=sgd)

    def fit(
        self,
        module: Callable[[], L.LightningModule],
        callbacks: Callable[[], list[L.Callback]] = nothing,
        last: L.Callback | None = None,
    ) -> None:
        """Train for two epochs."""
        torch.set_num_threads(self.threads)  # which counts for one Python thread only
        count = self.batch * self.steps
        data = TensorDataset(torch.randn(count, 3, 32, 32), torch.randint(10, (count,)))
        own = [*callbacks(), *([last] if last else [])]
        trainer = L.Trainer(max_epochs=2, callbacks=own, **QUIET)  # type: ignore[arg-type]
        trainer.fit(module(), DataLoader(data, self.batch))

    def factorized(self, factors: Callable[[Tensor, int], Any]) -> list[Any]:
        """What ``factors`` makes of every convolution."""
        return [factors(weight, rank) for weight, rank in self.convolutions()]

    def convolutions(self) -> list[tuple[Tensor, int]]:
        """The weight of each, and the paper's rank, as far as the network is as wide."""
        layers = [one for one in self.network().modules() if isinstance(one, nn.Conv2d)]
        ranks = [max(1, round(rank * self.width)) for rank in PAPER_RANKS.values()]
        return [(one.weight.detach(), rank) for one, rank in zip(layers, ranks, strict=True)]


def prune_globally(network: nn.Module) -> None:
    """90 % of all weights, by slimnets."""
    slimnets.prune(network, 0.9, scope="global")


def torch_globally(network: nn.Module) -> None:
    """90 % of all weights, by torch."""
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    torch_prune.global_unstructured(
        [(layer, "weight") for layer in layers], torch_prune.L1Unstructured, amount=0.9
    )


def full_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """What factorizing is measured against."""
    u, s, vh = torch.linalg.svd(as_matrix(weight), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]
