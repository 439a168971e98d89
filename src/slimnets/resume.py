"""Resuming a run as if it had never been interrupted."""

import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from slimnets.generators import random_state, set_random_state
from slimnets.trainer import accumulation


class ExactResume(L.Callback):
    """Let a run that is resumed from a checkpoint go on as if it had never been interrupted.

    Lightning's checkpoints hold no state of the random generators, so that a resumed run shuffles,
    augments and drops out differently. With this callback in the run that saves and in the run
    that resumes, weights, optimizers, masks and what is logged by the step go on bit for bit, on a
    CPU or with deterministic kernels:

    - from a checkpoint of the end of an epoch, with any loader that draws from the global
      generators, or with torchdata's ``StatefulDataLoader``;
    - from one of the middle of an epoch, as ``ModelCheckpoint(every_n_train_steps=...)`` saves it,
      in one process and with a ``StatefulDataLoader`` that knows its length. Any other loader
      begins its epoch anew.

    Kept are Python's, NumPy's and torch's global generators, on the CPU and on the CUDA device, of
    every process; gradients that are being accumulated; and what Lightning drops when it resumes:
    the loader's place at the end of an epoch, and the validation and the end of an epoch that were
    still to come when a checkpoint was saved after a batch.

    Not kept are generators of your own; the seeds of ``persistent_workers`` that validate in the
    middle of an epoch; loaders that ``reload_dataloaders_every_n_epochs`` builds anew, unless they
    are plain ones built every epoch; gradients that manual optimization, or one of several
    processes, is accumulating; and what a logger has not written yet: the row of a step comes after
    the checkpoint of that step. ``on_train_start`` is called once more, and should
    draw no random numbers. From the middle of an epoch, these are not kept either: generators in a
    loader's workers, if the data set draws from them; the sums behind values that are logged once
    an epoch (they are of the batches since the checkpoint); and what Lightning does after a
    checkpoint of ``ModelCheckpoint`` with the batch it is of: the module's own
    ``on_train_batch_end``, and the step of a ``ReduceLROnPlateau`` with ``interval="step"``. Under
    a ``GradientAccumulationScheduler`` rows may be logged at a step that is off by one.

    Examples:
        >>> trainer = L.Trainer(max_epochs=10, callbacks=[ExactResume()], logger=False)
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget what another run has restored."""
        self._restored = None

    def state_dict(self) -> dict[str, Any]:
        """The states of the generators, in the order of the ranks."""
        states: list[dict[str, Any]] = [random_state()]
        if dist.is_initialized():
            states = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(states, random_state())
        return {"ranks": states}

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what is unfinished: an accumulation of gradients, and what is due after a batch."""
        state = checkpoint["callbacks"][self.state_key]
        state["due"] = _due_after_batch(trainer)
        state["gradients"] = _open_gradients(trainer, pl_module)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Call the batch completed if something is due after it, lest Lightning skips that."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None and trainer.state.fn == TrainerFn.FITTING:
            rank_zero_warn(
                "the checkpoint was saved without ExactResume: the run goes on with other random "
                "numbers than it would have had"
            )
        elif state and state.get("due"):
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts["completed"] = counts["processed"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until the run starts."""
        self._restored = state_dict

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the generators, before a loader that begins an epoch draws its seed.

        Raises:
            ValueError: If the checkpoint is of another number of processes.
        """
        if self._restored is None:
            return
        states = self._restored["ranks"]
        if len(states) != trainer.world_size:
            raise ValueError(
                f"the checkpoint is of {len(states)} processes and this run has "
                f"{trainer.world_size}: resume with as many, or without ExactResume"
            )
        # a loader whose length configure_optimizers has asked for has drawn its seed, and does not
        # know its place: it is set up once more, when both are restored
        trainer.fit_loop._combined_loader = None
        set_random_state(states[trainer.global_rank])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore what the loader may have disturbed, now that it is set up, and what is open."""
        restored, self._restored = self._restored, None
        if restored is None:
            return
        loop, random_state = trainer.fit_loop, restored["ranks"][trainer.global_rank]
        if loop.restarting and not loop.restarted_on_epoch_end:
            set_random_state(random_state)  # the loader has drawn its seed long ago
        else:
            _begin_next_epoch(trainer, random_state)
        gradients = restored.get("gradients", {})
        for name, parameter in pl_module.named_parameters():
            if name in gradients:
                parameter.grad = gradients[name].to(parameter)
        if restored.get("due") == "validation":
            loop.epoch_loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
        elif restored.get("due") == "end of epoch":
            assert loop._data_fetcher is not None
            loop._data_fetcher.iterator = iter(())  # else one more batch would be trained
            loop.epoch_loop._batches_that_stepped += 1

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Accumulate as the epoch does, whose start a run from the middle of it has not seen."""
        trainer.accumulate_grad_batches = accumulation(trainer, trainer.current_epoch)


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint in ``folder`` that is whole.

    A process that is killed while it writes leaves a file cut short. Such a file is passed over.

    Args:
        folder: Where the ``.ckpt`` files are.

    Returns:
        Its path, or None if there is none.
    """
    whole = [path for path in Path(folder).glob("*.ckpt") if path.exists()]  # links may dangle
    found = sorted(whole, key=lambda path: path.stat().st_mtime_ns)
    return next((path for path in reversed(found) if _is_whole(path)), None)


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False


def _due_after_batch(trainer: L.Trainer) -> str | None:
    """What comes after a batch whose ``on_train_batch_end`` saves, before the next batch."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    progress = loop.batch_progress.current
    if fetcher is None or progress.completed == progress.processed:  # type: ignore[attr-defined]
        return None
    if loop._should_check_val_fx(fetcher):
        return "validation"
    return "end of epoch" if loop._num_ready_batches_reached() else None


def _open_gradients(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
    """The gradients by parameter name, if the next batch is to add to them."""
    if trainer.world_size > 1 or not trainer.fit_loop._should_accumulate():
        return {}
    named = pl_module.named_parameters()
    return {name: weights.grad for name, weights in named if weights.grad is not None}


def _begin_next_epoch(trainer: L.Trainer, random_state: dict[str, Any]) -> None:
    """Begin the epoch after the one at whose end the checkpoint was saved."""
    loop = trainer.fit_loop
    places = loop._combined_loader_states_to_load
    assert loop._combined_loader is not None and loop._data_fetcher is not None
    if loop.restarted_on_epoch_end:  # with max_steps, Lightning would end that epoch once more
        _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]
        loop.update_restart_stage()
        loop.epoch_progress.increment_completed()
    elif len(places) != (count := len(loop._combined_loader._state_dicts())):
        rank_zero_warn(
            f"the checkpoint has the place of {len(places)} stateful loaders, and this run has "
            f"{count}: its loaders begin as if anew"
        )
        loop._combined_loader_states_to_load = []
        return
    elif places and not trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        # Lightning restores the place of a loader in the middle of an epoch only, and the sampler
        # of a new loader would go back to the first epoch
        loop._combined_loader_states_to_load = []
        loop._combined_loader._load_state_dicts(places)
        iter(loop._data_fetcher)
    elif not any(one.persistent_workers for one in loop._combined_loader.flattened):
        # the loader has begun the epoch, with the generators of on_fit_start; persistent workers,
        # which draw their seed once a run, have drawn it from these
        return
    set_random_state(random_state)
    iter(loop._data_fetcher)
