"""How large, how accurate and how fast a trained network is."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from cifar10 import Classifier
from data import CIFAR10, crop_and_flip
from networks import NETWORKS
from runs import REFERENCE, Run
from settings import BATCHES, Settings
from shared import machine
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import slimnets

FORMS: dict[str, dict[str, Any]] = {  # arguments of slimnets.save
    "float32": {},
    "int8": {"dtype": torch.int8},
    "int6": {"dtype": torch.int8, "bits": 6},
}


def measured(
    run: Run, network: nn.Module, file: Path, data: CIFAR10, settings: Settings
) -> dict[str, Any]:
    """Sizes, and the accuracy of each form of the file."""
    image = torch.randn(1, 3, 32, 32)
    tester = L.Trainer(
        accelerator=settings.device,
        devices=1,
        limit_val_batches=settings.batches,
        logger=False,
        enable_progress_bar=settings.processes == 1,
        enable_model_summary=False,
    )
    device, files = tester.strategy.root_device, {}
    for form, arguments in FORMS.items():
        stored = file_of(file, form)
        if arguments:
            slimnets.save(network, stored, **arguments)
        loaded = slimnets.load(stored, NETWORKS[run.network]()).eval()
        if "bits" in arguments:  # so few that the means and variances of batch norm change
            torch.manual_seed(0)
            update_bn(_augmented(data), loaded.to(device), device)
            slimnets.save(loaded.cpu(), stored, **arguments)
        if device.type == "cpu":
            loaded = slimnets.accelerate(loaded, image)
        (found,) = tester.validate(Classifier(loaded), data, verbose=False)
        files[form] = {"bytes": stored.stat().st_size, "accuracy": accuracy(found)}
    total = slimnets.summarize(network, image).total
    return {
        "files": files,
        "dense_bytes": dense_bytes(),
        "weights": total.weights,
        "nonzeros": total.nonzeros,
        "macs": total.macs,
        "effective_macs": total.effective_macs,
    }


def file_of(path: Path, form: str) -> Path:
    """The network of a run in one of the forms, beside its JSON."""
    return path.with_suffix(f".{form}.safetensors" if FORMS[form] else ".safetensors")


def _augmented(data: CIFAR10) -> Iterator[Tensor]:
    """Batches of 10,000 training images (batch, 3, 32, 32)."""
    batches = islice(data.train_dataloader(), 10_000 // data.batch_size)
    return (data.normalize(crop_and_flip(images)) for images, _ in batches)


@cache
def dense_bytes() -> int:
    """Those of the reference's file of ``torch.save``, in which its name stands many times."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dense.pt"
        torch.save(NETWORKS[REFERENCE.network]().state_dict(), file)
        return file.stat().st_size


def add_speed(run: Run, seed: int, settings: Settings, again: bool = False) -> None:
    """Add to the JSON how many times as fast as the dense network that of the smallest file is.

    Both on one thread, the dense one in eager PyTorch, by batch size; what is there is kept unless
    it is measured ``again``.
    """
    path = settings.path(run, seed)
    figures = json.loads(path.read_text())
    if "speed" in figures and not again:
        return
    files = figures["files"]
    smallest = min(files, key=lambda form: files[form]["bytes"])
    network = slimnets.load(file_of(path, smallest), NETWORKS[run.network]()).eval()
    dense = NETWORKS[REFERENCE.network]().eval()
    threads, found = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    for batch in BATCHES:
        images = torch.randn(batch, 3, 32, 32)
        fast = slimnets.accelerate(network, images)
        timed = slimnets.summarize(fast, images, baseline=dense)
        assert timed.latency and timed.speedup and timed.baseline and timed.baseline.latency
        found[str(batch)] = {
            "times_as_fast": asdict(timed.speedup),
            "seconds": asdict(timed.latency),
            "dense_seconds": asdict(timed.baseline.latency),
        }
    torch.set_num_threads(threads)
    write(path, {**figures, "speed": {**found, "machine": machine()}})


def accuracy(metrics: Mapping[str, Any]) -> float:
    """Of the student, or of the only network, in [0, 1]."""
    names = ("val/student_accuracy", "val/accuracy")
    return float(next(metrics[name] for name in names if name in metrics))


def write(path: Path, figures: dict[str, Any]) -> None:
    """Write JSON, all of it or nothing, whatever other processes write there."""
    written = path.with_suffix(f".{os.getpid()}.partial")
    written.write_text(json.dumps(figures, indent=1) + "\n")
    written.rename(path)
