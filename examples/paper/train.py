"""Train one run, and write its network and the JSON of what came out."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from answers import AnsweredCIFAR10
from cifar10 import Classifier, sgd
from data import CIFAR10
from lightning.pytorch.callbacks import ModelCheckpoint
from measure import accuracy, measured, write
from networks import NETWORKS, PAPER_RANKS
from provenance import recorded, unlike
from runs import DISTILLATION, KEPT, REFERENCE, TAPERED, Run
from settings import Settings
from shared import machine
from torch import Tensor, nn

import slimnets
from slimnets import DistillationModule, ExactResume, GradualPrune, LowRank
from slimnets.distillation.teacher import load_weights
from slimnets.pruning import lamp
from slimnets.resume import last_checkpoint


@dataclass
class History(L.Callback):
    """The accuracy after every epoch."""

    accuracies: list[float] = field(default_factory=list)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note it."""
        if not trainer.sanity_checking:
            self.accuracies.append(accuracy(trainer.callback_metrics))

    def state_dict(self) -> dict[str, Any]:
        """For a run that is interrupted."""
        return {"accuracies": self.accuracies}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on."""
        self.accuracies = state_dict["accuracies"]


class Ensemble(nn.ModuleList):
    """Answers with the mean of its networks' logits."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        return torch.stack([network(images) for network in self]).mean(0)


def result(run: Run, seed: int, settings: Settings) -> dict[str, Any]:
    """What the run gave; it is trained unless its JSON is there.

    Raises:
        ValueError: If what is there was measured on other images, or trained in another way.
    """
    path = settings.path(run, seed)
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        if others := unlike(run, settings, found["settings"]):
            raise ValueError(f"{path} was made with {', '.join(others)}; give another folder")
        return found
    settings.folder.mkdir(parents=True, exist_ok=True)
    start = time.time()
    network, history = train(run, seed, settings)
    slimnets.save(network, path.with_suffix(".safetensors"))
    before = result(run.of, seed_of(run.of, seed), settings)["epochs"] if run.of else 0
    figures = {
        "run": run.name,
        "configuration": asdict(run),
        "seed": seed,
        "epochs": before + settings.epochs_of(run),  # all that its weights have seen
        "learning_rate": settings.learning_rate_of(run),
        "distillation": DISTILLATION if run.distilled else None,
        "settings": recorded(settings),
        "accuracies": history,
        **measured(run, network, path.with_suffix(".safetensors"), set_up(settings), settings),
        "seconds": time.time() - start,
        "machine": machine("lightning"),
    }
    write(path, figures)
    shutil.rmtree(_checkpoints(run, seed, settings), ignore_errors=True)
    return figures


def seed_of(run: Run, seed: int) -> int:
    """The reference is the same for all seeds."""
    return 0 if run == REFERENCE else seed


def trained(run: Run, seed: int, settings: Settings) -> nn.Module:
    """The network of a run."""
    seed = seed_of(run, seed)
    result(run, seed, settings)
    return slimnets.load(
        settings.path(run, seed).with_suffix(".safetensors"), NETWORKS[run.network]()
    )


def train(run: Run, seed: int, settings: Settings) -> tuple[nn.Module, list[float]]:
    """The network, and its accuracy after every epoch; goes on where it was interrupted."""
    if run == REFERENCE and settings.reference:
        network = NETWORKS[run.network]()
        load_weights(network, settings.reference)
        return network, []
    teachers = [trained(one, seed, settings) for one in run.teachers]
    begun = trained(run.of, seed, settings) if run.of else None
    L.seed_everything(seed, verbose=False)
    network = NETWORKS[run.network]() if begun is None else begun
    network.to(memory_format=torch.channels_last)  # faster on CPUs, and no slower on GPUs
    data = _data(settings, teachers)
    epochs = settings.epochs_of(run)
    limit = settings.batches or epochs / math.ceil(epochs)
    steps = settings.batches or int(limit * len(data.train_dataloader()))
    largest = settings.learning_rate_of(run)
    assert largest is not None  # a file of weights is not trained
    optimizer = one_cycle(largest, math.ceil(epochs) * steps)
    module: L.LightningModule = Classifier(network, optimizer)
    if teachers:
        asked = data.teacher if isinstance(data, AnsweredCIFAR10) else Ensemble(teachers)
        module = DistillationModule(network, asked, optimizer=optimizer, **DISTILLATION)

    history, checkpoints = History(), _checkpoints(run, seed, settings)
    trainer = L.Trainer(
        max_epochs=math.ceil(epochs),
        limit_train_batches=limit,
        callbacks=[
            *methods(run, "" if teachers else "network."),
            history,
            ExactResume(),
            ModelCheckpoint(checkpoints, filename="{epoch}", every_n_epochs=math.ceil(epochs / 10)),
        ],
        **_trainer_settings(settings),
    )
    trainer.fit(module, data, ckpt_path=last_checkpoint(checkpoints), weights_only=True)
    return module.network if isinstance(module, Classifier) else module.student, history.accuracies


def one_cycle(learning_rate: float, steps: int) -> Callable[..., dict[str, Any]]:
    """The paper's optimizer, up to ``learning_rate`` and down to zero (arXiv 1708.07120)."""

    def make(parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
        optimizer = sgd(parameters, learning_rate)
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, learning_rate, steps, pct_start=0.15, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    return make


def methods(run: Run, prefix: str = "") -> list[L.Callback]:
    """The callbacks of a run on a module that keeps its network under ``prefix``."""
    found: list[L.Callback] = []
    kept = [prefix + name for name in KEPT.get(run.network, ())]
    if run.sparsity:
        sparsity: Any = run.sparsity
        if isinstance(run.sparsity, str):
            shares = TAPERED[run.sparsity][run.network]
            sparsity = {prefix + name: share for name, share in shares.items()}
        at_once = {"begin": 0, "end": 0, "every": 1}
        span: Any = {} if run.gradual else at_once
        chosen: Any = {"scope": run.scope}
        if run.scope == "lamp":
            chosen = {"scope": "global", "criterion": lamp}
        found.append(GradualPrune(sparsity, exclude=kept, **chosen, **span))
    if run.rank or run.budget:
        ranks: Any = run.rank
        if run.rank == "paper":
            ranks = {prefix + name: rank for name, rank in PAPER_RANKS.items()}
        how: Any = {"decomposition": run.decomposition, "exclude": kept}
        found.append(LowRank(ranks, budget=run.budget, **how))
    return found


def _checkpoints(run: Run, seed: int, settings: Settings) -> Path:
    wanted = hashlib.sha256(json.dumps(recorded(settings), sort_keys=True).encode())
    name = f"{settings.path(run, seed).stem}-{wanted.hexdigest()[:8]}"
    return settings.folder / "checkpoints" / name


def _data(settings: Settings, teachers: Sequence[nn.Module]) -> CIFAR10:
    if not (settings.answers and teachers):
        return set_up(settings)
    data = AnsweredCIFAR10(settings.folder / "answers", settings.answers, **_given(settings))
    _validate_on(data, settings)
    data.ask(teachers)
    return data


def set_up(settings: Settings) -> CIFAR10:
    """The images, validated on the test images unless others are held out."""
    return _validate_on(CIFAR10(**_given(settings)), settings)


def _given(settings: Settings) -> dict[str, Any]:
    names = ("data_dir", "batch_size", "held_out")
    return {name: getattr(settings, name) for name in names}


def _validate_on(data: CIFAR10, settings: Settings) -> CIFAR10:
    data.prepare_data()
    data.setup("fit")
    if not settings.held_out:
        data.validation = data.test
    return data


def _trainer_settings(settings: Settings) -> dict[str, Any]:
    return {
        "accelerator": settings.device,
        "devices": 1,
        "precision": settings.precision,
        "limit_val_batches": settings.batches,
        "logger": False,
        "enable_progress_bar": settings.processes == 1,
        "enable_model_summary": False,
    }
