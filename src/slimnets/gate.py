"""Holding back callbacks that choose a network, until there is a compressed one to choose."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from slimnets.trainer import callbacks_of

C = TypeVar("C", ModelCheckpoint, EarlyStopping)


def after_target(callback: C) -> C:
    """Hold ``callback`` back until the compressing callbacks on its Trainer have reached their aim.

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
    if not isinstance(callback, _Held):
        callback.__class__ = _held(type(callback))
    return callback


HOOKS = ("on_train_batch_end", "on_train_epoch_end", "on_validation_end", "on_train_end")


class _Held:
    """Put before a callback's own class, by ``_held``."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # pickle finds no class that is made at run time
        return _restore, (type(self).__mro__[2],), self.__dict__


def _held(kind: type) -> type:
    """``kind`` with hooks that run only when the target is reached."""
    hooks = {name: _when_reached(getattr(kind, name)) for name in HOOKS}
    # by the same name, which is in the key of its state in checkpoints
    return type(kind.__name__, (_Held, kind), {"__qualname__": kind.__qualname__, **hooks})


def _when_reached(hook: Callable[..., None]) -> Callable[..., None]:
    @wraps(hook)
    def held(callback: L.Callback, trainer: L.Trainer, *args: Any) -> None:
        if all(getattr(one, "target_reached", True) for one in callbacks_of(trainer)):
            hook(callback, trainer, *args)

    return held


def _restore(kind: type) -> Any:
    return object.__new__(_held(kind))
