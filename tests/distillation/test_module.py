import copy
import gc
import math
import pickle
import re
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as checkpointed
from torch.utils.data import DataLoader, TensorDataset

from slimnets.distillation import DistillationModule, logit_regression, soft_targets
from slimnets.layers import compressed_network
from tests.support import Classifier, small_data, small_network

# most fits here are without validation data, which the modules could use
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")

SGD = partial(torch.optim.SGD, lr=0.1)


def first_batch() -> tuple[Tensor, Tensor]:
    return next(iter(small_data()))


def one_step(student: nn.Module, loss: Tensor, lr: float = 0.1) -> dict[str, Tensor]:
    """The weights of ``student`` after one step of gradient descent."""
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    return {
        name: parameter.detach() - lr * gradient
        for (name, parameter), gradient in zip(student.named_parameters(), gradients, strict=True)
    }


def assert_weights(network: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], msg=lambda m, n=name: n + m)


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


class Manual(Classifier):
    """Manual optimization with one optimizer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


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
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
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
        ({"loss": logit_regression}, "loss=.*logit_regression: .*soft_targets in the checkpoint"),
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
    with pytest.raises(TypeError, match=r"student=.*load_from_checkpoint, too, needs student="):
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
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_callbacks_compress_the_student() -> None:
    plain, classifier = small_network(), Classifier()

    for student in (plain, classifier):
        module = DistillationModule(student, small_network())
        assert compressed_network(module) is student
    compiled = torch.compile(plain)
    assert compressed_network(DistillationModule(compiled, small_network())) is plain


def test_the_last_step_leaves_no_graph_behind(make_trainer) -> None:
    outputs: list[weakref.ref[Tensor]] = []

    class Remembering(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            outputs.append(weakref.ref(logits))
            return logits

    for student in (Remembering(), type("Both", (Manual, Remembering), {})()):
        outputs.clear()
        module = DistillationModule(student, small_network())
        make_trainer(max_epochs=1).fit(module, small_data())
        gc.collect()

        assert outputs
        assert all(reference() is None for reference in outputs)
        for network in student.modules():
            assert not network._forward_hooks
            assert not network._forward_pre_hooks
        assert "manual_backward" not in vars(student)


# ---- what a LightningModule may do in its step -------------------------------------------------


class InSubmodule(Classifier):
    """Logits are computed by a submodule, as in most LightningModules."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])


def test_logits_of_a_named_submodule(make_trainer) -> None:
    network, teacher = small_network(norm=False), small_network()
    images, labels = first_batch()
    teacher.eval()
    logits = network(images)
    loss = F.cross_entropy(logits, labels) + soft_targets(logits, teacher(images).detach(), 4.0)
    expected = one_step(network, 0.5 * loss)
    module = DistillationModule(InSubmodule(network, lr=0.1), teacher, alpha=0.5, logits="network")
    make_trainer(max_steps=1).fit(module, small_data())

    assert_weights(network, expected)


@pytest.mark.parametrize("kind", [InSubmodule, Manual])
def test_no_logits_is_an_error_before_the_first_step(make_trainer, kind) -> None:
    class Student(kind):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
            loss = F.cross_entropy(self.network(batch[0]), batch[1])
            if self.automatic_optimization:
                return loss
            self.manual_backward(loss)
            return self.optimizers().step()

    student = Student(small_network(norm=False))
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(RuntimeError, match=r"logits='NAME'\): its submodules are 'network'"):
        make_trainer(max_epochs=1).fit(DistillationModule(student, small_network()), small_data())

    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert "manual_backward" not in vars(student)


def test_backward_without_manual_backward_is_an_error(make_trainer) -> None:
    class Student(Manual):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            F.cross_entropy(self(batch[0]), batch[1]).backward()
            self.optimizers().step()

    with pytest.raises(RuntimeError, match=r"self.manual_backward\(loss\), not loss.backward"):
        make_trainer(max_epochs=1).fit(DistillationModule(Student(), small_network()), small_data())


def test_of_several_forward_passes_the_mean_counts_and_those_without_gradients_do_not(
    make_trainer,
) -> None:
    class TwoViews(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            with torch.no_grad():
                self(batch[0] * 7)
            return 0 * (self(batch[0]) + self(batch[0].flip(-1))).sum()

    network, teacher = small_network(norm=False), small_network().eval()
    images, _ = first_batch()
    terms = [
        soft_targets(network(view), teacher(view).detach(), 4.0)
        for view in (images, images.flip(-1))
    ]
    expected = one_step(network, sum(terms) / 2)
    module = DistillationModule(TwoViews(network, lr=0.1), teacher, alpha=1.0)
    make_trainer(max_steps=1).fit(module, small_data())

    assert_weights(network, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", [Classifier, Manual])
def test_activation_checkpointing_inside_the_network(make_trainer, kind, reentrant) -> None:
    class Student(kind):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            x.requires_grad_()
            body = lambda x: self.network[:5](x)  # noqa: E731
            type(self).calls += 1
            return self.network[5:](checkpointed(body, x, use_reentrant=reentrant))

    plain, twin = kind(small_network(norm=False)), None
    twin = Student(copy.deepcopy(plain.network))
    teacher = small_network()
    for student in (plain, twin):
        make_trainer(max_steps=2).fit(DistillationModule(student, teacher), small_data())

    assert_weights(twin.network, dict(plain.network.named_parameters()))


def test_a_named_submodule_may_be_checkpointed(make_trainer) -> None:
    """It is run again in backward, when the teacher is not to be asked again."""

    class Student(Manual):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            logits = checkpointed(self.network, batch[0], use_reentrant=False)
            self.manual_backward(F.cross_entropy(logits, batch[1]))
            self.optimizers().step()

    asked = []
    teacher = small_network()
    teacher.register_forward_hook(lambda *_: asked.append(1))
    make_trainer(max_steps=3).fit(
        DistillationModule(Student(), teacher, logits="network"), small_data()
    )

    assert len(asked) == 3


def test_each_backward_takes_the_passes_since_the_one_before(make_trainer) -> None:
    class Two(Manual):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            images, labels = batch
            self.manual_backward(F.cross_entropy(self(images), labels))
            self.manual_backward(sum(p.square().sum() for p in self.parameters()))
            self.manual_backward(F.cross_entropy(self(images.flip(-1)), labels))
            self.optimizers().step()

    network, teacher = small_network(norm=False), small_network().eval()
    images, labels = first_batch()
    decay = sum(p.square().sum() for p in network.parameters())
    loss = 0.6 * decay
    for view in (images, images.flip(-1)):
        logits = network(view)
        loss = loss + 0.6 * F.cross_entropy(logits, labels)
        loss = loss + 0.4 * soft_targets(logits, teacher(view).detach(), 4.0)
    expected = one_step(network, loss)
    trainer = make_trainer(max_steps=1)
    trainer.fit(DistillationModule(Two(network, lr=0.1), teacher, alpha=0.4), small_data())

    assert_weights(network, expected)
    logged = trainer.logged_metrics
    total = 0.6 * logged["train/student_loss"] + 0.4 * logged["train/distillation_loss"]
    torch.testing.assert_close(total, loss.detach())


def test_a_skipped_step_is_skipped(make_trainer) -> None:
    class Skipping(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    student = Skipping()
    trainer = make_trainer(max_epochs=1)
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        trainer.fit(DistillationModule(student, small_network()), small_data())

    assert "train/distillation_loss" in trainer.logged_metrics


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


def test_inputs_of_any_form_reach_the_teacher_as_the_student_got_them(make_trainer) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.head = nn.Linear(8, 4)

        def forward(self, tokens: Tensor, *, mask: Tensor) -> SimpleNamespace:
            hidden = (self.embed(tokens) * mask.mul_(1)[..., None]).sum(1)
            return SimpleNamespace(logits=self.head(hidden), hidden=hidden)

    class Student(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Network()

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
            output = self.model(batch["tokens"], mask=batch["mask"])
            return {"loss": F.cross_entropy(output.logits, batch["label"])}

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def hidden_too(student: Any, teacher: Any) -> Tensor:
        return logit_regression(student, teacher) + F.mse_loss(student.hidden, teacher.hidden)

    examples = [
        {"tokens": torch.randint(10, (5,)), "mask": torch.ones(5), "label": torch.tensor(i % 4)}
        for i in range(16)
    ]
    for loss in (None, hidden_too):
        trainer = make_trainer(max_epochs=1)
        trainer.fit(
            DistillationModule(Student(), Network(), logits="model", loss=loss),
            DataLoader(examples, batch_size=4),
        )
        assert trainer.logged_metrics["train/distillation_loss"] > 0
        assert "train/agreement" in trainer.logged_metrics
        assert "train/student_accuracy" not in trainer.logged_metrics


def test_a_lightning_module_can_teach(make_trainer) -> None:
    teacher = Classifier()
    teacher.log = None  # nothing of it but forward is called
    make_trainer(max_epochs=1).fit(DistillationModule(Classifier(), teacher), small_data())


def test_dense_outputs_and_soft_labels(make_trainer) -> None:
    images = torch.randn(8, 3, 6, 6)
    classes = torch.randint(4, (8, 6, 6))
    classes[0, 0, 0] = -100
    for target in (classes, torch.rand(8, 4, 6, 6).softmax(1)):
        module = DistillationModule(nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1))
        trainer = make_trainer(max_epochs=1)
        trainer.fit(module, DataLoader(TensorDataset(images, target), batch_size=4))
        assert math.isfinite(trainer.logged_metrics["train/loss"])
        assert ("train/student_accuracy" in trainer.logged_metrics) == (target is classes)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("kind", ["nn.Module", "LightningModule"])
def test_precisions(make_trainer, precision, kind) -> None:
    student = small_network() if kind == "nn.Module" else Classifier()
    teacher = small_network()
    before = copy.deepcopy(teacher.state_dict())
    trainer = make_trainer(max_epochs=1, precision=precision)
    trainer.fit(DistillationModule(student, teacher), small_data(), small_data())

    assert math.isfinite(trainer.callback_metrics["val/distillation_loss"])
    for name, tensor in teacher.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name


@pytest.mark.slow
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


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": 1.5}, ValueError, r"alpha=1.5: .* in \[0, 1\]"),
        ({"alpha": True}, ValueError, "alpha=True"),
        ({"alpha": "0.5"}, ValueError, "alpha='0.5'"),
        ({"alpha": math.nan}, ValueError, "alpha=nan"),
        ({"temperature": 0}, ValueError, "temperature=0: .* above 0"),
        ({"loss": "soft_targets"}, TypeError, "loss='soft_targets': expected a function"),
        ({"loss": logit_regression, "temperature": 2.0}, ValueError, "temperature=2.0: is of"),
        ({"loss": nn.Bilinear(4, 4, 1)}, ValueError, "loss=Bilinear: has parameters"),
        ({"logits": "network"}, ValueError, "logits='network': is for a LightningModule"),
        ({"optimizer": "adam"}, TypeError, "optimizer=str: expected a function"),
        ({"student": 3}, TypeError, "student=3: expected an nn.Module"),
        ({"teacher": {"a": 1}}, TypeError, r"teacher={'a': 1}: expected an nn.Module"),
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

    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not student._forward_hooks


@pytest.mark.parametrize("loss", [lambda s, t: (s - t) ** 2, lambda s, t: 1.0])
def test_a_loss_that_is_no_scalar_is_refused(make_trainer, loss) -> None:
    module = DistillationModule(small_network(), small_network(), loss=loss)
    with pytest.raises(TypeError, match=r"loss=.*lambda.*: returned .*, expected a tensor of one"):
        make_trainer(max_epochs=1).fit(module, small_data())
