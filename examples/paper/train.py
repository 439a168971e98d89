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
from shared import machine
from torch import Tensor, nn

import slimnets
from slimnets import DistillationModule, ExactResume, GradualPrune, LowRank
from slimnets.distillation.teacher import load_weights
from slimnets.resume import last_checkpoint

FORMS: dict[str, torch.dtype | None] = {
    "float32": None,
    "float16": torch.float16,
    "int8": torch.int8,
}


@dataclass(frozen=True)
class Settings:
    """How everything is trained.

    Attributes:
        folder: Where JSON, networks and checkpoints go.
        data_dir: As in ``examples/cifar10.py``.
        epochs: Of each run but the reference; of 0.5, half the images are seen.
        reference_epochs: Of the reference.
        reference: A file of its weights, so that it is not trained.
        held_out: Training images to measure accuracy on; 0 for the test images.
        answers: Augmentations of each image whose answers by the reference are averaged, once; 0 to
            ask it at every step.
        batches: A limit for each epoch, for tests.
    """

    folder: Path
    data_dir: Path
    epochs: float = 30
    reference_epochs: int = 30
    reference: Path | None = None
    held_out: int = 0
    answers: int = 0
    batch_size: int = 128
    device: str = "auto"
    precision: str = "32-true"
    batches: int | None = None

    def epochs_of(self, run: Run) -> float:
        """The epochs of one run, without those of the run that it goes on with."""
        return self.reference_epochs if run == REFERENCE else self.epochs


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
    """What the run gave; it is trained unless its JSON is there."""
    path = settings.folder / f"{run.name}-seed{seed}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    settings.folder.mkdir(parents=True, exist_ok=True)
    start = time.time()
    network, history = train(run, seed, settings)
    slimnets.save(network, path.with_suffix(".safetensors"))
    figures = {
        "run": run.name,
        "seed": seed,
        "epochs": total_epochs(run, settings),
        "learning_rate": run.learning_rate,
        "batch_size": settings.batch_size,
        "precision": settings.precision,
        "answers": settings.answers if run.distilled else 0,
        "measured_on": f"{settings.held_out} held-out images" if settings.held_out else "test",
        "accuracies": history,
        **measured(run, network, path.with_suffix(".safetensors"), settings),
        "seconds": time.time() - start,
        "machine": machine("lightning"),
    }
    written = path.with_suffix(".partial")
    written.write_text(json.dumps(figures, indent=1) + "\n")
    written.rename(path)
    shutil.rmtree(settings.folder / "checkpoints" / path.stem, ignore_errors=True)
    return figures


def total_epochs(run: Run, settings: Settings) -> float:
    """All epochs that its weights have seen."""
    before = total_epochs(run.of, settings) if run.of else 0
    return before + settings.epochs_of(run)


def trained(run: Run, seed: int, settings: Settings) -> nn.Module:
    """The network of a run; the reference is the same for all seeds."""
    seed = 0 if run == REFERENCE else seed
    result(run, seed, settings)
    file = settings.folder / f"{run.name}-seed{seed}.safetensors"
    return slimnets.load(file, NETWORKS[run.network]())


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
    optimizer = one_cycle(run.learning_rate, math.ceil(epochs) * steps)
    module: L.LightningModule = Classifier(network, optimizer)
    if teacher is not None:
        asked = data.teacher if isinstance(data, AnsweredCIFAR10) else teacher
        module = DistillationModule(network, asked, optimizer=optimizer)

    history, checkpoints = History(), settings.folder / "checkpoints" / f"{run.name}-seed{seed}"
    trainer = L.Trainer(
        max_epochs=math.ceil(epochs),
        limit_train_batches=limit,
        callbacks=[
            *methods(run, "" if teacher is not None else "network."),
            history,
            ExactResume(),
            ModelCheckpoint(checkpoints, save_top_k=-1, every_n_epochs=5, filename="{epoch}"),
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
    if run.sparsity:
        at_once = {"begin": 0, "end": 0, "every": 1}
        kept = [prefix + name for name in KEPT.get(run.network, ())]
        found.append(GradualPrune(run.sparsity, exclude=kept, **({} if run.gradual else at_once)))  # type: ignore[arg-type]
    if run.rank:
        ranks: Any = run.rank
        if run.rank == "paper":
            ranks = {prefix + name: rank for name, rank in PAPER_RANKS.items()}
        found.append(LowRank(ranks, decomposition=run.decomposition))
    return found


def measured(run: Run, network: nn.Module, file: Path, settings: Settings) -> dict[str, Any]:
    """Sizes, the accuracy of each form of the file, and speed against the dense reference."""
    data, image = _data(settings), torch.randn(64, 3, 32, 32)
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
    total = slimnets.summarize(network, image[:1]).total
    dense = NETWORKS[REFERENCE.network]().eval()
    pickled = file.with_suffix(".pt")
    torch.save(dense.state_dict(), pickled)
    figures = {
        "files": files,
        "dense_bytes": pickled.stat().st_size,
        "weights": total.weights,
        "nonzeros": total.nonzeros,
        "macs": total.macs,
        "effective_macs": total.effective_macs,
        "speed": {} if settings.batches else speed(network, dense, image),
    }
    pickled.unlink()
    return figures


def speed(network: nn.Module, dense: nn.Module, images: Tensor) -> dict[str, float]:
    """Times as fast as ``dense`` in eager PyTorch, on one thread, by batch size."""
    threads, found = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    for batch in (1, len(images)):
        fast = slimnets.accelerate(network.cpu().eval(), images[:batch])
        found[str(batch)] = slimnets.summarize(fast, images[:batch], baseline=dense).ratios[
            "latency"
        ]
    torch.set_num_threads(threads)
    return found


def _data(settings: Settings, teacher: nn.Module | None = None) -> CIFAR10:
    given: dict[str, Any] = {
        "data_dir": settings.data_dir,
        "batch_size": settings.batch_size,
        "held_out": settings.held_out,
    }
    folder = settings.folder / "answers"
    remembers = settings.answers and teacher is not None
    data = AnsweredCIFAR10(folder, settings.answers, **given) if remembers else CIFAR10(**given)
    data.setup("fit")
    if not settings.held_out:
        data.validation = data.test
    if isinstance(data, AnsweredCIFAR10) and teacher is not None:
        data.ask(teacher)
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
