"""A LightningModule that takes on the structure of the checkpoints it is given."""

from collections.abc import Mapping
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from slimnets.layers import compressed_network, names_of
from slimnets.lowrank.modules import restructure
from slimnets.trainer import copy_averages_anew

T = TypeVar("T")


def follow_state_dict(
    pl_module: L.LightningModule, state_dict: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    """Give ``pl_module`` the structure of ``state_dict``, which is about to be loaded.

    A hook for ``register_load_state_dict_pre_hook``. It is copied with the module, so that averaged
    copies follow their own state.
    """
    shapes = {key: value.shape for key, value in state_dict.items() if isinstance(value, Tensor)}
    before = list(pl_module.modules())
    restructure(pl_module, shapes, prefix)
    trainer = pl_module._trainer
    is_fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
    if is_fitting and before != list(pl_module.modules()):
        copy_averages_anew(pl_module.trainer, pl_module)


def paths_in(pl_module: L.LightningModule, by_name: Mapping[str, T]) -> dict[str, T]:
    """``by_name`` with the names that layers of the compressed network have in ``pl_module``."""
    network = names_of(pl_module, compressed_network(pl_module))[0]
    return {".".join(filter(None, (network, name))): value for name, value in by_name.items()}
