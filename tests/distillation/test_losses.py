import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from slimnets.distillation import logit_regression, soft_targets

# at temperature 2 the student says (1/4, 3/4) and the teacher (1/2, 1/2)
STUDENT = torch.tensor([[0.0, 2 * math.log(3.0)]])
TEACHER = torch.tensor([[5.0, 5.0]])


def test_soft_targets_by_hand() -> None:
    divergence = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)

    assert soft_targets(STUDENT, TEACHER, 2.0).item() == pytest.approx(4 * divergence, rel=1e-6)
    reverse = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert soft_targets(TEACHER, STUDENT, 2.0).item() == pytest.approx(4 * reverse, rel=1e-6)


def test_soft_targets_average_over_the_batch_and_not_over_the_classes() -> None:
    student, teacher = torch.randn(2, 5, 7)
    alone = [soft_targets(s[None], t[None], 3.0) for s, t in zip(student, teacher, strict=True)]

    assert soft_targets(student, teacher, 3.0).item() == pytest.approx(sum(alone).item() / 5)


def test_the_gradient_of_soft_targets_is_that_of_the_difference_of_probabilities() -> None:
    student, teacher = torch.randn(2, 5, 7)
    student.requires_grad_()
    soft_targets(student, teacher, 3.0).backward()

    expected = 3.0 * (F.softmax(student / 3, 1) - F.softmax(teacher / 3, 1)) / 5
    torch.testing.assert_close(student.grad, expected)


def test_at_high_temperatures_the_gradient_is_that_of_logit_regression() -> None:
    """Hinton et al., equation 4, for logits of zero mean."""
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64)
    student = (student - student.mean(1, keepdim=True)).requires_grad_()
    teacher = teacher - teacher.mean(1, keepdim=True)
    (soft,) = torch.autograd.grad(soft_targets(student, teacher, 1e4), student)
    (hard,) = torch.autograd.grad(logit_regression(student, teacher), student)

    torch.testing.assert_close(soft * 4, hard, rtol=1e-3, atol=1e-4)


def test_a_sure_teacher_begins_with_twice_the_gradient_of_the_cross_entropy() -> None:
    """So that a learning rate that suits labels may be too large; as the docstring says."""
    student = torch.zeros(1, 10, requires_grad=True)
    (soft,) = torch.autograd.grad(soft_targets(student, 10 * torch.eye(10)[:1], 4.0), student)
    (hard,) = torch.autograd.grad(F.cross_entropy(student, torch.tensor([0])), student)

    assert (soft.norm() / hard.norm()).item() == pytest.approx(2, abs=0.2)


def test_logit_regression_by_hand() -> None:
    student = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    teacher = torch.tensor([[1.0, 4.0, 2.0], [3.0, 0.0, 0.0]])

    assert logit_regression(student, teacher).item() == ((4 + 1) / 2 + 9 / 2) / 2


@pytest.mark.parametrize("loss", [soft_targets, logit_regression])
def test_dense_outputs_are_averaged_over_positions(loss) -> None:
    student, teacher = torch.randn(2, 3, 4, 5, 6)
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 4) for x in (student, teacher)]

    torch.testing.assert_close(loss(student, teacher), loss(*flat))


@pytest.mark.parametrize("loss", [soft_targets, logit_regression])
def test_outputs_with_logits_are_taken(loss) -> None:
    outputs = [SimpleNamespace(logits=logits) for logits in (STUDENT, TEACHER)]

    assert loss(*outputs) == loss(STUDENT, TEACHER)


def test_half_precision_is_computed_in_single() -> None:
    student, teacher = (30 * torch.randn(2, 64, 10)).half()
    loss = soft_targets(student, teacher, 20.0)

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, soft_targets(student.float(), teacher.float(), 20.0))
    assert soft_targets(student.double(), teacher).dtype == torch.float64


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), ValueError, r"\(2, 3\), the teacher's \(2, 4\)"),
        (torch.ones(2, 1), torch.ones(2, 1), ValueError, "at least two classes"),
        (torch.ones(2), torch.ones(2), ValueError, "at least two classes"),
        ((torch.ones(2, 3),), torch.ones(2, 3), TypeError, "the student returned tuple"),
        (torch.ones(2, 3), {"logits": 1}, TypeError, "the teacher returned dict.*pass loss="),
    ],
)
def test_outputs_that_cannot_be_compared_are_refused(student, teacher, error, message) -> None:
    for loss in (soft_targets, logit_regression):
        with pytest.raises(error, match=message):
            loss(student, teacher)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf])
def test_a_temperature_not_above_zero_is_refused(temperature) -> None:
    with pytest.raises(ValueError, match=r"temperature=.*above 0"):
        soft_targets(STUDENT, TEACHER, temperature)
    with pytest.raises(TypeError, match=r"temperature='4'.*above 0"):
        soft_targets(STUDENT, TEACHER, "4")


@pytest.mark.parametrize("loss", [soft_targets, logit_regression])
def test_logits_of_tokens_have_the_classes_last(loss) -> None:
    student, teacher = torch.randn(2, 3, 5, 7)  # 5 tokens, 7 classes
    outputs = [SimpleNamespace(logits=logits) for logits in (student, teacher)]

    flat = student.flatten(0, 1), teacher.flatten(0, 1)
    torch.testing.assert_close(loss(*outputs), loss(*flat))


@pytest.mark.parametrize("loss", [soft_targets, logit_regression])
def test_classes_that_both_mask_out_count_nothing(loss) -> None:
    student, teacher = torch.randn(2, 4, 5)
    expected = loss(student[:, :4], teacher[:, :4])
    masked = student.clone()
    masked[:, 4] = -math.inf
    masked.requires_grad_()
    teacher[:, 4] = -math.inf
    found = loss(masked, teacher)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert masked.grad is not None and masked.grad.isfinite().all()
