"""A LightningModule inside another trains, bit for bit, as it does alone."""

import functools
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from slimnets.distillation import DistillationModule
from tests.support import Classifier, small_data, small_network

# most fits here are without validation data, which the students could use
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")

ALL_HOOKS = [
    name
    for kind in (ModelHooks, DataHooks, CheckpointHooks)
    for name in vars(kind)
    if not name.startswith("_") and name != "configure_sharded_model"
]


class Everything(L.LightningModule):
    """A student that uses all that Lightning offers to a module."""

    def __init__(self, lr: float = 0.05, dropout: float = 0.3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = small_network(dropout=dropout)
        self.accuracy = MulticlassAccuracy(4)
        self.example_input_array = torch.zeros(1, 3, 8, 8)
        self.calls: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self(batch["image"])
        loss = nn.functional.cross_entropy(logits, batch["label"], label_smoothing=0.1)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.accuracy(logits, batch["label"])
        self.log("train_accuracy", self.accuracy)
        return {"loss": loss, "logits": logits.detach()}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        logits = self(batch["image"])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch["label"]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch["image"]), batch["label"]))

    def predict_step(self, batch: Any) -> Tensor:
        return self(batch["image"]).argmax(1)

    def on_train_epoch_end(self) -> None:
        self.calls.append("on_train_epoch_end")
        self.log("epoch_norm", self.network[0].weight.norm())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.calls.append("on_train_batch_start")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        image, label = batch
        if self.trainer.training:
            image = image + 0.1 * torch.randn_like(image)
        return {"image": image, "label": label}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, 0.5, "norm")

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.calls.append("lr_scheduler_step")
        scheduler.step()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.calls.append("optimizer_step")

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (2 * loss).backward(*args, **kwargs)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def configure_callbacks(self) -> list[L.Callback]:
        return [LearningRateMonitor()]

    def train_dataloader(self) -> DataLoader[Any]:
        return small_data(shuffle=True)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [small_data(16), small_data(24)]

    def test_dataloader(self) -> DataLoader[Any]:
        return small_data(16)

    def predict_dataloader(self) -> DataLoader[Any]:
        return small_data(16)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = len(self.calls)
        checkpoint["state_dict"]["bias"] = checkpoint["state_dict"].pop("network.9.bias")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["mine"] > 0
        checkpoint["state_dict"]["network.9.bias"] = checkpoint["state_dict"].pop("bias")


class Manual(Everything):
    """The same with two optimizers under manual optimization."""

    backward = L.LightningModule.backward

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        scheduler = self.lr_schedulers()
        for optimizer in (first, second):
            with optimizer.toggle_model():
                loss = nn.functional.cross_entropy(self(batch["image"]), batch["label"])
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 0.5, "norm")
                optimizer.step()
        scheduler.step()
        self.log("train_loss", loss)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("not called under manual optimization")

    def configure_optimizers(self) -> Any:
        layers = list(self.network)
        first = torch.optim.SGD(nn.Sequential(*layers[:5]).parameters(), lr=0.05, momentum=0.9)
        second = torch.optim.Adam(nn.Sequential(*layers[5:]).parameters(), lr=0.01)
        return [first, second], [torch.optim.lr_scheduler.StepLR(first, 3, 0.5)]


def fit(module: L.LightningModule, make_trainer: Any, path: Any) -> Any:
    torch.manual_seed(1)
    checkpoint = ModelCheckpoint(
        path / "checkpoints", monitor="val_loss/dataloader_idx_1", save_last=True
    )
    trainer = make_trainer(
        max_epochs=3,
        callbacks=[checkpoint],
        enable_checkpointing=True,
        logger=CSVLogger(path / "logs"),
        log_every_n_steps=1,
    )
    trainer.fit(module)
    return trainer


@pytest.mark.parametrize("kind", [Everything, Manual])
def test_with_alpha_zero_it_trains_as_it_does_alone(make_trainer, tmp_path, kind) -> None:
    torch.manual_seed(0)
    alone = kind()
    torch.manual_seed(0)
    student = kind()
    teacher = small_network(dropout=0.5)
    module = DistillationModule(student, teacher, alpha=0.0)

    plain = fit(alone, make_trainer, tmp_path / "alone")
    distilled = fit(module, make_trainer, tmp_path / "distilled")

    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, student.state_dict()[name]), name
    assert student.calls == alone.calls
    assert distilled.global_step == plain.global_step
    assert (
        distilled.checkpoint_callback.best_model_score == plain.checkpoint_callback.best_model_score
    )
    assert {type(c) for c in distilled.callbacks} == {type(c) for c in plain.callbacks}
    metrics = distilled.logged_metrics
    for name, value in plain.logged_metrics.items():
        assert torch.equal(value, metrics[name]), name
    assert {name.split("/")[0] for name in metrics.keys() - plain.logged_metrics.keys()} == {
        "train",
        "val",
    }
    states = [torch.load(t.checkpoint_callback.last_model_path) for t in (plain, distilled)]
    assert states[1]["mine"] == states[0]["mine"]
    assert states[1]["state_dict"].keys() == {f"student.{key}" for key in states[0]["state_dict"]}
    for key in ("optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(states[1][key], states[0][key], rtol=0, atol=0)


def test_evaluation_and_prediction_are_the_students(make_trainer) -> None:
    student = Everything()
    module = DistillationModule(student, small_network())
    runs = []
    for one in (student, module):
        trainer = make_trainer()
        metrics = [trainer.validate(one, verbose=False), trainer.test(one, verbose=False)]
        runs.append((metrics, trainer.predict(one)))

    (alone, predicted_alone), (wrapped, predicted) = runs
    for before, after in zip(alone, wrapped, strict=True):
        for old, new in zip(before, after, strict=True):
            assert old.items() <= new.items()
    assert torch.equal(torch.cat(predicted), torch.cat(predicted_alone))
    assert "test/agreement" in wrapped[1][0]
    assert "val/distillation_loss/dataloader_idx_1" in wrapped[0][1]


def test_a_checkpoint_goes_through_the_students_hooks(make_trainer, tmp_path) -> None:
    student, teacher = Everything(), small_network()
    trainer = fit(DistillationModule(student, teacher, alpha=0.5), make_trainer, tmp_path)
    path = trainer.checkpoint_callback.last_model_path
    assert "student.bias" in torch.load(path)["state_dict"]

    fresh = DistillationModule.load_from_checkpoint(path, student=Everything(), teacher=teacher)

    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, fresh.student.state_dict()[name]), name
    assert fresh.hparams["alpha"] == 0.5


def test_what_the_student_does_not_override_is_not_overridden() -> None:
    class Small(L.LightningModule):
        def training_step(self, batch, batch_idx): ...

    module = DistillationModule(Small(), small_network())

    own = {"on_save_checkpoint", "on_load_checkpoint", "on_before_optimizer_step"}
    names = {*ALL_HOOKS, "validation_step", "test_step", "predict_step", "configure_optimizers"}
    for name in {*names, "configure_callbacks", "optimizer_step", "backward"} - own:
        assert not is_overridden(name, module), name
    assert is_overridden("training_step", module)


@pytest.mark.parametrize("name", ALL_HOOKS)
def test_every_hook_of_lightning_reaches_the_student(name) -> None:
    called = []

    class Hooked(L.LightningModule):
        pass

    setattr(Hooked, name, lambda self, *args: called.append((self, args)))
    student = Hooked()
    module = DistillationModule(student, small_network())
    arguments = (1,)
    if "checkpoint" in name:
        arguments = ({"state_dict": {f"student.{key}": None for key in student.state_dict()}},)

    getattr(module, name)(*arguments)

    assert called == [(student, arguments)]


def test_a_decorated_step_is_called_with_the_arguments_it_takes(make_trainer) -> None:
    def decorate(step):
        @functools.wraps(step)
        def wrapper(*args, **kwargs):
            return step(*args, **kwargs)

        return wrapper

    class Decorated(Classifier):
        @decorate
        def training_step(self, batch):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    make_trainer(fast_dev_run=True).fit(
        DistillationModule(Decorated(), small_network()), small_data()
    )


def test_settings_are_the_students() -> None:
    student = Classifier()
    module = DistillationModule(student, small_network())
    assert module.automatic_optimization
    assert module.example_input_array is None

    student.automatic_optimization = False
    student.strict_loading = False
    module.example_input_array = torch.zeros(1)

    assert not module.automatic_optimization
    assert not module.strict_loading
    assert student.example_input_array is module.example_input_array
    plain = DistillationModule(small_network(), small_network())
    plain.automatic_optimization = False
    assert not plain.automatic_optimization


def test_a_hook_of_a_subclass_goes_before_the_students(make_trainer) -> None:
    calls = []

    class Student(Classifier):
        def on_train_start(self) -> None:
            calls.append("student")

    class Outer(DistillationModule):
        def on_train_start(self) -> None:
            calls.append("outer")
            super().on_train_start()

    make_trainer(fast_dev_run=True).fit(Outer(Student(), small_network()), small_data())

    assert calls == ["outer", "student"]


def test_layers_of_configure_model_are_made(make_trainer) -> None:
    class Late(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.head: nn.Module | None = None

        def configure_model(self) -> None:
            if self.head is None:
                self.head = nn.Linear(192, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.flatten(1))

    student = Late()
    module = DistillationModule(student, nn.Linear(192, 4), logits="head", alpha=1.0)
    make_trainer(max_epochs=1).fit(module, small_data())

    assert student.head.weight.shape == (4, 192)
