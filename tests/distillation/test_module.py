import copy
import math
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from slimnets.distillation import DistillationModule, logit_regression, soft_targets
from slimnets.layers import compressed_network
from tests.distillation.students import (
    SGD,
    Manual,
    assert_weights,
    first_batch,
    one_step,
)
from tests.support import Classifier, assert_equal, small_data, small_network

# most fits here are without validation data, which the modules could use
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


@pytest.mark.parametrize("kind", ["nn.Module", "automatic", "manual"])
@pytest.mark.parametrize(
    ("arguments", "distance"),
    [
        ({"temperature": 3.0}, partial(soft_targets, temperature=3.0)),
        ({"loss": logit_regression}, logit_regression),
        ({"loss": nn.MSELoss()}, F.mse_loss),
    ],
)
def test_one_formula_for_every_kind_of_student(make_trainer, kind, arguments, distance) -> None:
    network, teacher = small_network(norm=False), small_network()
    images, labels = first_batch()
    teacher.eval()
    logits = network(images)
    term = distance(logits, teacher(images).detach())
    loss = F.cross_entropy(logits, labels)
    expected = one_step(network, 0.7 * loss + 0.3 * term)

    if kind == "nn.Module":
        student: nn.Module = network
        arguments = {**arguments, "optimizer": SGD}
    else:
        student = {"automatic": Classifier, "manual": Manual}[kind](network, lr=0.1)
    module = DistillationModule(student, teacher, alpha=0.3, **arguments)
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, small_data())

    assert_weights(network, expected)
    logged = {name: value.item() for name, value in trainer.logged_metrics.items()}
    assert logged["train/student_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert logged["train/distillation_loss"] == pytest.approx(term.item(), rel=1e-5)


def test_accuracies_and_agreement_are_of_the_whole_epoch(make_trainer) -> None:
    student, teacher = small_network(), small_network()
    data = small_data(40, batch_size=16)  # the last batch is smaller
    module = DistillationModule(student, teacher, alpha=0.25, temperature=2.0)
    trainer = make_trainer()
    metrics = trainer.validate(module, data, verbose=False)[0]

    images, labels = data.dataset.tensors
    with torch.no_grad():
        ours, theirs = student.eval()(images), teacher(images)
    loss, term = F.cross_entropy(ours, labels).item(), soft_targets(ours, theirs, 2.0).item()
    expected = {
        "val/student_accuracy": (ours.argmax(1) == labels).float().mean().item(),
        "val/teacher_accuracy": (theirs.argmax(1) == labels).float().mean().item(),
        "val/agreement": (ours.argmax(1) == theirs.argmax(1)).float().mean().item(),
        "val/student_loss": loss,
        "val/distillation_loss": term,
        "val/loss": 0.75 * loss + 0.25 * term,
    }
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert set(trainer.test(module, data, verbose=False)[0]) == {
        name.replace("val", "test") for name in expected
    }


def test_a_student_learns_from_its_teacher_alone(make_trainer) -> None:
    """With alpha = 1 the labels do not matter."""
    teacher = small_network(norm=False)
    images = torch.randn(64, 3, 8, 8)
    labels = torch.randint(4, (64,))
    data = DataLoader(TensorDataset(images, labels), batch_size=16)
    student = small_network()
    module = DistillationModule(
        student, teacher, alpha=1.0, optimizer=partial(torch.optim.Adam, lr=0.01)
    )
    make_trainer(max_epochs=15).fit(module, data)

    agreement = (student.eval()(images).argmax(1) == teacher(images).argmax(1)).float().mean()
    assert agreement > 0.95


def test_the_teacher_is_left_as_it_was_and_out_of_everything(make_trainer, tmp_path) -> None:
    teacher = small_network(dropout=0.5)
    before = copy.deepcopy(teacher.state_dict())
    module = DistillationModule(small_network(), teacher)
    module.train()
    trainer = make_trainer(
        max_epochs=2,
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(tmp_path / "checkpoints", save_last=True)],
    )
    trainer.fit(module, small_data(), small_data())

    assert module.teacher is teacher
    assert not any(m.training for m in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert_equal(teacher, before)
    ours = {id(p) for p in teacher.parameters()}
    assert not ours & {id(p) for p in module.parameters()}
    assert not ours & {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    assert set(teacher.modules()).isdisjoint(module.modules())
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["state_dict"].keys() == {f"student.{k}" for k in module.student.state_dict()}
    numbers = sum(tensor.numel() for tensor in tensors_in(state))
    weights = sum(tensor.numel() for tensor in state["state_dict"].values())
    assert numbers <= 3 * weights + 100  # the student's, and AdamW's two moments


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [t for v in values for t in tensors_in(v)] if isinstance(value, dict | list) else []


def test_callbacks_compress_the_student() -> None:
    plain, classifier = small_network(), Classifier()

    for student in (plain, classifier):
        module = DistillationModule(student, small_network())
        assert compressed_network(module) is student
    compiled = torch.compile(plain)
    assert compressed_network(DistillationModule(compiled, small_network())) is plain


def test_gradient_accumulation_averages_the_weighted_sum(make_trainer) -> None:
    network, teacher = small_network(norm=False), small_network().eval()
    data = small_data(16, batch_size=8)
    total = torch.tensor(0.0)
    for images, labels in data:
        logits = network(images)
        total = total + 0.5 * F.cross_entropy(logits, labels) / 2
        total = total + 0.5 * soft_targets(logits, teacher(images).detach(), 4.0) / 2
    expected = one_step(network, total)
    module = DistillationModule(network, teacher, alpha=0.5, optimizer=SGD)
    make_trainer(max_epochs=1, accumulate_grad_batches=2).fit(module, data)

    assert_weights(network, expected)


def test_a_frozen_student_is_refused(make_trainer) -> None:
    teacher = small_network()
    DistillationModule(small_network(), teacher)
    again = DistillationModule(copy.deepcopy(teacher), small_network())
    with pytest.raises(ValueError, match=r"student=Sequential: none .*\.requires_grad_\(\)"):
        make_trainer(max_epochs=1).fit(again, small_data())


def test_a_lightning_module_can_teach(make_trainer) -> None:
    teacher = Classifier()
    teacher.log = None  # nothing of it but forward is called
    make_trainer(max_epochs=1).fit(DistillationModule(Classifier(), teacher), small_data())


def test_dense_outputs_and_soft_labels(make_trainer) -> None:
    images = torch.randn(8, 3, 6, 6)
    classes = torch.randint(4, (8, 6, 6))
    classes[0, 0, 0] = -100
    probabilities = torch.rand(8, 4, 6, 6).softmax(1)
    for target in (classes, classes.int(), probabilities):
        module = DistillationModule(nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1))
        trainer = make_trainer(max_epochs=1)
        trainer.fit(module, DataLoader(TensorDataset(images, target), batch_size=4))
        assert math.isfinite(trainer.logged_metrics["train/loss"])
        assert ("train/student_accuracy" in trainer.logged_metrics) == (target is not probabilities)


@pytest.mark.parametrize("ignored", [-100, -1, 255])
def test_what_a_target_ignores_is_neither_right_nor_wrong(make_trainer, ignored) -> None:
    class Segmenter(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, images):
            return self.layer(images)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1], ignore_index=ignored)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    images, teacher = torch.randn(8, 3, 6, 6), nn.Conv2d(3, 4, 1)
    target = teacher(images).argmax(1)  # always right
    target[:, :3] = ignored
    trainer = make_trainer(max_epochs=1)
    data = DataLoader(TensorDataset(images, target), batch_size=4)
    trainer.fit(DistillationModule(Segmenter(), teacher), data)
    assert trainer.logged_metrics["train/teacher_accuracy"] == 1


@pytest.mark.parametrize(
    ("classes", "target", "message"),
    [
        (3, torch.randn(8, 3), r"target: has values of -.*LightningModule"),
        (3, torch.tensor([[1.0, 1, 0]] * 8), r"target: .* sums over the classes of 2; "),
        (1, torch.rand(8, 1), r"logits have shape \(8, 1\): .* for regression"),
    ],
)
def test_targets_that_are_no_probabilities_are_refused(make_trainer, classes, target, message):
    module = DistillationModule(nn.Linear(4, classes), nn.Linear(4, classes), loss=F.mse_loss)
    data = DataLoader(TensorDataset(torch.randn(8, 4), target), batch_size=8)
    with pytest.raises(ValueError, match=message):
        make_trainer(max_epochs=1).fit(module, data)


def test_targets_of_training_are_looked_at_after_a_sanity_check_of_others(make_trainer) -> None:
    labels = DataLoader(TensorDataset(torch.randn(8, 4), torch.randint(3, (8,))), batch_size=8)
    counts = DataLoader(TensorDataset(torch.randn(8, 4), torch.full((8, 3), 2.0)), batch_size=8)
    module = DistillationModule(nn.Linear(4, 3), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"target: .* sums over the classes of 6; "):
        make_trainer(max_epochs=1, num_sanity_val_steps=1).fit(module, counts, labels)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_loss_without_weight_has_no_say_even_if_it_is_nan(make_trainer, alpha) -> None:
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    if alpha == 0:
        nn.init.constant_(teacher.weight, torch.inf)
    unlabelled = torch.full((8,), -100) if alpha == 1 else torch.randint(3, (8,))
    data = DataLoader(TensorDataset(torch.randn(8, 4), unlabelled), batch_size=4)
    before, trainer = copy.deepcopy(student), make_trainer(max_epochs=2)
    trainer.fit(DistillationModule(student, teacher, alpha=alpha), data)
    assert trainer.logged_metrics["train/loss"].isfinite()
    assert student.weight.isfinite().all()
    assert not torch.equal(student.weight, before.weight)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("kind", ["nn.Module", "LightningModule"])
def test_precisions(make_trainer, precision, kind) -> None:
    student = small_network() if kind == "nn.Module" else Classifier()
    teacher = small_network()
    before = copy.deepcopy(teacher.state_dict())
    trainer = make_trainer(max_epochs=1, precision=precision)
    trainer.fit(DistillationModule(student, teacher), small_data(), small_data())

    assert math.isfinite(trainer.callback_metrics["val/distillation_loss"])
    assert_equal(teacher, before)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo
def test_a_compiled_module_trains(make_trainer) -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        student = Classifier(small_network(norm=False))
        module = DistillationModule(student, small_network(), alpha=0.5)
        make_trainer(max_steps=3).fit(
            torch.compile(module, backend="eager") if compiled else module, small_data()
        )
        results.append(dict(student.network.named_parameters()))

    assert_weights(student.network, results[0])


def test_predictions_are_the_students(make_trainer) -> None:
    images, _ = small_data(16).dataset.tensors
    for data in (small_data(16), DataLoader(TensorDataset(images)), DataLoader(images)):
        student = small_network()
        module = DistillationModule(student, small_network())
        predicted = torch.cat(make_trainer().predict(module, data))
        torch.testing.assert_close(predicted, student.eval()(images).detach())


def test_the_optimizer_may_come_with_a_scheduler(make_trainer) -> None:
    def optimizer(parameters: Any) -> Any:
        adam = torch.optim.Adam(parameters, lr=0.5)
        return [adam], [torch.optim.lr_scheduler.ExponentialLR(adam, 0.1)]

    trainer = make_trainer(max_epochs=2)
    trainer.fit(
        DistillationModule(small_network(), small_network(), optimizer=optimizer), small_data()
    )

    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)
