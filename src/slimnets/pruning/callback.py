"""Gradual pruning on a Lightning Trainer."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.optim import Optimizer

from slimnets.arguments import changed, plain, spell
from slimnets.inspection.tensorboard import log_masks, log_summary, log_weights
from slimnets.layers import compressed_network
from slimnets.pruning.clock import Clock, untraced
from slimnets.pruning.criteria import Criterion, check_criterion, magnitude
from slimnets.pruning.pruner import Pruner
from slimnets.pruning.report import (
    overall,
    scalars,
    warn_at_end,
    warn_at_start,
    warn_if_too_short,
    warn_of_changes,
    warn_of_others,
)
from slimnets.pruning.run import Run
from slimnets.pruning.schedules import check_schedule, cubic
from slimnets.pruning.span import Span, Steps, check_span, resolve_span
from slimnets.pruning.weights import (
    Scope,
    Sparsity,
    check_fraction,
    check_scope,
    check_sparsity,
    target_sparsity,
)
from slimnets.selectors import Selectors, as_selectors
from slimnets.trainer import (
    callbacks_of,
    has_time_limit,
    is_fast_dev_run,
    logged_step,
    refuse_unsupported,
    remaining_steps,
    writes_summary,
)


class GradualPrune(L.Callback):
    """Prune the network while it trains, from an initial to a final sparsity.

    Every ``every`` optimizer steps from ``begin`` to ``end``, the weights of the lowest scores are
    set to zero, until each layer has exactly ``round(sparsity * n)`` zeros among its ``n`` weights.
    Zeros stay zero after every optimizer step, and so do those that the network begins with. The
    masks are state of this callback, one byte a weight: the network's state dict keeps its keys.
    Under ``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook`` the weights come back with their zeros,
    but ``masks`` and ``target_reached`` stay in the processes that trained; ``ddp`` has them here.

    Layers that are initialised with rows or columns of zeros, to be trained from there, cannot be
    told from pruned ones: exclude them, or initialise them with small numbers.

    Several on one Trainer are told apart by their globs, in ``sparsity`` and ``exclude``, and the
    names of types and functions there.

    Zhu & Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
    compression" (arXiv 1710.01878).

    Args:
        sparsity: The final share of zeros, a fraction in [0, 1); or a mapping of globs over layer
            names to fractions, of which the first that matches wins; layers that none matches are
            left alone.
        initial: The share of zeros at ``begin``.
        begin: The first update: an int is optimizer steps, a float in [0, 1] a fraction of the run.
            The steps are those of the optimizer that owns the weights; of several, those of all.
        end: The last update, at which ``sparsity`` is reached; an int or a float as above.
        every: The steps from one update to the next; an int or a float as above, at least one step.
            The figures of each update are logged.
        schedule: From progress in [0, 1] to a share in [0, 1] of the way from ``initial`` to
            ``sparsity``: ``cubic``, ``linear``, ``one_shot`` or any callable with
            ``schedule(1.0) == 1.0``.
        criterion: From a parameter to scores of its shape, the lowest of which are pruned:
            ``magnitude``, ``lamp``, ``random`` or any callable.
        scope: ``"layer"``, the same sparsity in every layer; or ``"global"``, the lowest scores of
            the whole network, which ``lamp`` makes comparable.
        exclude: Layers to leave alone: globs over names, types, with what is within them, or
            predicates of (name, layer); in YAML, globs. Globs and predicates go on choosing a layer
            that ``LowRank`` replaces; a type of layer that is a class of your own does not, for the
            pair is of ordinary layers.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of range; in ``fit``, before any weight is changed, if a
            glob matches no layer or the run is too short.
        NotImplementedError: In ``fit``, under a strategy that shards the weights.

    Examples:
        >>> prune = GradualPrune(0.9, exclude="classifier.*")
        >>> trainer = L.Trainer(max_epochs=10, callbacks=[prune], logger=False)
    """

    compresses = True

    def __init__(
        self,
        sparsity: Sparsity,
        *,
        initial: float = 0.0,
        begin: Steps = 0.0,
        end: Steps = 0.75,
        every: Steps = 0.01,
        schedule: Callable[[float], float] = cubic,
        criterion: Criterion = magnitude,
        scope: Scope = "layer",
        exclude: Selectors = (),
    ) -> None:
        begin, end, every = plain(begin), plain(end), plain(every)
        check_sparsity(sparsity)
        check_fraction(initial, "initial")
        finals = sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]
        if any(initial > final for final in finals):
            raise ValueError(
                f"initial={initial!r}, sparsity={sparsity!r}: masks only grow, so pruning cannot "
                "begin with more zeros than it ends with"
            )
        check_span(begin, end, every)
        check_scope(scope, sparsity)
        check_schedule(schedule)
        check_criterion(criterion)

        # Python's own numbers, of which checkpoints write the same
        self.sparsity: Sparsity
        if isinstance(sparsity, Mapping):
            self.sparsity = {glob: float(share) for glob, share in sparsity.items()}
        else:
            self.sparsity = float(sparsity)
        self.initial = float(initial)
        self.begin, self.end, self.every = begin, end, every
        self.schedule = schedule
        self.criterion = criterion
        self.scope: Scope = scope
        self.exclude = as_selectors(exclude)

        self._run: Run | None = None
        self._before: Run | None = None  # the last one, until the next begins
        self._restored: dict[str, Any] | None = None
        self._is_fitting = False

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name of each weight to its mask, bool, True where it is kept; empty before ``fit``."""
        pruned = self._run.pruner.pruned if self._run else {}
        return {name: ~mask for name, mask in pruned.items()}

    @property
    def target_reached(self) -> bool:
        """Whether the network is as sparse as asked."""
        return self._run is not None and self._run.pruner.reached

    @property
    def state_key(self) -> str:
        """Tells two instances on one Trainer apart by the layers that they prune."""
        globs = sorted(self.sparsity) if isinstance(self.sparsity, Mapping) else None
        return self._generate_state_key(globs=globs, exclude=self._excluded())

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot work, and forget another run."""
        refuse_unsupported(trainer, self)
        self._is_fitting = stage == "fit"
        if self._is_fitting:
            # a callback that has served another run begins anew; a checkpoint is restored later
            self._before, self._run, self._restored = self._run, None, None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the weights and the steps of the run; nothing is pruned yet."""
        network = compressed_network(pl_module)
        restored, self._restored = self._restored, None
        steps = restored["steps"] if restored else [0] * len(trainer.optimizers)
        before, now = restored["arguments"] if restored else {}, self._arguments()
        warn_of_changes(before, now)
        if restored and not changed(before, now):
            span = Span(*restored["span"])
            if not is_fast_dev_run(trainer):
                warn_if_too_short(span, self._length(trainer, steps))
        else:
            span = self._resolve(trainer, steps)
        pruner = self._make_pruner(trainer, network)
        if restored and restored["masks"]:
            pruner.load_state_dict(restored["masks"])

        warn_at_start(network, pruner, self.sparsity, self.exclude)
        self._stop()
        clock = Clock(span, steps, self.initial, self.schedule)
        self._run, self._before = Run(pruner, clock, self._make_pruner), None
        self._run.begin(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Follow optimizers that were made anew in the middle of the run."""
        if self._run:
            self._run.before_batch(trainer)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mask the gradients that a step of manual optimization clips itself."""
        if self._run and not pl_module.automatic_optimization:
            self._run.pruner.mask_gradients()

    @untraced
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Mask the gradients, before they are clipped; and prune, if pruning begins at step 0."""
        if self._run:
            self._run.before_step(trainer, optimizer)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count what the gradient scaler has skipped, prune what has waited for it, and log."""
        if self._run:
            self._run.after_batch(trainer, pl_module)
            self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune what the module has written since the last step, before a checkpoint keeps it."""
        self._keep_zeros()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same in the middle of an epoch."""
        if self._run and self._run.clock.is_running:
            self._keep_zeros()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if the target was not reached."""
        self._stop()
        self._keep_zeros()
        if self._run and not is_fast_dev_run(trainer):
            warn_at_end(self._run.pruner, self._run.clock.latest, self._run.clock.span)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the masks and the weights that are left, averaged weights copied back by now."""
        self._keep_zeros()  # others may have written weights when training ended, after us
        network, masks = compressed_network(pl_module), self.masks
        log_masks(trainer, masks)
        log_weights(trainer, network, masks)
        if writes_summary(trainer, self):
            log_summary(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leave no hook behind."""
        self._stop()
        self._restored = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Prune what was written in ``on_fit_end``, the module's or a callback's after this one."""
        if stage == "fit":
            self._keep_zeros()
            if self._run is None and self._restored is None:  # there was nothing left to train
                self._run, self._before = self._before, None

    def state_dict(self) -> dict[str, Any]:
        """Masks at one bit a weight, steps, span, and the arguments for comparison."""
        if self._run is None:  # of a run that was over when it was resumed, what was loaded
            return self._restored or {}
        span = self._run.clock.span
        return {
            "arguments": self._arguments(),
            "steps": list(self._run.clock.steps),
            "span": [span.begin, span.end, span.every],
            "masks": self._run.pruner.state_dict(),
        }

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave out masks of layers that have just been replaced; the zeros are in the weights."""
        if self._run and not self._run.pruner.is_of(compressed_network(pl_module)):
            checkpoint["callbacks"][self.state_key]["masks"] = {}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with the steps of the only GradualPrune that had other globs or another exclude."""
        states: dict[str, dict[str, Any]] = checkpoint["callbacks"]
        if not self._is_fitting or self.state_key in states:
            return
        kind = f"{type(self).__qualname__}{{"
        known = {callback.state_key for callback in callbacks_of(trainer)}
        others = [key for key in states if str(key).startswith(kind) and key not in known]
        if len(others) == 1:  # the masks are of other layers; the zeros of these are in the weights
            self.load_state_dict({**states[others[0]], "masks": {}})
        elif others:
            warn_of_others(self.state_key, others)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the layers are known, in ``on_train_start``.

        In the middle of a run, go back to it at once: a finder's trial is over.
        """
        if self._run and self._run.clock.is_running:
            self._run.go_back(state_dict)
            return
        self._restored = state_dict if state_dict and self._is_fitting else None

    def _resolve(self, trainer: L.Trainer, steps: list[int]) -> Span:
        length = self._length(trainer, steps)
        if is_fast_dev_run(trainer):
            return Span(0, 1 if math.isinf(length) else max(1, int(length)), 1)
        relative = any(isinstance(value, float) for value in (self.begin, self.end, self.every))
        if relative and has_time_limit(trainer):
            length = math.inf
        return resolve_span(self.begin, self.end, self.every, length)

    def _length(self, trainer: L.Trainer, steps: list[int]) -> float:
        return max(steps, default=0) + remaining_steps(trainer)

    def _arguments(self) -> dict[str, str]:
        names = ("sparsity", "initial", "begin", "end", "every", "schedule", "criterion", "scope")
        values = {name: spell(getattr(self, name)) for name in names}
        return {**values, "exclude": repr(self._excluded())}

    def _excluded(self) -> list[str]:
        return [spell(one) for one in self.exclude]

    def _make_pruner(self, trainer: L.Trainer, network: nn.Module) -> Pruner:
        parameters, targets = target_sparsity(network, self.sparsity, self.exclude)
        for other, run in self._runs(trainer).items():
            taken = set(run.pruner.parameters.values()) & set(parameters.values())
            if other is not self and taken:
                names = [name for name, weights in parameters.items() if weights in taken]
                raise ValueError(
                    f"two GradualPrune callbacks prune {names}: give each a mapping of globs, or "
                    "exclude=, so that no layer is pruned by both"
                )
        several = trainer.world_size > 1
        return Pruner(parameters, targets, self.criterion, self.scope, synchronize=several)

    def _runs(self, trainer: L.Trainer) -> dict["GradualPrune", Run]:
        """The callbacks of this class on ``trainer`` that have begun, in order, and their runs."""
        own = [one for one in callbacks_of(trainer) if isinstance(one, GradualPrune)]
        return {one: one._run for one in own if one._run is not None}

    def _keep_zeros(self) -> None:
        if self._run:
            self._run.keep_zeros()

    def _stop(self) -> None:
        if self._run:
            self._run.clock.stop()

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        runs = [*self._runs(trainer).values()]
        # the last speaks for all, once, when each of them has seen the batch
        if trainer.barebones or runs[-1] is not self._run:
            return
        zeros = overall([run.pruner for run in runs])
        pl_module.log("sparsity", zeros, prog_bar=True, on_step=True)
        if not (news := [run for run in runs if run.has_news and run.has_pruned]):
            return
        for run in news:
            run.has_news = False
        figures = scalars([run.pruner for run in news], {run.pruner: run.due() for run in runs})
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=logged_step(trainer))
