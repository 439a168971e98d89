import copy
import pickle
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from slimnets.distillation import DistillationModule, logit_regression, soft_targets
from slimnets.lowrank.factorize import factorize
from tests.support import Classifier, assert_equal, small_data, small_network

# most fits here are without validation data, which the modules could use
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


def test_resume_is_exact_and_warns_of_another_teacher_or_settings(make_trainer, tmp_path) -> None:
    network, teacher, path = small_network(), small_network(), tmp_path / "first.ckpt"

    class SaveFirst(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(path)

    def module(other: nn.Module = teacher, **arguments: Any) -> DistillationModule:
        return DistillationModule(copy.deepcopy(network), copy.deepcopy(other), **arguments)

    straight, resumed = module(), module()
    make_trainer(max_epochs=2, callbacks=[SaveFirst()]).fit(straight, small_data())
    make_trainer(max_epochs=2).fit(resumed, small_data(), ckpt_path=path)

    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    for arguments, message in [
        ({"other": small_network()}, "teacher: not the one"),
        ({"alpha": 0.5}, "alpha=0.5: 0.9 in the checkpoint"),
        ({"temperature": 2.0}, "temperature=2.0: 4.0 in the checkpoint"),
        ({"loss": logit_regression}, "loss=logit_regression: soft_targets in the checkpoint"),
        (
            {"loss": partial(soft_targets, temperature=8)},
            r"loss=soft_targets\(temperature=8\): soft",
        ),
    ]:
        with pytest.warns(UserWarning, match=message):
            make_trainer(max_epochs=2).fit(module(**arguments), small_data(), ckpt_path=path)


def test_load_from_checkpoint_needs_the_networks_only(make_trainer, tmp_path) -> None:
    student, teacher = small_network(), small_network()
    module = DistillationModule(student, teacher, alpha=0.25, temperature=7.0)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, small_data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    loaded = DistillationModule.load_from_checkpoint(
        tmp_path / "last.ckpt", student=small_network(), teacher=teacher, weights_only=True
    )

    assert dict(loaded.hparams) == {"alpha": 0.25, "temperature": 7.0, "logits": None}
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    data = small_data()
    assert make_trainer().test(loaded, data, verbose=False) == make_trainer().test(
        DistillationModule(small_network(), teacher, alpha=0.25, temperature=7.0),
        data,
        ckpt_path=tmp_path / "last.ckpt",
        verbose=False,
    )
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'teacher'"):
        DistillationModule.load_from_checkpoint(tmp_path / "last.ckpt", student=student)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # not to average
@pytest.mark.parametrize("kind", ["nn.Module", "LightningModule"])
def test_the_structure_of_a_compressed_student_comes_from_the_checkpoint(
    make_trainer, tmp_path, kind
) -> None:
    teacher, data = small_network(), small_data()

    def fresh() -> nn.Module:
        return small_network() if kind == "nn.Module" else Classifier()

    module = DistillationModule(fresh(), teacher)
    factorize(module.compressed_network, 2)
    trainer = make_trainer(max_epochs=1, callbacks=[WeightAveraging()])
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    expected = trainer.test(module, data, verbose=False)

    loaded = DistillationModule.load_from_checkpoint(
        tmp_path / "last.ckpt", student=fresh(), teacher=teacher
    )
    assert loaded.state_dict().keys() == module.state_dict().keys()
    assert make_trainer().test(loaded, data, verbose=False) == expected
    other = DistillationModule(fresh(), teacher)
    path = tmp_path / "last.ckpt"
    assert make_trainer().test(other, data, ckpt_path=path, verbose=False) == expected
    resumed = DistillationModule(fresh(), teacher)
    averaging = WeightAveraging()
    make_trainer(max_epochs=2, callbacks=[averaging]).fit(resumed, data, ckpt_path=path)
    assert averaging._average_model.module.state_dict().keys() == module.state_dict().keys()


def test_hyper_parameters_of_a_student_are_kept(make_trainer, tmp_path) -> None:
    class Student(Classifier):
        def __init__(self, lr: float, width: int) -> None:
            super().__init__(lr=lr)
            self.save_hyperparameters()

    teacher = small_network()
    module = DistillationModule(Student(0.1, width=3), teacher, alpha=0.5)
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(max_epochs=1, logger=logger)
    trainer.fit(module, small_data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    assert module.student.hparams == {"lr": 0.1, "width": 3}
    logged = {k: v for k, v in logger.experiment.hparams.items() if k.startswith("student")}
    assert logged == {"student": {"lr": 0.1, "width": 3}}
    loaded = DistillationModule.load_from_checkpoint(
        tmp_path / "last.ckpt", student=Student(0.1, 3), teacher=teacher
    )
    assert loaded.hparams.student == {"lr": 0.1, "width": 3}
    # not where LightningCLI would take them for the student
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["student_hyper_parameters"] == {"lr": 0.1, "width": 3}
    assert "student" not in kept["hyper_parameters"]
    with pytest.raises(TypeError, match="'student'"):
        DistillationModule.load_from_checkpoint(tmp_path / "last.ckpt", teacher=teacher)


def test_copies_share_the_teacher_and_pickles_hold_it(make_trainer, tmp_path) -> None:
    module = DistillationModule(Classifier(), small_network(), alpha=0.5)
    twin = copy.deepcopy(module)

    assert twin.teacher is module.teacher
    assert twin.student is not module.student
    make_trainer(max_epochs=1).fit(twin, small_data())
    assert not torch.equal(twin.student.network[0].weight, module.student.network[0].weight)
    torch.save(twin, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded.eval()(x), twin.eval()(x))
    assert torch.equal(loaded.teacher(x), module.teacher(x))
    pickle.dumps(twin.student)  # nothing was left on it


@pytest.mark.parametrize("kind", ["nn.Module", "LightningModule"])
@pytest.mark.parametrize(
    "averaging", [WeightAveraging, EMAWeightAveraging, partial(StochasticWeightAveraging, 0.1, 1)]
)
def test_averaged_weights_are_of_the_student_alone(make_trainer, kind, averaging) -> None:
    student = small_network() if kind == "nn.Module" else Classifier()
    teacher = small_network()
    before = copy.deepcopy(teacher.state_dict())
    callback = averaging()
    make_trainer(max_epochs=3, callbacks=[callback]).fit(
        DistillationModule(student, teacher), small_data(), small_data()
    )

    average = callback._average_model
    module = getattr(average, "module", average)
    assert module.teacher is teacher
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"student"}
    assert_equal(teacher, before)
