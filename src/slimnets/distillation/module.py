"""Train a student on its own task and on its teacher's outputs."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimnets.arguments import spell
from slimnets.distillation.arguments import (
    check_logits,
    check_networks,
    check_settings,
    no_logits,
    observed_module,
    refuse_undistilled,
    warn_of_changes,
)
from slimnets.distillation.delegation import (
    delegates_to_student,
    inner,
    student_hook,
    students_keys,
    weighed_backward,
)
from slimnets.distillation.losses import DEFAULT_TEMPERATURE, soft_targets
from slimnets.distillation.metrics import StepMetrics
from slimnets.distillation.observation import (
    Observation,
    Pass,
    distillation_loss,
    observe,
)
from slimnets.distillation.task import check_probabilities, cross_entropy, input_and_target
from slimnets.distillation.teacher import Teacher, load_weights
from slimnets.lowrank.follow import follow_state_dict


@delegates_to_student
class DistillationModule(L.LightningModule):
    """Train a student on its own task and, at the same time, on its teacher's outputs.

    The loss is ``(1 - alpha) * student's loss + alpha * distillation loss``, averaged over the
    batch. The distillation loss is that of :func:`soft_targets` (Hinton et al., arXiv 1503.02531),
    unless ``loss`` says otherwise. It takes tensors of shape ``(batch, classes, ...)``, and outputs
    with ``.logits`` of that shape or ``(batch, tokens, classes)``.

    A student that is a plain ``nn.Module`` takes batches of (input, target), and its own loss is
    the cross entropy.

    A student that is a LightningModule goes on working as it does alone: its steps, hooks,
    ``self.log``, hyper-parameters, data loaders, optimizers and schedulers, under automatic or
    manual optimization, with any form of batch. The distillation loss is computed from the forward
    pass that its ``training_step`` makes anyway; of several that carry gradients, the mean counts.
    Under manual optimization every loss given to ``self.manual_backward`` is weighted by
    ``1 - alpha``, and the distillation loss of the forward passes since the call before is added to
    it, in full: a step that divides its loss to accumulate gradients divides in ``loss``, too.
    Callbacks are given this module: its ``student``, whose ``lr``, ``batch_size`` it also shows.

    The teacher is put into eval mode, and its parameters no longer require gradients. It is no
    submodule, so that it is in no checkpoint, optimizer or ``parameters()``; it moves to the
    device of the student, and its weights keep their own precision, in which it computes but for
    autocast (``bf16-mixed``), which is for both. It gets a copy of the student's inputs.

    Logged are, below ``train/``, ``val/`` and ``test/``: ``student_loss`` (that of a
    LightningModule while it trains only), ``distillation_loss``, ``agreement`` (how often both
    predict the same class), ``student_accuracy`` and ``teacher_accuracy`` (for batches of an input
    and class indices), and for a plain ``nn.Module`` the whole ``loss``.

    Args:
        student: The network to train, the one that other callbacks compress.
        teacher: The network to learn from, of any kind; called with the inputs of the student.
        alpha: The weight of the distillation loss, a fraction in [0, 1]. With 1 the student's own
            loss has no say, whatever it is; nor has the teacher with 0.
        temperature: What ``soft_targets`` divides the logits by, above 0; the defaults of both are
            those of the benchmark in arXiv 1910.10699.
        loss: A distillation loss to use instead, called as ``loss(student_output, teacher_output)``
            and returning a scalar: :func:`logit_regression`, or a function of your own. Outputs are
            handed over as the networks return them. Ours average over all positions of dense
            outputs, padding and targets of -100 too; for others, return a mask beside the logits.
        logits: For a LightningModule that computes its logits in a submodule, as ``self.model(x)``
            rather than ``self(x)``, the name of that submodule (``"model"``); the teacher is called
            with the inputs of it.
        optimizer: For a plain ``nn.Module``, a function of its parameters that returns an optimizer
            or whatever ``configure_optimizers`` may return; AdamW with its defaults if not given.
        teacher_weights: A file to fill the teacher from: safetensors, or the state dict of
            ``torch.save``, or a checkpoint of Lightning; of a module with all its weights in one
            network, as a DistillationModule in its student, that network's.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument has a value that makes no sense, or is for the other kind of
            student, or if student and teacher share parameters.
        OSError: If ``teacher_weights`` cannot be read.
        RuntimeError: In ``fit``, if a step makes no forward pass to distill from, or changes its
            logits in place.

    Examples:
        >>> student, teacher = nn.Linear(8, 3), nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 3))
        >>> module = DistillationModule(student, teacher, alpha=0.5, temperature=2.0)
        >>> sorted(module.state_dict())
        ['student.bias', 'student.weight']
    """

    student: nn.Module

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        alpha: float = 0.9,
        temperature: float = DEFAULT_TEMPERATURE,
        loss: Callable[[Any, Any], Tensor] | None = None,
        logits: str | None = None,
        # LightningCLI makes it of a class for the first
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
        | Callable[[Iterable[nn.Parameter]], Any]
        | None = None,
        teacher_weights: str | Path | None = None,
    ) -> None:
        check_networks(student, teacher)
        check_settings(alpha, temperature, loss, optimizer, student)
        check_logits(student, logits)
        if teacher_weights is not None:
            load_weights(teacher, teacher_weights)
        super().__init__()
        alpha, temperature = float(alpha), float(temperature)  # NumPy's are in no checkpoint
        self.student = student
        self._teacher = Teacher(teacher)
        self._alpha = alpha
        self._temperature = temperature
        self._loss = partial(soft_targets, temperature=temperature) if loss is None else loss
        self._name_of_loss = spell(soft_targets if loss is None else loss)
        self._logits = logits
        self._optimizer = torch.optim.AdamW if optimizer is None else optimizer
        self._has_distilled = False
        self._checked: set[str] = set()  # steps that have seen a target

        own: dict[str, Any] = {"alpha": alpha, "temperature": temperature, "logits": logits}
        if isinstance(student, L.LightningModule):
            self.prepare_data_per_node = student.prepare_data_per_node
            self.allow_zero_length_dataloader_with_multiple_devices = (
                student.allow_zero_length_dataloader_with_multiple_devices
            )
            own["student"] = dict(student.hparams)
        self.save_hyperparameters(own)

    @property
    def teacher(self) -> nn.Module:
        """The network that the student learns from."""
        return self._teacher.network

    @property
    def compressed_network(self) -> nn.Module:
        """The student: what callbacks that compress act on."""
        return self.student

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's output."""
        return self.student(*args, **kwargs)

    def extra_repr(self) -> str:
        """What ``print`` shows beside the student."""
        teacher = type(self.teacher).__name__
        return f"alpha={self._alpha}, temperature={self._temperature}, teacher={teacher}"

    def _own_step(self, name: str, batch: Any) -> Tensor:
        """The step of a student that is a plain ``nn.Module``."""
        inputs, target = input_and_target(batch)
        with self._observed(training=False) as seen:
            loss = cross_entropy(self.student(inputs), target)
        if name not in self._checked:  # once, for a GPU is waited for
            check_probabilities(target)
            self._checked.add(name)
        metrics = StepMetrics(batch)
        total = self._weighted(loss, seen.take(), metrics)
        metrics.add("loss", total)
        metrics.log(self, name)
        return total

    def _students_training_step(
        self, name: str, step: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        metrics = StepMetrics(args[0] if args else None)
        with (
            self._observed(training=True) as seen,
            weighed_backward(
                self.student, lambda loss: self._weighted(loss, seen.take(), metrics), seen.paused
            ),
        ):
            output = step(*args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if self.automatic_optimization and isinstance(loss, Tensor):
            passes = seen.take()
            if not passes:
                raise RuntimeError(no_logits(self.student, self._logits))
            total = self._weighted(loss, passes, metrics)
            output = {**output, "loss": total} if isinstance(output, Mapping) else total
        metrics.log(self, name)
        return output

    def _students_evaluation_step(
        self, name: str, step: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        metrics = StepMetrics(args[0] if args else None)
        with self._observed(training=False) as seen:
            output = step(*args, **kwargs)
        if passes := seen.take():
            distillation_loss(self._loss, passes, metrics)
        metrics.log(self, name)
        return output

    @student_hook(around=_students_training_step)
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The weighted sum of the student's loss and the distillation loss."""
        return self._own_step("training_step", batch)

    @student_hook(around=_students_evaluation_step)
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """As in training, without gradients."""
        return self._own_step("validation_step", batch)

    @student_hook(around=_students_evaluation_step)
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """As in training, without gradients."""
        return self._own_step("test_step", batch)

    @student_hook()
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """The student's output, for batches with or without a target."""
        return self(batch[0] if isinstance(batch, list | tuple) else batch)

    @student_hook()
    def configure_optimizers(self) -> Any:
        """What ``optimizer`` makes of the student's parameters.

        Raises:
            ValueError: If none of them requires gradients, as in a copy of a teacher.
        """
        if not any(one.requires_grad for one in self.student.parameters()):
            raise ValueError(
                f"student={type(self.student).__name__}: none of its parameters requires "
                "gradients, as in a copy of a teacher or an accelerated network; call "
                "student.requires_grad_() or pass the network itself"
            )
        return self._optimizer(self.student.parameters())

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Refuse a first step under manual optimization that nothing has been distilled into."""
        student = inner(self)
        if student is None:
            return
        if not self.automatic_optimization and not self._has_distilled:
            refuse_undistilled(student, self._logits, optimizer)
        student.on_before_optimizer_step(optimizer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what the run was distilled from, and how."""
        checkpoint["distillation"] = self._settings()
        # LightningCLI takes hyperparameters in a checkpoint for arguments: here, for the student
        own = checkpoint.get("hyper_parameters", {})
        if "student" in own:
            checkpoint["student_hyper_parameters"] = own.pop("student")
        student = inner(self)
        if student is not None:
            with students_keys(checkpoint):
                student.on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the student the structure in the checkpoint; warn if the run goes on otherwise."""
        student = inner(self)
        if student is not None:
            with students_keys(checkpoint):
                student.on_load_checkpoint(checkpoint)
        follow_state_dict(self, checkpoint["state_dict"])
        warn_of_changes(checkpoint.get("distillation", {}), self._settings())

    def _settings(self) -> dict[str, Any]:
        return {
            "alpha": self._alpha,
            "temperature": self._temperature,
            "loss": self._name_of_loss,
            "teacher": self._teacher.fingerprint(),
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DistillationModule":
        super()._apply(fn, recurse)
        self._teacher.to(self._student_device())
        return self

    def _student_device(self) -> torch.device:
        parameter = next(self.student.parameters(), None)
        return self.device if parameter is None else parameter.device

    def _observed(self, training: bool) -> AbstractContextManager[Observation]:
        network = observed_module(self.student, self._logits)
        return observe(network, self._ask_teacher, training)

    def _ask_teacher(self, *args: Any, **kwargs: Any) -> Any:
        # a copy of this module shares the teacher, and may have moved it
        self._teacher.to(self._student_device())
        return self._teacher(*args, **kwargs)

    def _weighted(self, loss: Tensor, passes: list[Pass], metrics: StepMetrics) -> Tensor:
        metrics.add("student_loss", loss)
        if not passes:
            return (1 - self._alpha) * loss
        distilled = distillation_loss(self._loss, passes, metrics)
        self._has_distilled = True
        # a term without weight may be NaN, as the cross entropy of a batch without a label is
        if self._alpha in (0, 1):
            return distilled if self._alpha else loss
        return (1 - self._alpha) * loss + self._alpha * distilled
