"""What is asked of the arguments of a DistillationModule."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer

from slimnets.arguments import changed, check_number
from slimnets.distillation.losses import DEFAULT_TEMPERATURE, check_temperature


def check_networks(student: Any, teacher: Any) -> None:
    """Raise TypeError or ValueError unless ``student`` can learn from ``teacher``."""
    for name, network in (("student", student), ("teacher", teacher)):
        if not isinstance(network, nn.Module):
            raise TypeError(f"{name}={network!r:.80}: expected an nn.Module or LightningModule")
    packages = {kind.__module__.partition(".")[0] for kind in type(student).__mro__}
    if "pytorch_lightning" in packages:
        raise TypeError(
            f"student={type(student).__name__}: a LightningModule of the package "
            "pytorch_lightning; import LightningModule and Trainer from lightning.pytorch instead"
        )
    if isinstance(getattr(student, "_orig_mod", None), L.LightningModule):
        raise TypeError(
            "student: a compiled LightningModule; compile its layers, or the DistillationModule"
        )
    missing = (nn.Module.forward, L.LightningModule.forward)
    if getattr(teacher.forward, "__func__", None) in missing:
        raise TypeError(
            f"teacher={type(teacher).__name__}: has no forward(); pass the network in it: "
            f"{_children(teacher)}"
        )
    names = {id(parameter): name for name, parameter in teacher.named_parameters()}
    for name, parameter in student.named_parameters():
        if id(parameter) in names:
            raise ValueError(
                f"teacher: its parameter {names[id(parameter)]!r} is also the student's {name!r}, "
                "so that training would change the teacher; pass copy.deepcopy(teacher)"
            )
    modules = {id(module): name for name, module in teacher.named_modules()}
    for name, module in student.named_modules():
        # one mode for both: dropout, and statistics without weights
        has_mode = isinstance(module, _DropoutNd) or any(True for _ in module.buffers(False))
        if has_mode and id(module) in modules:
            raise ValueError(
                f"teacher: its module {modules[id(module)]!r} is also the student's {name!r}, and "
                "would go into training with it; pass copy.deepcopy(teacher)"
            )


def check_settings(
    alpha: Any, temperature: Any, loss: Any, optimizer: Any, student: nn.Module
) -> None:
    """Raise TypeError or ValueError for an argument that makes no sense."""
    expected = "the weight of the distillation loss, a fraction in [0, 1]"
    check_number("alpha", alpha, expected, lambda number: 0 <= number <= 1)
    check_temperature(temperature)
    if loss is not None and not callable(loss):
        raise TypeError(
            f"loss={loss!r}: expected a function of the student's and the teacher's output"
        )
    if loss is not None and temperature != DEFAULT_TEMPERATURE:
        raise ValueError(
            f"temperature={temperature!r}: is of the default loss only, and loss= is given; for "
            "soft targets leave loss= out, or set the temperature in your own loss"
        )
    if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
        raise ValueError(
            f"loss={type(loss).__name__}: has parameters, which no optimizer would train; "
            "make them a part of a LightningModule student"
        )
    if optimizer is None:
        return
    if isinstance(student, L.LightningModule):
        raise ValueError(
            "optimizer: is for a plain nn.Module; the optimizers of a LightningModule student are "
            f"those of {type(student).__name__}.configure_optimizers"
        )
    if isinstance(optimizer, Optimizer) or not callable(optimizer):
        raise TypeError(
            f"optimizer={type(optimizer).__name__}: expected a function of the parameters, such as "
            "functools.partial(torch.optim.SGD, lr=0.1)"
        )


def check_logits(student: nn.Module, logits: str | None) -> None:
    """Raise unless ``logits`` is for this kind of student, and names a submodule or may do later.

    Layers that are made in ``configure_model`` or ``setup`` do not exist yet.
    """
    if logits is None:
        return
    if not isinstance(student, L.LightningModule):
        raise ValueError(
            f"logits={logits!r}: is for a LightningModule; the logits of a plain nn.Module are "
            "what it returns"
        )
    if not (is_overridden("configure_model", student) or is_overridden("setup", student)):
        observed_module(student, logits)


def observed_module(student: nn.Module, logits: str | None) -> nn.Module:
    """The submodule of ``student`` that returns the logits.

    Raises:
        ValueError: If ``logits`` names none.
    """
    try:
        return student.get_submodule(logits or "")
    except AttributeError:
        raise ValueError(
            f"logits={logits!r}: {type(student).__name__} has no such submodule; "
            f"{_children(student)}"
        ) from None


def _children(network: nn.Module) -> str:
    """A sentence that tells the names of the submodules of ``network``."""
    return f"its submodules are {', '.join(repr(name) for name, _ in network.named_children())}"


def no_logits(student: nn.Module, logits: str | None) -> str:
    """What to say where a step made no forward pass to distill from."""
    through = f"logits={logits!r}" if logits else "the student itself, as self(x)"
    message = (
        f"{type(student).__name__}.training_step made no forward pass with gradients through "
        f"{through}, so there are no logits to distill; name the submodule that is called and "
        f"returns them, DistillationModule(..., logits='NAME'): {_children(student)}"
    )
    if not getattr(student, "automatic_optimization", True):
        message += "; and call self.manual_backward(loss), not loss.backward()"
    return message


def refuse_undistilled(student: nn.Module, logits: str | None, optimizer: Optimizer) -> None:
    """Raise RuntimeError if a step of ``optimizer`` would train what returns the logits.

    For a first step under manual optimization that nothing has been distilled into; the
    discriminator of a GAN may go before the generator.
    """
    trained = set(observed_module(student, logits).parameters())
    if any(
        parameter in trained for group in optimizer.param_groups for parameter in group["params"]
    ):
        raise RuntimeError(no_logits(student, logits))


def warn_of_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn of what a checkpoint was distilled with, ``before``, and a run that goes on is not."""
    for name in changed(before, now):
        if name == "teacher":
            rank_zero_warn("teacher: not the one that the checkpoint was distilled from")
        else:
            rank_zero_warn(f"{name}={now[name]}: {before[name]} in the checkpoint")
