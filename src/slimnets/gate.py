"""Holding back callbacks that choose a network, until there is a compressed one to choose."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

C = TypeVar("C", ModelCheckpoint, EarlyStopping)


def after_target(callback: C) -> C:
    """Hold ``callback`` back until every pruning callback on its Trainer has reached its target.

    A dense network is nearly always better than the pruned one that it becomes: without this,
    ``ModelCheckpoint(monitor=...)`` keeps a best from before the target, and ``EarlyStopping``
    counts the decline as it is pruned. A second ``ModelCheckpoint`` can save what a resume needs.

    Args:
        callback: A ``ModelCheckpoint`` or ``EarlyStopping``; changed in place.

    Returns:
        The same callback.

    Raises:
        TypeError: If it is another callback.

    Examples:
        >>> best = after_target(ModelCheckpoint(monitor="val_accuracy", mode="max"))
    """
    if not isinstance(callback, ModelCheckpoint | EarlyStopping):
        raise TypeError(
            f"after_target({callback!r}): expected a ModelCheckpoint or an EarlyStopping"
        )
    for name in ("on_train_batch_end", "on_train_epoch_end", "on_validation_end"):
        setattr(callback, name, _held(getattr(callback, name)))
    return callback


def _held(hook: Callable[..., None]) -> Callable[..., None]:
    @wraps(hook)
    def held(trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if all(getattr(callback, "target_reached", True) for callback in callbacks):
            hook(trainer, *args, **kwargs)

    return held
