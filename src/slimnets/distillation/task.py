"""The task of a student that is a plain ``nn.Module``: classes, by cross entropy."""

from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from slimnets.distillation.losses import logits_of


def input_and_target(batch: Any) -> tuple[Any, Any]:
    """The two halves of a batch for a plain ``nn.Module``.

    Raises:
        TypeError: If ``batch`` is no pair.
    """
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    size = f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
    raise TypeError(
        f"batch: a {type(batch).__name__}{size}; a student that is a plain nn.Module needs batches "
        "of (input, target); for any other form make it a LightningModule"
    )


def cross_entropy(output: Any, target: Any) -> Tensor:
    """The loss of a plain ``nn.Module``.

    Raises:
        TypeError: If ``output`` holds no logits.
        ValueError: If ``target`` fits neither as class indices nor as probabilities.
    """
    logits = logits_of(output)
    if logits is None:
        raise TypeError(
            f"the student returned {type(output).__name__}: expected a tensor of logits or an "
            "output with .logits; for any other form make it a LightningModule"
        )
    if logits.ndim < 2 or logits.shape[1] < 2:
        raise ValueError(
            f"the student's logits have shape {tuple(logits.shape)}: expected (batch, classes, "
            "...) with at least two classes; for regression make it a LightningModule"
        )
    is_probability = isinstance(target, Tensor) and target.is_floating_point()
    if not (is_classes(target, logits) or (is_probability and target.shape == logits.shape)):
        what = (
            f"{tuple(target.shape)} of {target.dtype}"
            if isinstance(target, Tensor)
            else type(target).__name__
        )
        raise ValueError(
            f"target: {what}, for logits of shape {tuple(logits.shape)} = (batch, classes, ...); "
            "expected class indices of shape (batch, ...) or probabilities of the logits' shape"
        )
    return F.cross_entropy(logits, target if is_probability else target.long())


def check_probabilities(target: Any) -> None:
    """Raise ValueError if a target of floating-point numbers holds no probabilities of classes.

    Rows of zeros count for nothing, and are left.
    """
    if isinstance(target, Tensor) and target.is_floating_point() and target.numel():
        least, most = float(target.min()), float(target.sum(dim=1).max())
        if least < 0 or most > 1.02:  # 1 in bfloat16
            raise ValueError(
                f"target: has values of {least:g} and sums over the classes of {most:g}; expected "
                "probabilities, which are 0 or more and sum to 1; for several labels at once, or "
                "for regression, make the student a LightningModule"
            )


def is_classes(target: Any, logits: Tensor) -> TypeGuard[Tensor]:
    """Whether ``target`` holds the index of a class for every position of ``logits``."""
    return (
        isinstance(target, Tensor)
        and not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
        and target.shape == logits.shape[:1] + logits.shape[2:]
    )
