"""Train one run, measure what came out, and write its JSON and its network."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from answers import AnsweredCIFAR10
from cifar10 import Classifier, sgd
from data import CIFAR10
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import NETWORKS, PAPER_RANKS
from runs import KEPT, REFERENCE, Run
from settings import Settings
from shared import machine
from torch import nn

import slimnets
from slimnets import DistillationModule, ExactResume, GradualPrune, LowRank
from slimnets.distillation.teacher import load_weights
from slimnets.resume import last_checkpoint

FORMS: dict[str, torch.dtype | None] = {
    "float32": None,
    "float16": torch.float16,
    "int8": torch.int8,
}


@dataclass
class History(L.Callback):
    """The accuracy after every epoch."""

    accuracies: list[float] = field(default_factory=list)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note it."""
        if not trainer.sanity_checking:
            self.accuracies.append(_accuracy(trainer.callback_metrics))

    def state_dict(self) -> dict[str, Any]:
        """For a run that is interrupted."""
        return {"accuracies": self.accuracies}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on."""
        self.accuracies = state_dict["accuracies"]


def result(run: Run, seed: int, settings: Settings) -> dict[str, Any]:
    """What the run gave; it is trained unless its JSON is there.

    Raises:
        ValueError: If what is there was measured on other images, or trained in another way.
    """
    path = settings.path(run, seed)
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        for key in ("held_out", "learning_rate", "batches"):
            before, now = found["settings"][key], settings.recorded[key]
            if before != now:
                raise ValueError(
                    f"{path} was made with {key}={before}, now it is {now}; give another folder"
                )
        return found
    settings.folder.mkdir(parents=True, exist_ok=True)
    start = time.time()
    network, history = train(run, seed, settings)
    slimnets.save(network, path.with_suffix(".safetensors"))
    before = result(run.of, seed_of(run.of, seed), settings)["epochs"] if run.of else 0
    figures = {
        "run": run.name,
        "seed": seed,
        "epochs": before + settings.epochs_of(run),  # all that its weights have seen
        "learning_rate": settings.learning_rate_of(run),
        "settings": settings.recorded,
        "accuracies": history,
        **measured(run, network, path.with_suffix(".safetensors"), settings),
        "seconds": time.time() - start,
        "machine": machine("lightning"),
    }
    _write(path, figures)
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
    teacher = trained(REFERENCE, seed, settings) if run.distilled else None
    begun = trained(run.of, seed, settings) if run.of else None
    L.seed_everything(seed, verbose=False)
    network = NETWORKS[run.network]() if begun is None else begun
    network.to(memory_format=torch.channels_last)  # faster on CPUs, and no slower on GPUs
    data = _data(settings, teacher)
    epochs = settings.epochs_of(run)
    limit = settings.batches or epochs / math.ceil(epochs)
    steps = settings.batches or int(limit * len(data.train_dataloader()))
    optimizer = one_cycle(settings.learning_rate_of(run), math.ceil(epochs) * steps)
    module: L.LightningModule = Classifier(network, optimizer)
    if teacher is not None:
        asked = data.teacher if isinstance(data, AnsweredCIFAR10) else teacher
        module = DistillationModule(network, asked, optimizer=optimizer)

    history, checkpoints = History(), _checkpoints(run, seed, settings)
    trainer = L.Trainer(
        max_epochs=math.ceil(epochs),
        limit_train_batches=limit,
        callbacks=[
            *methods(run, "" if teacher is not None else "network."),
            history,
            ExactResume(),
            ModelCheckpoint(checkpoints, filename="{epoch}"),
        ],
        **_trainer_settings(settings),
    )
    trainer.fit(module, data, ckpt_path=last_checkpoint(checkpoints), weights_only=True)
    return module.network if isinstance(module, Classifier) else module.student, history.accuracies


def one_cycle(learning_rate: float, steps: int) -> Callable[..., dict[str, Any]]:
    """The paper's optimizer, up to ``learning_rate`` and down to zero (arXiv 1708.07120)."""

    def make(parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
        optimizer = torch.optim.SGD(
            parameters, learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
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
        at_once = {"begin": 0, "end": 0, "every": 1}
        found.append(GradualPrune(run.sparsity, exclude=kept, **({} if run.gradual else at_once)))  # type: ignore[arg-type]
    if run.rank:
        ranks: Any = run.rank
        if run.rank == "paper":
            ranks = {prefix + name: rank for name, rank in PAPER_RANKS.items()}
        found.append(LowRank(ranks, decomposition=run.decomposition, exclude=kept))
    return found


def measured(run: Run, network: nn.Module, file: Path, settings: Settings) -> dict[str, Any]:
    """Sizes, and the accuracy of each form of the file."""
    data, image = _data(settings), torch.randn(1, 3, 32, 32)
    tester = L.Trainer(**_trainer_settings(settings))
    files = {}
    for form, dtype in FORMS.items():
        stored = file if dtype is None else file.with_suffix(f".{form}.safetensors")
        if dtype is not None:
            slimnets.save(network, stored, dtype=dtype)
        loaded = slimnets.load(stored, NETWORKS[run.network]()).eval()
        if settings.device == "cpu":
            loaded = slimnets.accelerate(loaded, image)
        (found,) = tester.validate(Classifier(loaded, sgd(0.1, 1)), data, verbose=False)
        files[form] = {"bytes": stored.stat().st_size, "accuracy": _accuracy(found)}
    total = slimnets.summarize(network, image).total
    pickled = file.with_suffix(".pt")
    torch.save(NETWORKS[REFERENCE.network]().state_dict(), pickled)
    dense_bytes = pickled.stat().st_size
    pickled.unlink()
    return {
        "files": files,
        "dense_bytes": dense_bytes,
        "weights": total.weights,
        "nonzeros": total.nonzeros,
        "macs": total.macs,
        "effective_macs": total.effective_macs,
    }


def add_speed(run: Run, seed: int, settings: Settings, again: bool = False) -> None:
    """Add to the JSON how many times as fast as the dense network that of the int8 file is.

    Both on one thread, the dense one in eager PyTorch, by batch size; what is there is kept unless
    it is measured ``again``.
    """
    path = settings.path(run, seed)
    figures = json.loads(path.read_text())
    if "speed" in figures and not again:
        return
    network = slimnets.load(path.with_suffix(".int8.safetensors"), NETWORKS[run.network]()).eval()
    dense = NETWORKS[REFERENCE.network]().eval()
    threads, found = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    for batch in (1, 64):
        images = torch.randn(batch, 3, 32, 32)
        fast = slimnets.accelerate(network, images)
        timed = slimnets.summarize(fast, images, baseline=dense)
        found[str(batch)] = timed.ratios["latency"]
    torch.set_num_threads(threads)
    _write(path, {**figures, "speed": found})


def _write(path: Path, figures: dict[str, Any]) -> None:
    written = path.with_suffix(".partial")
    written.write_text(json.dumps(figures, indent=1) + "\n")
    written.rename(path)


def _checkpoints(run: Run, seed: int, settings: Settings) -> Path:
    epochs = f"{settings.epochs_of(run):g}epochs"  # a cycle of another length cannot go on from it
    return settings.folder / "checkpoints" / f"{settings.path(run, seed).stem}-{epochs}"


def _data(settings: Settings, teacher: nn.Module | None = None) -> CIFAR10:
    given: dict[str, Any] = {
        "data_dir": settings.data_dir,
        "batch_size": settings.batch_size,
        "held_out": settings.held_out,
    }
    if settings.answers and teacher is not None:
        answered = AnsweredCIFAR10(settings.folder / "answers", settings.answers, **given)
        _set_up(answered, settings)
        answered.ask(teacher)
        return answered
    return _set_up(CIFAR10(**given), settings)


def _set_up(data: CIFAR10, settings: Settings) -> CIFAR10:
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
        "enable_model_summary": False,
    }


def _accuracy(metrics: Mapping[str, Any]) -> float:
    names = ("val/student_accuracy", "val/accuracy")
    return float(next(metrics[name] for name in names if name in metrics))
