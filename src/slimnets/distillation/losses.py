"""How far the outputs of a student are from its teacher's."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from slimnets.arguments import check_number

DEFAULT_TEMPERATURE = 4.0
"""That of the benchmark in arXiv 1910.10699."""


def soft_targets(student: Any, teacher: Any, temperature: float = DEFAULT_TEMPERATURE) -> Tensor:
    """Cross entropy with the teacher's softened probabilities, less their entropy.

    With the temperature T it is ``T^2 * KL(softmax(teacher / T) || softmax(student / T))``,
    averaged over the batch, and over the positions of dense outputs. The factor makes up for
    gradients that shrink with the square of a high temperature. Those from a teacher that is sure
    of its answers do not: at a temperature of 4 an untrained student's are about twice those of the
    cross entropy, so that one which stalls or collapses, as without batch norm it may, wants a
    smaller learning rate. Hinton, Vinyals and Dean 2015, arXiv 1503.02531.

    Args:
        student: Logits of shape ``(batch, classes, ...)``, or an output with such ``.logits``, or
            with ``.logits`` of shape ``(batch, tokens, classes)``. A tensor that has its classes
            last goes in as ``tensor.movedim(-1, 1)``.
        teacher: The same of the teacher.
        temperature: What the logits are divided by; above 1 the small probabilities count more.

    Returns:
        A scalar, in nats.

    Raises:
        TypeError: If an output holds no logits, or ``temperature`` is no number.
        ValueError: If the shapes differ, there are fewer than two classes, or ``temperature`` is
            not above 0.

    Examples:
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> soft_targets(logits, logits).item()
        0.0
    """
    check_temperature(temperature)
    student_logits, teacher_logits = _logits_of_both(student, teacher)
    predicted = F.log_softmax(student_logits / temperature, dim=1)
    wanted = F.log_softmax(teacher_logits / temperature, dim=1)
    divergence = F.kl_div(predicted, wanted, reduction="none", log_target=True)
    divergence = divergence.masked_fill(wanted == -math.inf, 0.0)  # classes that are masked out
    return temperature**2 * divergence.sum(dim=1).mean()


def logit_regression(student: Any, teacher: Any) -> Tensor:
    """Half the squared distance of the logits, averaged over the batch.

    Ba and Caruana 2014, arXiv 1312.6184, equation 1.

    Args:
        student: Logits of shape ``(batch, classes, ...)``, or an output with such ``.logits``, or
            with ``.logits`` of shape ``(batch, tokens, classes)``.
        teacher: The same of the teacher.

    Returns:
        A scalar.

    Raises:
        TypeError: If an output holds no logits.
        ValueError: If the shapes differ, or there are fewer than two classes.

    Examples:
        >>> logit_regression(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])).item()
        2.0
    """
    student_logits, teacher_logits = _logits_of_both(student, teacher)
    difference = student_logits - teacher_logits
    difference = difference.masked_fill(student_logits == teacher_logits, 0.0)  # of infinities, too
    return 0.5 * difference.square().sum(dim=1).mean()


def check_temperature(temperature: float) -> None:
    """Raise TypeError or ValueError unless ``temperature`` is a number above 0."""
    expected = "a number above 0, such as 4.0"
    check_number("temperature", temperature, expected, lambda number: 0 < number < math.inf)


def logits_of(output: Any) -> Tensor | None:
    """The logits in what a network returned, ``(batch, classes, ...)``; None if there are none.

    They are the tensor itself or its ``.logits``, of which three dimensions are taken for
    ``(batch, tokens, classes)``, as language models and token classifiers return them.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        return None
    return logits.movedim(-1, 1) if logits.ndim == 3 else logits


def _logits_of_both(student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    """The logits of both, in float32 or better, for a half's exponent is soon exhausted."""
    found = []
    for name, output in (("student", student), ("teacher", teacher)):
        logits = logits_of(output)
        if logits is None:
            raise TypeError(
                f"the {name} returned {type(output).__name__}: expected a tensor of logits or an "
                "output with .logits; for anything else pass loss=, a function of both outputs"
            )
        found.append(logits)
    if found[0].shape != found[1].shape:
        raise ValueError(
            f"the student's logits have shape {tuple(found[0].shape)}, the teacher's "
            f"{tuple(found[1].shape)}: both must predict the same classes in the same order"
        )
    if found[0].ndim < 2 or found[0].shape[1] < 2:
        raise ValueError(
            f"the logits have shape {tuple(found[0].shape)}: expected (batch, classes, ...) with "
            "at least two classes; for anything else pass loss=, a function of both outputs"
        )
    precise = torch.promote_types(found[0].dtype, torch.float32)
    return found[0].to(precise), found[1].to(precise)
