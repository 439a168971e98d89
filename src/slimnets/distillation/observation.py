"""The forward passes that a step makes anyway, each with the teacher's output for its inputs."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from slimnets.distillation.losses import logit_regression, logits_of, soft_targets
from slimnets.distillation.task import is_classes
from slimnets.layers import version_of

STAGES = {"training_step": "train", "validation_step": "val", "test_step": "test"}


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


class Report:
    """What is told of a step: the terms of its loss, and how well student and teacher agree.

    Args:
        batch: The step's batch. Where it is an (input, target) pair with the index of a class for
            every position of the logits, accuracies are told.
    """

    def __init__(self, batch: Any) -> None:
        self.samples = 0
        self._target = batch[1] if isinstance(batch, list | tuple) and len(batch) == 2 else None
        self._values: defaultdict[str, list[Tensor]] = defaultdict(list)

    def add(self, name: str, value: Tensor) -> None:
        """Note ``value``; several backward calls make several of one name."""
        self._values[name].append(value.detach())

    def measure(self, seen: Pass) -> None:
        """Note how often student and teacher agree, and how often each is right, as fractions.

        Nothing is noted of outputs that are not class logits of equal shapes.
        """
        student, teacher = logits_of(seen.student), logits_of(seen.teacher)
        if (
            student is None
            or teacher is None
            or student.shape != teacher.shape
            or student.ndim < 2
            or student.shape[1] < 2  # no classes to choose from
        ):
            self.samples += 1
            return
        if self.has_classes_last(student):  # which a loss of the user's takes as they are
            student, teacher = student.movedim(-1, 1), teacher.movedim(-1, 1)
        self.samples += len(student)
        self.add("agreement", _accuracy(student, teacher.argmax(dim=1)))
        if self._target is not None and is_classes(self._target, student):
            self.add("student_accuracy", _accuracy(student, self._target))
            self.add("teacher_accuracy", _accuracy(teacher, self._target))

    def has_classes_last(self, logits: Tensor) -> bool:
        """Whether the batch tells that ``logits`` are of shape ``(batch, ..., classes)``."""
        if logits.ndim < 3 or is_classes(self._target, logits):
            return False
        return is_classes(self._target, logits.movedim(-1, 1))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def log(self, module: L.LightningModule, step: str) -> None:
        """Log below the name of the stage of ``step``: of losses the sum, of others the mean."""
        if module._trainer is None or module.trainer.barebones:
            return
        stage = STAGES[step]
        for name, values in self._values.items():
            stacked = torch.stack(values)
            module.log(
                f"{stage}/{name}",
                stacked.sum() if name.endswith("loss") else stacked.mean(),
                prog_bar=name == "loss",
                sync_dist=stage != "train",
                batch_size=max(self.samples, 1),
            )


def distillation_loss(
    loss: Callable[[Any, Any], Tensor], passes: list[Pass], report: Report
) -> Tensor:
    """The mean of ``loss`` over ``passes``, which ``report`` is told.

    Raises:
        TypeError: If ``loss`` returns anything but a tensor of one value.
        ValueError: If it would take another axis of the logits for the classes.
        RuntimeError: If the logits are no longer those of the forward pass.
    """
    values = []
    for seen in passes:
        _refuse_other_logits(loss, seen, report)
        value = loss(seen.student, seen.teacher)
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"loss={loss}: returned {what}, expected a tensor of one value; reduce it over the "
                "batch, with .mean() for example"
            )
        values.append(value.reshape(()))
        report.measure(seen)
    mean = torch.stack(values).mean()
    report.add("distillation_loss", mean)
    return mean


def _refuse_other_logits(loss: Callable[[Any, Any], Tensor], seen: Pass, report: Report) -> None:
    if _version_of(seen.student) != seen.version:
        raise RuntimeError(
            "the student's logits were changed in place after its forward pass, and the "
            "distillation loss with them: make new ones, as logits = logits / 2, not logits /= 2"
        )
    logits = logits_of(seen.student)
    is_ours = getattr(loss, "func", loss) in (soft_targets, logit_regression)
    if is_ours and logits is not None and report.has_classes_last(logits):
        raise ValueError(
            f"the logits have shape {tuple(logits.shape)}, with the classes last as the targets "
            "tell, and the distillation loss takes (batch, classes, ...): return "
            "logits.movedim(-1, 1) or an output with .logits, or pass loss=lambda student, "
            "teacher: soft_targets(student.movedim(-1, 1), teacher.movedim(-1, 1))"
        )


def _version_of(output: Any) -> int:
    logits = logits_of(output)
    return 0 if logits is None else version_of(logits)


def _accuracy(logits: Tensor, target: Tensor) -> Tensor:
    counted = (target >= 0) & (target < logits.shape[1])  # not -100, 255 and what else is ignored
    # to pick those out would have the GPU be waited for, at every step
    right = (logits.argmax(dim=1) == target) & counted
    return right.sum() / counted.sum().clamp(min=1)
