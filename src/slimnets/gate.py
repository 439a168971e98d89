"""Holding back callbacks that choose a network, until there is a compressed one to choose."""

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


class _Held:
    """Put before a callback's own class: its hooks run only when the target is reached."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if _is_reached(trainer):
            super().on_train_batch_end(trainer, *args)  # type: ignore[misc]

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if _is_reached(trainer):
            super().on_train_epoch_end(trainer, *args)  # type: ignore[misc]

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        if _is_reached(trainer):
            super().on_validation_end(trainer, *args)  # type: ignore[misc]

    def on_train_end(self, trainer: L.Trainer, *args: Any) -> None:
        if _is_reached(trainer):
            super().on_train_end(trainer, *args)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # pickle finds no class that is made at run time
        return _restore, (type(self).__mro__[2],), self.__dict__


def _held(kind: type) -> type:
    # by the same name, which is in the key of its state in checkpoints
    return type(kind.__name__, (_Held, kind), {"__qualname__": kind.__qualname__})


def _restore(kind: type) -> Any:
    return object.__new__(_held(kind))


def _is_reached(trainer: L.Trainer) -> bool:
    return all(getattr(one, "target_reached", True) for one in callbacks_of(trainer))
