"""What the callbacks ask of Lightning's Trainer."""

import math
from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn
from torch.optim.swa_utils import AveragedModel

from slimnets.layers import compressed_network


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """The callbacks on ``trainer``, in order."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def refuse_unsupported(trainer: L.Trainer, callback: L.Callback) -> None:
    """Raise where ``callback`` could not work, before it does anything.

    Raises:
        TypeError: On a Trainer of the package ``pytorch_lightning``, whose hooks, strategies and
            callbacks are other classes.
        NotImplementedError: Under FSDP, FSDP2 (``ModelParallelStrategy``) and DeepSpeed, which
            shard the weights, so that no process sees a whole layer.
    """
    if not isinstance(trainer, L.Trainer):
        raise TypeError(
            f"{type(callback).__name__} is for the package lightning: import Trainer and "
            "LightningModule from lightning.pytorch, not from "
            f"{type(trainer).__module__.partition('.')[0]}"
        )
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise NotImplementedError(
            f"{type(callback).__name__} does not support {type(trainer.strategy).__name__}, which "
            "shards the weights; use strategy='ddp' or a single device"
        )


def refuse_spawned(trainer: L.Trainer, callback: L.Callback) -> None:
    """Raise NotImplementedError where layers would be replaced in processes that are spawned.

    What these have trained is loaded into the module of the process that spawned them, which has
    the layers before, with ``strict=False``, so that it would be lost without a word.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise NotImplementedError(
            f"{type(callback).__name__} does not support strategies that spawn or fork their "
            "processes; use strategy='ddp' or a single device"
        )


def averages(
    trainer: L.Trainer,
) -> Iterator[tuple[WeightAveraging | StochasticWeightAveraging, nn.Module]]:
    """The callbacks on ``trainer`` that have begun to average, each with its averaged copy."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            average = callback._average_model  # neither callback has a public name for it
            if average is not None:
                yield callback, average


def averaged_networks(trainer: L.Trainer) -> Iterator[nn.Module]:
    """The averaged copies of the compressed network that callbacks on ``trainer`` keep."""
    for _, average in averages(trainer):
        yield compressed_network(average)


def unwrapped(average: nn.Module) -> nn.Module:
    """The averaged copy of the module, without what ``WeightAveraging`` puts around it."""
    return average.module if isinstance(average, AveragedModel) else average


def copy_averages_anew(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Let every averaging callback copy ``pl_module`` again, after its layers have changed.

    They copy it in their own ``setup``, which may have run before ours.
    """
    for callback, _ in averages(trainer):
        callback.setup(trainer, pl_module, "fit")


def remaining_steps(trainer: L.Trainer) -> float:
    """Optimizer steps from here to the end of the run.

    Lightning's ``estimated_stepping_batches`` is wrong under a ``GradientAccumulationScheduler``,
    under ``StochasticWeightAveraging`` and for loaders without length. Ask in ``on_train_start`` or
    later, when the training data is set up.

    Returns:
        The number of steps; ``math.inf`` where it is not limited or not known, as under manual
        optimization.
    """
    if not trainer.lightning_module.automatic_optimization:
        return math.inf
    total: float = math.inf
    batches, max_epochs = trainer.num_training_batches, trainer.max_epochs
    swa = [one for one in callbacks_of(trainer) if isinstance(one, StochasticWeightAveraging)]
    if swa:
        max_epochs = swa[0]._max_epochs  # before it added an epoch without steps
    if max_epochs is not None and max_epochs != -1 and not math.isinf(batches):
        total = sum(
            math.ceil(batches / accumulation(trainer, epoch))
            for epoch in range(trainer.current_epoch, max_epochs)
        )
        epoch: Any = trainer.fit_loop.epoch_progress.current
        batch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        # after its last batch an epoch is processed, and counted as over, before it is completed
        if trainer.fit_loop.restarted_mid_epoch and epoch.ready > epoch.processed:
            # a checkpoint that is saved when a batch ends does not count it as completed
            total -= batch.processed // accumulation(trainer, trainer.current_epoch)
    if trainer.max_steps != -1:
        total = min(total, trainer.max_steps - trainer.global_step)
    return total


def accumulation(trainer: L.Trainer, epoch: int) -> int:
    """How many batches one optimizer step takes in ``epoch``."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def has_time_limit(trainer: L.Trainer) -> bool:
    """Whether the run may be ended by the clock, before its last step."""
    return any(isinstance(callback, Timer) for callback in callbacks_of(trainer))


def logged_step(trainer: L.Trainer) -> int:
    """The step that Lightning gives to what modules log, for curves that share an axis."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def is_fast_dev_run(trainer: L.Trainer) -> bool:
    """Whether the run is a smoke test of a few batches."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def writes_summary(trainer: L.Trainer, callback: L.Callback) -> bool:
    """Whether ``callback`` is the first on ``trainer`` that compresses, so that one writes for all.

    A callback that compresses says so in an attribute ``compresses = True``.
    """
    compressing = (one for one in callbacks_of(trainer) if getattr(one, "compresses", False))
    return next(compressing, None) is callback
