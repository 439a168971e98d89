"""A DistillationModule from the YAML of LightningCLI."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import load_file, save_file

from slimnets.distillation import DistillationModule
from tests.distillation.students import Images, Perceptron, Student, half_the_distance

# the data here has no validation part
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file(Perceptron(32).state_dict(), tmp_path / "teacher.safetensors")
    return tmp_path / "teacher.safetensors"


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any]) -> LightningCLI:
    monkeypatch.setattr(sys, "argv", ["train"])
    trainer = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "devices": 1}
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer |= {"default_root_dir": str(tmp_path), "enable_checkpointing": False}
    config = {"seed_everything": 1, "trainer": trainer, "model": model}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return LightningCLI(
        DistillationModule,
        Images,
        args=["fit", "--config", str(tmp_path / "config.yaml")],
        save_config_callback=None,
    )


def network(hidden: int) -> dict[str, Any]:
    return {
        "class_path": "tests.distillation.students.Perceptron",
        "init_args": {"hidden": hidden},
    }


def test_a_plain_student(tmp_path, monkeypatch, weights) -> None:
    cli = run(
        tmp_path,
        monkeypatch,
        {
            "student": network(8),
            "teacher": network(32),
            "teacher_weights": str(weights),
            "alpha": 0.5,
            "temperature": 2,
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.25}},
        },
    )

    for name, tensor in load_file(weights).items():
        assert torch.equal(tensor, cli.model.teacher.state_dict()[name]), name
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.25
    assert cli.trainer.global_step == 4
    assert dict(cli.model.hparams) == {"alpha": 0.5, "temperature": 2, "logits": None}


def test_a_lightning_module_and_a_loss_of_ones_own(tmp_path, monkeypatch, weights) -> None:
    cli = run(
        tmp_path,
        monkeypatch,
        {
            "student": {
                "class_path": "tests.distillation.students.Student",
                "init_args": {"hidden": 4, "lr": 0.125},
            },
            "teacher": network(32),
            "teacher_weights": str(weights),
            "loss": "tests.distillation.students.half_the_distance",
            "logits": "network",
        },
    )

    assert isinstance(cli.model.student, Student)
    assert cli.model._loss is half_the_distance
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.125
    assert cli.model.student.hparams == {"hidden": 4, "lr": 0.125}
    cli.trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = DistillationModule.load_from_checkpoint(
        tmp_path / "last.ckpt",
        student=Student(4),
        teacher=cli.model.teacher,
        loss=half_the_distance,
        weights_only=True,
    )
    for name, tensor in cli.model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_the_optimizer_of_the_command_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.warns(UserWarning, match="configure_optimizers` will be overridden"):
        cli = LightningCLI(
            DistillationModule,
            Images,
            run=False,
            save_config_callback=None,
            args=[
                "--model.student=tests.distillation.students.Perceptron",
                "--model.student.hidden=3",
                "--model.teacher=tests.distillation.students.Perceptron",
                "--model.teacher.hidden=5",
                "--optimizer=SGD",
                "--optimizer.lr=0.5",
            ],
        )

    assert isinstance(cli.model, L.LightningModule)
    optimizer = cli.model.configure_optimizers()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in cli.model.student.parameters()}
