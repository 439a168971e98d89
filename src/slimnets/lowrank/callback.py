"""Low-rank replacement on a Lightning Trainer."""

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slimnets.arguments import plain, spell
from slimnets.inspection.tensorboard import log_summary
from slimnets.layers import compressed_network, paths_in, replace
from slimnets.lowrank.decompose import Decomposition
from slimnets.lowrank.factorize import put_pairs
from slimnets.lowrank.follow import follow_state_dict
from slimnets.lowrank.modules import LowRankPair, pairs_of
from slimnets.lowrank.plan import Plan, Rank, check_arguments, named_layers, plan
from slimnets.lowrank.report import scalars, tell, warn_if_too_short, warn_of_changes
from slimnets.lowrank.swap import (
    check_at,
    check_run,
    refuse_stale,
    resolve_at,
    swap,
    values_of_untrained,
    warn_of_averages,
)
from slimnets.selectors import Selectors
from slimnets.trainer import (
    copy_averages_anew,
    logged_step,
    refuse_spawned,
    refuse_unsupported,
    writes_summary,
)


class LowRank(L.Callback):
    """Train with low-rank pairs in the place of layers, keeping what the layers had learned.

    At the start of ``fit`` the layers of the compressed network are replaced as
    :func:`slimnets.factorize` does, before weights are restored and optimizers are built. A
    checkpoint decides the structure when it is loaded, in ``fit`` as in ``validate``, ``test`` and
    ``predict``, so that it can be given to a freshly built dense module; without a checkpoint,
    these evaluate the network as it is. Without this callback on the Trainer, and in
    ``load_from_checkpoint``, a dense module does not know the pairs: make a file of the checkpoint
    with :func:`slimnets.convert_checkpoint`, and :func:`slimnets.load` it. A run that fails or ends
    before its first optimizer step leaves the layers as they were. The ``weight`` of a pair is
    computed from two: give optimizers the ``parameters()`` of layers.

    With ``at``, training begins with the dense layers, and they are replaced in the middle of the
    run. Optimizers get the new parameters in the place of the old ones: what they keep of biases
    and of other layers goes on, what they keep of the replaced weights starts afresh, and so do
    the averages of ``WeightAveraging``.

    Args:
        r: The rank; a fraction of each layer's full rank in (0, 1); or a mapping of globs over
            layer names to either, of which the first that matches counts and the others are left.
        energy: In place of ``r``: the share of the squared singular values that each layer keeps,
            in (0, 1).
        budget: In place of ``r``: the share of their weights that the layers keep together, in
            (0, 1). Ranks are chosen layer by layer, for as much as possible of what all of them
            compute (:func:`slimnets.lowrank.budget.ranks_for_budget`).
        decomposition: ``"spatial"`` turns a d x d convolution into d x 1 and 1 x d (Tai et al.,
            arXiv 1511.06067), ``"channel"`` into d x d and 1 x 1.
        exclude: Layers to leave: globs, types, with what is within them, or predicates of
            (name, layer); in YAML, globs.
        at: When to replace: after that many optimizer steps, if an int; at that fraction of the
            run in (0, 1), if a float. By default, before training. Steps are those of all
            optimizers, from the beginning of a run that is resumed.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If one is out of range; in ``setup``, if a glob matches nothing, a weight is
            not finite, the budget is too small for any pairs, or there is no layer yet; in
            ``on_train_start``, if the run ends before ``at``, an optimizer was made before
            ``setup``, or ``at`` stands beside LBFGS.
        NotImplementedError: In ``setup``, under a strategy that shards the weights, or one that
            spawns or forks its processes; with ``at``, under one of several processes, or beside a
            ``BaseFinetuning``.

    Examples:
        >>> trainer = L.Trainer(callbacks=[LowRank({"features.*": 0.25})], logger=False)
    """

    compresses = True

    def __init__(
        self,
        r: Rank | Mapping[str, Rank] | None = None,
        *,
        energy: float | None = None,
        budget: float | None = None,
        decomposition: Decomposition = "spatial",
        exclude: Selectors = (),
        at: int | float | None = None,
    ) -> None:
        r, energy, budget, at = plain(r), plain(energy), plain(budget), plain(at)
        self._exclude = check_arguments(r, energy, budget, decomposition, exclude)
        check_at(at)
        self._at = at
        self._r = r
        self._energy = energy
        self._budget = budget
        self._decomposition: Decomposition = decomposition
        self._step: int | None = None  # of `at`
        self._begun: int | None = None  # trainer.global_step when the run began, before a resume
        self._done = False
        self._start = 0  # trainer.global_step of this fit
        self._run = ""
        self._names: set[str] = set()
        self._ranks: dict[str, int] = {}
        self._originals: dict[str, nn.Module] = {}
        self._untrained: dict[str, Tensor] = {}  # before `at`
        self._hook: RemovableHandle | None = None

    @property
    def state_key(self) -> str:
        """Tells two instances apart by the layers they are for; ranks may change on resume."""
        globs = list(self._r) if isinstance(self._r, dict) else ["*"]
        return self._generate_state_key(layers=globs, exclude=[spell(x) for x in self._exclude])

    @property
    def target_reached(self) -> bool:
        """Whether the layers have been replaced."""
        return self._done

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Replace the layers, in ``fit``; in every stage, be ready for a checkpoint."""
        refuse_unsupported(trainer, self)
        is_fitting = stage == TrainerFn.FITTING
        if is_fitting:
            refuse_spawned(trainer, self)
        self._release()
        self._follow(pl_module)
        if is_fitting and is_overridden("configure_model", pl_module):
            pl_module.configure_model()
        network = compressed_network(pl_module)
        layers = named_layers(network)
        self._originals = paths_in(pl_module, layers)
        if not is_fitting:
            return
        if not layers:
            raise ValueError(
                f"LowRank finds no layer in {type(network).__name__}: build them in __init__ or "
                "configure_model; the module's own setup runs after those of callbacks"
            )
        self._names, self._ranks = set(layers), {}
        self._step, self._begun, self._start = None, None, trainer.global_step
        self._run = uuid4().hex
        if self._at is not None:
            check_run(trainer, self._at)
        todo = self._plan(pl_module)
        if self._at is None:
            # with energy=, processes whose initial weights differ would come to different ranks
            self._ranks = trainer.strategy.broadcast(todo.ranks)
            put_pairs(pl_module, paths_in(pl_module, self._ranks), self._decomposition)
        self._done = self._at is None or not todo.ranks  # a second run finds them replaced
        if self._done:
            tell(todo, compressed_network(pl_module))  # a root that is a layer is another one now
        # also where nothing was replaced, for the hook to be on the averages
        copy_averages_anew(trainer, pl_module)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to resume from a dense network; warn if it was made with other arguments.

        Raises:
            ValueError: If the checkpoint was made without this callback, and its layers are dense.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        state = checkpoint["callbacks"].get(self.state_key, {})
        if state.get("run") != self._run:  # the trial runs of a finder end with their own
            self._originals = {}  # the weights of the rest are those of the checkpoint by now
        before = state.get("arguments", {})
        if self._at is not None:
            self._done = state.get("done", False)
            self._step = state["step"] if before.get("at") == self._at else None
            self._begun = state.get("begun")
        is_dense = not self._ranks.keys() & pairs_of(compressed_network(pl_module)).keys()
        if not state and self._ranks and is_dense:
            raise ValueError(
                f"LowRank cannot resume from {trainer.ckpt_path}, whose layers are dense: load "
                "its weights into the module, and fit without ckpt_path"
            )
        warn_of_changes(before, self._arguments(), is_done=self._done)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See that the layers are still those of ``setup``.

        Raises:
            ValueError: If the module has built layers since, or loaded dense weights into them.
        """
        layers = named_layers(compressed_network(pl_module))
        late = layers.keys() - self._names
        if trainer.ckpt_path is None:  # a checkpoint may make layers dense again
            late |= {name for name in self._ranks if not isinstance(layers.get(name), LowRankPair)}
        if late:
            raise ValueError(
                "LowRank missed layers that were built, or made dense again by weights that were "
                f"loaded, after it ran: {', '.join(sorted(late))}; build them in __init__, or once "
                "only in configure_model, and load weights there or before fit"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the step of ``at``; log the ranks, and the number of weights before and after.

        Raises:
            ValueError: If an optimizer has the weights of layers that have been replaced, or of
                pairs that weights of another structure have been loaded into.
        """
        self._stop_following()  # the optimizers have the pairs: dense weights cannot go in now
        refuse_stale(trainer.optimizers, pl_module, self._originals)
        if self._begun is None:
            self._begun = trainer.global_step
        if self._at is not None and not self._done:
            if self._step is None:
                self._step = resolve_at(trainer, self._at, self._begun)
            else:
                warn_if_too_short(trainer, self._at, self._step)
            network = compressed_network(pl_module)
            self._untrained = values_of_untrained(network, trainer.optimizers)
        self._start = trainer.global_step
        self._log(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Replace the layers, if it is time for ``at``."""
        if self._done or self._step is None or trainer.global_step < self._step:
            return
        todo = self._plan(pl_module)
        warn_of_averages(todo.ranks, self._untrained, trainer)
        swap(trainer, pl_module, paths_in(pl_module, todo.ranks), self._decomposition)
        self._done = True
        tell(todo, compressed_network(pl_module))
        self._log(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if the layers were not replaced."""
        self._follow(pl_module)  # a finder's trial ends with the weights before it
        if not self._done:
            rank_zero_warn(
                f"LowRank(at={self._at!r}): training stopped after {trainer.global_step} "
                f"optimizer steps, before the layers were to be replaced at step {self._step}"
            )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """After the first step forget the original layers; not every manual step is counted."""
        if trainer.global_step > self._start or not pl_module.automatic_optimization:
            self._originals = {}

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Put the original layers back, unless training has begun."""
        self._put_back(trainer, pl_module)
        self._release()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the pairs of the checkpoint that has been loaded, whatever happens from here on."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._originals = {}

    on_validation_start = on_predict_start = on_test_start

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the summary to TensorBoard."""
        if writes_summary(trainer, self):
            log_summary(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave nothing behind but the pairs; and not them if no step was made, as by a Tuner."""
        if stage == TrainerFn.FITTING:
            self._put_back(trainer, pl_module)
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """The arguments, to be compared on resume, the step of ``at``, and of which run this is.

        Ranks follow from the shapes of the weights.
        """
        state = {"step": self._step, "begun": self._begun, "done": self._done, "run": self._run}
        return {"arguments": self._arguments(), **state}

    def _put_back(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > self._start:
            self._originals = {}
        present = dict(pl_module.named_modules())
        for path, layer in self._originals.items():
            if isinstance(present.get(path), LowRankPair):  # the module may have put others there
                # the rest of the module may have been converted meanwhile
                layer.to(next(present[path].parameters()))
                replace(pl_module, path, layer)
                self._done = False

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = scalars(compressed_network(pl_module))
        for logger in trainer.loggers:
            logger.log_metrics(values, step=logged_step(trainer))

    def _plan(self, pl_module: L.LightningModule) -> Plan:
        return plan(
            pl_module,
            self._r,
            energy=self._energy,
            budget=self._budget,
            decomposition=self._decomposition,
            exclude=self._exclude,
        )

    def _arguments(self) -> dict[str, Any]:
        return {
            "r": self._r,
            "energy": self._energy,
            "budget": self._budget,
            "decomposition": self._decomposition,
            "at": self._at,
            "exclude": [spell(one) for one in self._exclude],
        }

    def _release(self) -> None:
        self._originals, self._untrained = {}, {}
        self._stop_following()

    def _follow(self, pl_module: L.LightningModule) -> None:
        self._hook = pl_module.register_load_state_dict_pre_hook(follow_state_dict)

    def _stop_following(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


LowRankReplace = LowRank
