"""A LightningModule takes on the low-rank structure of a checkpoint that is about to be loaded."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from slimnets.lowrank.modules import restructure
from slimnets.trainer import copy_averages_anew


def follow_state_dict(
    pl_module: L.LightningModule, state_dict: Mapping[str, Any], prefix: str = "", *_: Any
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
