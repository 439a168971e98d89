"""Resuming a run as if it had never been interrupted."""

import random
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist


class ExactResume(L.Callback):
    """Keep the state of the random generators in checkpoints, and restore it on resume.

    Lightning's checkpoints have none, so that a resumed run shuffles, augments and drops out
    differently. With this callback a run resumed from a checkpoint of the end of an epoch continues
    bit for bit; from the middle of an epoch it does if the training loader keeps its place, as
    torchdata's ``StatefulDataLoader`` does.

    Kept are Python's, NumPy's and torch's global generators, on the CPU and on CUDA devices, of
    every process.

    Examples:
        >>> trainer = L.Trainer(max_epochs=10, callbacks=[ExactResume()], logger=False)
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget what another run has restored."""
        self._restored = None

    def state_dict(self) -> dict[str, Any]:
        """The states of the generators, in the order of the ranks."""
        states: list[dict[str, Any]] = [_random_state()]
        if dist.is_initialized():
            states = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(states, _random_state())
        return {"ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until the run starts."""
        self._restored = state_dict["ranks"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the states, before the training loader draws its seed.

        Raises:
            ValueError: If the checkpoint is of another number of processes.
        """
        states, self._restored = self._restored, None
        if states is None:
            return
        if len(states) != trainer.world_size:
            raise ValueError(
                f"the checkpoint is of {len(states)} processes and this run has "
                f"{trainer.world_size}: resume with as many, or without ExactResume"
            )
        _set_random_state(states[trainer.global_rank])


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint in ``folder`` that is whole.

    A process that is killed while it writes leaves a file cut short. Such a file is passed over.

    Args:
        folder: Where the ``.ckpt`` files are.

    Returns:
        Its path, or None if there is none.
    """
    found = sorted(Path(folder).glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return next((path for path in reversed(found) if _is_whole(path)), None)


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False


def _random_state() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            position,
            has_gauss,
            gauss,
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
