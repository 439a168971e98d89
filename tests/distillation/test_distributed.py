"""Distillation under DDP, in two real processes."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from slimnets.distillation import DistillationModule
from tests.support import Classifier, small_data, small_network

ROOT = Path(__file__).parents[2]


class Manual(Classifier):
    """Manual optimization, of logits that a submodule computes."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.network(batch[0]), batch[1]))
        optimizer.step()


def make_module(kind: str) -> DistillationModule:
    L.seed_everything(0, verbose=False)
    network, teacher = small_network(norm=False), small_network()
    if kind == "nn.Module":
        optimizer = partial(torch.optim.SGD, lr=0.1)
        return DistillationModule(network, teacher, alpha=0.5, optimizer=optimizer)
    return DistillationModule(Manual(network, lr=0.1), teacher, alpha=0.5, logits="network")


def train_one_rank(folder: Path, kind: str) -> None:
    """What each process runs."""
    torch.set_num_threads(1)
    module = make_module(kind)
    dataset = small_data().dataset
    turns = DistributedSampler(dataset, 2, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    loader = DataLoader(dataset, batch_size=4, sampler=turns)
    trainer.fit(module, loader, loader)
    state = {"weights": module.state_dict(), "metrics": dict(trainer.callback_metrics)}
    torch.save(state, folder / f"{trainer.global_rank}.pt")
    # Lightning leaves it to the end of the process, which its threads may abort
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["nn.Module", "manual"])
def test_two_processes_train_as_one_with_the_whole_batch(tmp_path, make_trainer, kind) -> None:
    call = f"from {__name__} import *; train_one_rank(Path({str(tmp_path)!r}), {kind!r})"
    script = tmp_path / "script.py"
    script.write_text(call)
    subprocess.run(
        [sys.executable, str(script)],
        check=True,
        timeout=800,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]

    module = make_module(kind)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, small_data(batch_size=8), small_data(batch_size=8))

    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(ranks[0]["weights"][name], tensor)
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
    for rank in ranks:
        for name in ("val/distillation_loss", "val/agreement", "val/student_accuracy"):
            torch.testing.assert_close(
                rank["metrics"][name], trainer.callback_metrics[name], rtol=1e-4, atol=1e-5
            )
