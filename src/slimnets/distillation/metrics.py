"""What a DistillationModule logs of a step."""

from collections import defaultdict
from typing import Any

import lightning as L
import torch
from torch import Tensor

from slimnets.distillation.losses import logits_of
from slimnets.distillation.task import is_classes

STAGES = {"training_step": "train", "validation_step": "val", "test_step": "test"}


class StepMetrics:
    """What is logged of a step: the terms of its loss, and how well student and teacher agree.

    Args:
        batch: The step's batch. Where it is an (input, target) pair with the index of a class for
            every position of the logits, there are accuracies.
    """

    def __init__(self, batch: Any) -> None:
        self.samples = 0
        self._target = batch[1] if isinstance(batch, list | tuple) and len(batch) == 2 else None
        self._values: defaultdict[str, list[Tensor]] = defaultdict(list)

    def add(self, name: str, value: Tensor) -> None:
        """Note ``value``; several backward calls make several of one name."""
        self._values[name].append(value.detach())

    def measure(self, student_output: Any, teacher_output: Any) -> None:
        """Note how often student and teacher agree, and how often each is right, as fractions.

        Nothing is noted of outputs that are not class logits of equal shapes.
        """
        student, teacher = logits_of(student_output), logits_of(teacher_output)
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
        if is_classes(self._target, student):
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


def _accuracy(logits: Tensor, target: Tensor) -> Tensor:
    counted = (target >= 0) & (target < logits.shape[1])  # not -100, 255 and what else is ignored
    # to pick those out would have the GPU be waited for, at every step
    right = (logits.argmax(dim=1) == target) & counted
    return right.sum() / counted.sum().clamp(min=1)
