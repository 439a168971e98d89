import copy
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as checkpointed
from torch.utils.data import DataLoader, TensorDataset

from slimnets.distillation import DistillationModule, logit_regression, soft_targets
from tests.distillation.students import (
    InSubmodule,
    Manual,
    assert_weights,
    first_batch,
    one_step,
)
from tests.support import Classifier, assert_equal, small_data, small_network

# most fits here are without validation data, which the modules could use
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


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

    assert_equal(student, before)
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


def test_agreement_on_tokens_is_that_of_their_classes(make_trainer) -> None:
    class Tagger(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Embedding(11, width), nn.Linear(width, 7))

        def forward(self, tokens: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.layers(tokens))

    student, teacher = Tagger(8), Tagger(16)
    tokens, tags = torch.randint(11, (4, 5)), torch.randint(7, (4, 5))
    answers = [network(tokens).logits.argmax(-1) for network in (student, teacher)]

    trainer = make_trainer(max_epochs=1)
    module = DistillationModule(student, teacher)
    trainer.validate(module, DataLoader(TensorDataset(tokens, tags), 4))
    logged = trainer.callback_metrics
    assert logged["val/agreement"] == pytest.approx((answers[0] == answers[1]).float().mean())
    assert logged["val/student_accuracy"] == pytest.approx((answers[0] == tags).float().mean())


@pytest.mark.parametrize("loss", [None, logit_regression])
def test_a_step_waits_for_no_value(loss) -> None:
    """Which a GPU would be waited for; there are none on the meta device."""
    with torch.device("meta"):
        module = DistillationModule(small_network(), small_network(), loss=loss)
        batch = torch.randn(8, 3, 8, 8), torch.zeros(8, dtype=torch.long)
    assert module.training_step(batch, 0).requires_grad


def test_what_the_loss_ignores_is_in_no_accuracy(make_trainer) -> None:
    student, teacher = (nn.Conv2d(3, 5, 1) for _ in range(2))
    images, labels = torch.randn(4, 3, 6, 6), torch.randint(5, (4, 6, 6))
    labels[:, :3] = -100
    trainer = make_trainer()
    module = DistillationModule(student, teacher)
    trainer.validate(module, DataLoader(TensorDataset(images, labels), 4), verbose=False)
    right = student(images).argmax(1)[:, 3:] == labels[:, 3:]
    logged = trainer.callback_metrics["val/student_accuracy"]
    assert logged == pytest.approx(right.float().mean().item())


def test_a_single_logit_is_no_class(make_trainer) -> None:
    class Binary(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return F.binary_cross_entropy_with_logits(self(batch[0])[:, 0], batch[1].float())

    images = torch.randn(8, 4)
    data = DataLoader(TensorDataset(images, (images[:, 0] > 0).long()), 4)
    trainer = make_trainer(max_epochs=1)
    module = DistillationModule(Binary(nn.Linear(4, 1)), nn.Linear(4, 1), loss=F.mse_loss)
    trainer.fit(module, data)
    assert "train/distillation_loss" in trainer.callback_metrics
    assert not {"train/agreement", "train/student_accuracy"} & set(trainer.callback_metrics)


class Tagger(Classifier):
    """Returns logits of shape (batch, tokens, classes), as a bare tensor."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 5)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]).movedim(-1, 1), batch[1])


def tokens(length: int = 7) -> DataLoader[tuple[Tensor, ...]]:
    inputs = torch.randint(11, (16, length))
    return DataLoader(TensorDataset(inputs, inputs % 5), batch_size=8)


@pytest.mark.parametrize("loss", [None, logit_regression])
def test_classes_that_are_last_are_refused(make_trainer, loss) -> None:
    module = DistillationModule(Tagger(0), Tagger(1), loss=loss)
    with pytest.raises(ValueError, match=r"shape \(8, 7, 5\), with the classes last .*movedim"):
        make_trainer(max_epochs=1).fit(module, tokens())


def test_a_loss_of_ones_own_takes_classes_that_are_last(make_trainer) -> None:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return soft_targets(student.movedim(-1, 1), teacher.movedim(-1, 1))

    student, teacher = Tagger(0), Tagger(1)
    data = tokens()
    inputs, targets = next(iter(data))
    found = [network(inputs).argmax(-1) for network in (student, teacher)]
    trainer = make_trainer(max_steps=1)
    trainer.fit(DistillationModule(student, teacher, loss=loss), data)
    logged = trainer.callback_metrics
    right = [(one == targets).float().mean() for one in found]
    torch.testing.assert_close(logged["train/agreement"], (found[0] == found[1]).float().mean())
    torch.testing.assert_close(logged["train/student_accuracy"], right[0])
    torch.testing.assert_close(logged["train/teacher_accuracy"], right[1])


def test_where_either_axis_may_be_the_classes_they_are_the_second(make_trainer) -> None:
    student, teacher, data = Tagger(0), Tagger(1), tokens(length=5)
    found = [network(next(iter(data))[0]).argmax(1) for network in (student, teacher)]
    trainer = make_trainer(max_steps=1)
    trainer.fit(DistillationModule(student, teacher), data)
    expected = (found[0] == found[1]).float().mean()
    torch.testing.assert_close(trainer.callback_metrics["train/agreement"], expected)


def test_logits_that_are_changed_in_place_are_an_error(make_trainer) -> None:
    class Student(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            logits = self(batch[0])
            logits /= 0.1
            return F.cross_entropy(logits, batch[1])

    module = DistillationModule(Student(), small_network())
    with pytest.raises(RuntimeError, match=r"changed in place .* logits = logits / 2"):
        make_trainer(max_epochs=1).fit(module, small_data())
