"""Checkpoints of Lightning to files, without a Trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from slimnets.artifact.checkpoint import convert_checkpoint
from slimnets.artifact.codec import same_bits
from slimnets.artifact.container import inspect
from slimnets.artifact.file import load, save
from slimnets.artifact.streams import ArtifactError
from slimnets.distillation.module import DistillationModule
from slimnets.lowrank.callback import LowRank


class Lit(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        inputs, classes = batch
        return nn.functional.cross_entropy(self.net(inputs), classes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def checkpoint(
    tmp_path: Path, make_trainer: Callable[..., L.Trainer]
) -> Callable[..., tuple[Path, L.LightningModule]]:
    def make(module: L.LightningModule, **arguments: Any) -> tuple[Path, L.LightningModule]:
        data = TensorDataset(torch.randn(8, 4), torch.randint(3, (8,)))
        trainer = make_trainer(max_steps=3, **arguments)
        trainer.fit(module, DataLoader(data, batch_size=4))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt", module

    return make


def test_a_lightning_module(checkpoint: Any, tmp_path: Path) -> None:
    source, trained = checkpoint(Lit())
    convert_checkpoint(source, tmp_path / "net")
    loaded = load(tmp_path / "net", Lit())
    assert same_bits(loaded.net.weight, trained.net.weight)
    convert_checkpoint(source, tmp_path / "part", network="net")
    assert same_bits(load(tmp_path / "part", nn.Linear(4, 3)).weight, trained.net.weight)


def test_a_checkpoint_in_the_place_of_a_file_is_told_what_to_do(
    checkpoint: Any, tmp_path: Path
) -> None:
    source, trained = checkpoint(Lit(), callbacks=[LowRank(r=1)])
    for read in (inspect, lambda path: load(path, Lit())):
        with pytest.raises(ArtifactError, match=rf"call slimnets\.convert_checkpoint\('{source}'"):
            read(source)
    convert_checkpoint(source, tmp_path / "net")
    loaded = load(tmp_path / "net", Lit())
    assert loaded.net.rank == 1
    assert same_bits(loaded.net.weight, trained.net.weight)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_the_student_of_a_distillation(checkpoint: Any, tmp_path: Path) -> None:
    module = DistillationModule(student=nn.Linear(4, 3), teacher=nn.Linear(4, 3))
    source, trained = checkpoint(module)
    convert_checkpoint(source, tmp_path / "net")
    loaded = load(tmp_path / "net", nn.Linear(4, 3))
    assert same_bits(loaded.weight, trained.student.weight)


def test_a_module_of_ones_own_with_a_student(tmp_path: Path) -> None:
    convert_checkpoint({"state_dict": {"student.weight": torch.ones(2)}}, tmp_path / "net")
    assert set(inspect(tmp_path / "net").tensors) == {"student.weight"}


def test_averaged_weights_are_taken(checkpoint: Any, tmp_path: Path) -> None:
    source, _ = checkpoint(Lit(), callbacks=[WeightAveraging(avg_fn=lambda a, b, n: (a + b) / 2)])
    state = torch.load(source, weights_only=True)
    assert "current_model_state" in state
    convert_checkpoint(source, tmp_path / "net")
    assert same_bits(load(tmp_path / "net", Lit()).net.weight, state["state_dict"]["net.weight"])


def test_compiled_parts_are_seen_through(tmp_path: Path) -> None:
    state = {"student._orig_mod.weight": torch.ones(2)}
    convert_checkpoint({"state_dict": state, "distillation": {}}, tmp_path / "net")
    assert set(inspect(tmp_path / "net").tensors) == {"weight"}


def test_rounded_on_the_way(tmp_path: Path) -> None:
    state = {"weight": torch.randn(3, 3), "bias": torch.randn(3)}
    convert_checkpoint({"state_dict": state}, tmp_path / "net", dtype=torch.int8, bits=2)
    assert inspect(tmp_path / "net").inexact == {"weight": torch.int8}
    rounded = load(tmp_path / "net", nn.Linear(3, 3)).weight
    assert all(len(row.abs().unique()) <= 2 for row in rounded.detach())  # 0 and one step
    state = {"weight_orig": torch.randn(3, 3), "weight_mask": torch.eye(3)}
    convert_checkpoint({"state_dict": state}, tmp_path / "net", dtype=torch.int8)
    assert inspect(tmp_path / "net").inexact == {"weight_orig": torch.int8}


class Opaque:
    pass


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    source, target = tmp_path / "last.ckpt", tmp_path / "net"
    with pytest.raises(FileNotFoundError):
        convert_checkpoint(source, target)
    torch.save({"state_dict": {"w": torch.randn(500)}}, source)
    whole = source.read_bytes()
    for damaged in (b"", b"text", whole[:1000], whole[: len(whole) // 2]):
        source.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"last\.ckpt: cannot be read"):
            convert_checkpoint(source, target)
    save(nn.Linear(3, 3), source)
    with pytest.raises(ArtifactError, match=r"last\.ckpt: cannot be read as a checkpoint: "):
        convert_checkpoint(source, target)
    torch.save([1, 2], source)
    with pytest.raises(ArtifactError, match=r"last\.ckpt: not a checkpoint .* but a list"):
        convert_checkpoint(source, target)
    for empty in ({}, {"state_dict": None}, {"state_dict": {}}, {"state_dict": {1: 2}}):
        with pytest.raises(ArtifactError, match="no 'state_dict'"):
            convert_checkpoint(empty, target)
    assert not target.exists()


def test_nothing_is_executed_unless_one_asks_for_it(tmp_path: Path) -> None:
    source = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"w": torch.ones(2)}, "hyper_parameters": Opaque()}, source)
    with pytest.raises(ArtifactError, match=r"torch\.load\(.*last.*weights_only=False.*Opaque"):
        convert_checkpoint(source, tmp_path / "net")
    convert_checkpoint(torch.load(source, weights_only=False), tmp_path / "net")
    assert set(inspect(tmp_path / "net").tensors) == {"w"}


def test_a_submodule_that_is_not_there(tmp_path: Path) -> None:
    checkpoint = {"state_dict": {"net.weight": torch.ones(2), "head.bias": torch.ones(2)}}
    with pytest.raises(ValueError, match=r"network='student': the checkpoint has only head, net"):
        convert_checkpoint(checkpoint, tmp_path / "net", network="student")
