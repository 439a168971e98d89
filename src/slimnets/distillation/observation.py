"""The forward passes that a step makes anyway, each with the teacher's output for its inputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slimnets.distillation.losses import logit_regression, logits_of, soft_targets
from slimnets.distillation.metrics import StepMetrics
from slimnets.layers import version_of


class Pass(NamedTuple):
    """One forward pass: what student and teacher returned for the same inputs.

    Attributes:
        student: The student's output.
        teacher: The teacher's.
        version: How often the student's logits had been changed in place by then.
    """

    student: Any
    teacher: Any
    version: int


class Observation:
    """The forward passes seen so far, oldest first."""

    def __init__(self) -> None:
        self.passes: list[Pass] = []
        self.is_paused = False

    def take(self) -> list[Pass]:
        """The passes, which are forgotten here."""
        passes, self.passes = self.passes, []
        return passes

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let passes by unseen; backward makes some, under activation checkpointing."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False


@contextmanager
def observe(
    network: nn.Module, ask_teacher: Callable[..., Any], training: bool
) -> Iterator[Observation]:
    """See the forward passes through ``network``.

    Args:
        network: The module whose output is the logits.
        ask_teacher: Called with each pass's inputs before ``network`` is.
        training: Whether to see those passes only whose output carries gradients; what a step
            computes under ``no_grad`` (pseudo-labels, say) is no output to be trained.
    """
    observation = Observation()
    answers: list[Any] = []

    def wanted() -> bool:
        return not observation.is_paused and (torch.is_grad_enabled() or not training)

    @partial(torch.compiler.disable, recursive=False)  # the teacher may be compiled
    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        if wanted():
            answers.append(ask_teacher(*args, **kwargs))

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if wanted():
            observation.passes.append(Pass(output, answers.pop(), _version_of(output)))

    handles = (
        network.register_forward_pre_hook(before, with_kwargs=True),
        network.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield observation
    finally:
        for handle in handles:
            handle.remove()


def distillation_loss(
    loss: Callable[[Any, Any], Tensor], passes: list[Pass], metrics: StepMetrics
) -> Tensor:
    """The mean of ``loss`` over ``passes``, which ``metrics`` note with how well the passes agree.

    Raises:
        TypeError: If ``loss`` returns anything but a tensor of one value.
        ValueError: If it would take another axis of the logits for the classes.
        RuntimeError: If the logits are no longer those of the forward pass.
    """
    values = []
    for seen in passes:
        _refuse_other_logits(loss, seen, metrics)
        value = loss(seen.student, seen.teacher)
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"loss={loss}: returned {what}, expected a tensor of one value; reduce it over the "
                "batch, with .mean() for example"
            )
        values.append(value.reshape(()))
        metrics.measure(seen.student, seen.teacher)
    mean = torch.stack(values).mean()
    metrics.add("distillation_loss", mean)
    return mean


def _refuse_other_logits(
    loss: Callable[[Any, Any], Tensor], seen: Pass, metrics: StepMetrics
) -> None:
    if _version_of(seen.student) != seen.version:
        raise RuntimeError(
            "the student's logits were changed in place after its forward pass, and the "
            "distillation loss with them: make new ones, as logits = logits / 2, not logits /= 2"
        )
    logits = logits_of(seen.student)
    is_ours = getattr(loss, "func", loss) in (soft_targets, logit_regression)
    if is_ours and logits is not None and metrics.has_classes_last(logits):
        raise ValueError(
            f"the logits have shape {tuple(logits.shape)}, with the classes last as the targets "
            "tell, and the distillation loss takes (batch, classes, ...): return "
            "logits.movedim(-1, 1) or an output with .logits, or pass loss=lambda student, "
            "teacher: soft_targets(student.movedim(-1, 1), teacher.movedim(-1, 1))"
        )


def _version_of(output: Any) -> int:
    logits = logits_of(output)
    return 0 if logits is None else version_of(logits)
