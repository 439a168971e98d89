import copy
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from slimnets.distillation import DistillationModule, logit_regression
from tests.distillation.students import (
    SGD,
)
from tests.support import Classifier, assert_equal, small_data, small_network

# most fits here are without validation data, which the modules could use
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": 1.5}, ValueError, r"alpha=1.5: .* in \[0, 1\]"),
        ({"alpha": True}, TypeError, "alpha=True"),
        ({"alpha": "0.5"}, TypeError, "alpha='0.5'"),
        ({"alpha": math.nan}, ValueError, "alpha=nan"),
        ({"temperature": 0}, ValueError, "temperature=0: .* above 0"),
        ({"loss": "soft_targets"}, TypeError, "loss='soft_targets': expected a function"),
        ({"loss": logit_regression, "temperature": 2.0}, ValueError, "temperature=2.0: is of"),
        ({"loss": nn.Bilinear(4, 4, 1)}, ValueError, "loss=Bilinear: has parameters"),
        ({"logits": "network"}, ValueError, "logits='network': is for a LightningModule"),
        ({"optimizer": "adam"}, TypeError, "optimizer=str: expected a function"),
        ({"student": 3}, TypeError, "student=3: expected an nn.Module"),
        ({"teacher": {"a": 1}}, TypeError, r"teacher={'a': 1}: expected an nn.Module"),
        ({"teacher": nn.ModuleDict({"net": nn.ReLU()})}, TypeError, r"no forward.*'net'"),
        ({"student": torch.compile(Classifier())}, TypeError, "a compiled LightningModule"),
        ({"student": Classifier(), "optimizer": SGD}, ValueError, "Classifier.configure_opt"),
        ({"student": Classifier(), "logits": "net"}, ValueError, "no such submodule.*'network'"),
        ({"teacher_weights": "missing.pt"}, FileNotFoundError, "missing.pt"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(arguments, error, message) -> None:
    teacher = small_network()
    arguments = {"student": small_network(), "teacher": teacher, **arguments}

    with pytest.raises(error, match=message):
        DistillationModule(**arguments)

    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_an_optimizer_instead_of_a_factory_is_refused() -> None:
    student = small_network()
    with pytest.raises(TypeError, match=r"optimizer=SGD: expected a function of the parameters"):
        DistillationModule(student, small_network(), optimizer=SGD(student.parameters()))


def test_shared_parameters_are_refused() -> None:
    teacher = small_network()
    student = nn.Sequential(teacher[:6], nn.Linear(256, 4))

    with pytest.raises(ValueError, match=r"'0.weight' is also the student's '0.0.weight'"):
        DistillationModule(student, teacher)
    with pytest.raises(ValueError, match="deepcopy"):
        DistillationModule(teacher, teacher)


def test_a_shared_module_with_a_mode_is_refused() -> None:
    dropout = nn.Dropout(0.5)
    student, teacher = (nn.Sequential(nn.Linear(8, 4), dropout, nn.ReLU()) for _ in range(2))
    with pytest.raises(ValueError, match=r"its module '1' is also the student's '1', .*deepcopy"):
        DistillationModule(student, teacher)
    student[1], teacher[2] = nn.Dropout(0.5), student[2]  # which has none
    DistillationModule(student, teacher)


def test_modules_of_pytorch_lightning_can_teach_but_not_learn(make_trainer) -> None:
    pytorch_lightning = pytest.importorskip("pytorch_lightning")

    class Other(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = small_network()

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x)

    with pytest.raises(TypeError, match=r"student=Other: .* pytorch_lightning; import"):
        DistillationModule(Other(), small_network())
    make_trainer(max_epochs=1).fit(DistillationModule(small_network(), Other()), small_data())


def batches(first: Any, second: Any) -> DataLoader[Any]:
    return DataLoader([(first, second)] * 4, batch_size=2)


@pytest.mark.parametrize(
    ("student", "teacher", "data", "error", "message"),
    [
        (
            nn.Linear(3, 4),
            nn.Linear(3, 5),
            batches(torch.ones(3), 1),
            ValueError,
            r"the student's logits have shape (2, 4), the teacher's (2, 5)",
        ),
        (
            nn.Linear(3, 4),
            nn.LSTM(3, 4),
            batches(torch.ones(3), 1),
            TypeError,
            "the teacher returned tuple",
        ),
        (
            nn.Linear(3, 4),
            nn.Linear(3, 4),
            DataLoader([{"x": torch.ones(3)}]),
            TypeError,
            "batch: a dict; a student that is a plain nn.Module needs batches of (input, target)",
        ),
        (
            nn.Linear(3, 4),
            nn.Linear(3, 4),
            DataLoader([(torch.ones(3), 1, 2)]),
            TypeError,
            "batch: a list of 3",
        ),
        (
            nn.Linear(3, 4),
            nn.Linear(3, 4),
            batches(torch.ones(3), torch.ones(2)),
            ValueError,
            "target: (2, 2) of torch.float32, for logits of shape (2, 4)",
        ),
        (
            nn.LSTM(3, 4),
            nn.Linear(3, 4),
            batches(torch.ones(3), 1),
            TypeError,
            "the student returned tuple",
        ),
    ],
)
def test_what_needs_a_batch_is_refused_before_the_first_step(
    make_trainer, student, teacher, data, error, message
) -> None:
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(error, match=re.escape(message)):
        make_trainer(max_epochs=1).fit(DistillationModule(student, teacher), data)

    assert_equal(student, before)
    assert not student._forward_hooks


@pytest.mark.parametrize("loss", [lambda s, t: (s - t) ** 2, lambda s, t: 1.0])
def test_a_loss_that_is_no_scalar_is_refused(make_trainer, loss) -> None:
    module = DistillationModule(small_network(), small_network(), loss=loss)
    with pytest.raises(TypeError, match=r"loss=.*lambda.*: returned .*, expected a tensor of one"):
        make_trainer(max_epochs=1).fit(module, small_data())


def test_numbers_of_numpy_are_kept_as_those_that_a_checkpoint_may_hold() -> None:
    module = DistillationModule(
        nn.Linear(2, 2), nn.Linear(2, 2), alpha=np.float64(0.5), temperature=np.float64(2)
    )
    kept = (module.hparams["alpha"], module.hparams["temperature"], *module._settings().values())
    assert not any(isinstance(value, np.generic) for value in kept)
