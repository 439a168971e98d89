"""One run on a Trainer: the masks, and the clock that they follow."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning as L
from torch import nn
from torch.optim import Optimizer

from slimnets.layers import compressed_network
from slimnets.pruning.clock import Clock
from slimnets.pruning.pruner import Pruner
from slimnets.trainer import averaged_networks


class Run:
    """The masks and the clock of one run, and how far they have come.

    It keeps no Trainer, which a copy of the callback would copy.

    Args:
        pruner: The weights and their masks.
        clock: Counts the steps.
        find: Makes a pruner of what is in the place of layers that have been replaced.
    """

    def __init__(
        self, pruner: Pruner, clock: Clock, find: Callable[[L.Trainer, nn.Module], Pruner]
    ) -> None:
        self.pruner = pruner
        self.clock = clock
        self.has_news = True  # for the loggers
        self._find = find
        self._start = 0  # trainer.global_step at step 0
        self._progress: list[float | None] = []  # of each optimizer, at the last update of all
        self._tried: set[int] = set()  # optimizers with whose weights the criterion has been

    @property
    def has_pruned(self) -> bool:
        """Whether there has been an update."""
        return bool(self._progress)

    def begin(self, trainer: L.Trainer) -> None:
        """Count the steps of the Trainer's optimizers from here on."""
        self._start = trainer.global_step - max(self.clock.steps, default=0)
        self.clock.start(trainer.optimizers, partial(self._after_step, trainer))

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Take over the steps and masks of a checkpoint, in the middle of the run."""
        self.clock.steps = list(state["steps"])
        self.pruner.load_state_dict(state["masks"])
        self._progress = []

    def before_batch(self, trainer: L.Trainer) -> None:
        """Follow optimizers that were made anew in the middle of the run."""
        self.clock.follow(trainer.optimizers, partial(self._after_step, trainer))

    def before_step(self, trainer: L.Trainer, optimizer: Optimizer) -> None:
        """Mask the gradients; and prune, if pruning begins at step 0."""
        index = trainer.optimizers.index(optimizer)
        if index not in self._tried:  # others may have no gradients yet
            several = len(trainer.optimizers) > 1
            self.pruner.try_criterion(self.due(index if several else None))
            self._tried.add(index)
        if not self.clock.steps[index]:
            self._grow(trainer, index)
        self.pruner.mask_gradients()

    def _after_step(self, trainer: L.Trainer, index: int) -> None:
        self._follow(trainer, compressed_network(trainer.lightning_module))
        self._grow(trainer, index)
        self.keep_zeros()

    def after_batch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count what the gradient scaler has skipped, and prune what has waited for it."""
        self.clock.settle()
        steps = self.clock.steps
        if pl_module.automatic_optimization and steps:
            # a step that the scaler skips for its infinities runs no hook of the optimizer
            steps[0] = max(steps[0], trainer.global_step - self._start)
        # layers may have been replaced for a step that is still to come, and a checkpoint be due
        self._follow(trainer, compressed_network(pl_module))
        if any(steps):
            self._grow(trainer)

    def keep_zeros(self) -> None:
        """Set pruned weights to zero, whoever has written them."""
        self.pruner.apply(self.pruner.parameters)

    def due(self, index: int | None = None) -> dict[str, float]:
        """The share of zeros that each weight should have by now, of one optimizer or of all."""
        return self.clock.due(self.pruner.parameters, self.pruner.targets, index)

    def _follow(self, trainer: L.Trainer, network: nn.Module) -> None:
        """Take up the layers that have replaced others in the middle of the run, if any have."""
        if self.pruner.is_of(network):
            return
        self.keep_zeros()  # momentum has moved those of the other layers, whose masks begin anew
        self.pruner = self._find(trainer, network)
        self._progress = []  # so that the new weights are pruned at once, as far as is due

    def _grow(self, trainer: L.Trainer, index: int | None = None) -> None:
        """Let the masks grow that are due: after a step, those of the weights that it changes.

        Other weights wait for the end of the batch, since a graph through them may still be alive.
        """
        progress = self.clock.progress
        if progress == self._progress:
            return
        if len(progress) == 1:
            index = None
        if index is None:
            self._progress = progress
        self.has_news = True  # the target has moved, even where rounding moves no mask
        if self.pruner.grow(self.due(index)):
            # an average of zeros stays zero, so it is enough to mask the averages here
            for network in averaged_networks(trainer):
                self.pruner.apply(dict(network.named_parameters(remove_duplicate=False)))
