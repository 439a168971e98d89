"""What LowRank says and logs."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.parameter import is_lazy

from slimnets.arguments import changed
from slimnets.lowrank.decompose import matrix_shape_of_pair
from slimnets.lowrank.modules import LowRankPair, pairs_of
from slimnets.lowrank.plan import Plan
from slimnets.trainer import is_fast_dev_run, remaining_steps


def scalars(network: nn.Module) -> dict[str, float]:
    """The rank of each pair, and how many parameters there are with them and were without."""
    pairs = pairs_of(network)
    after = sum(one.numel() for one in network.parameters() if not is_lazy(one))
    before = after + sum(_saved(pair) for pair in pairs.values())
    ranks = {f"rank/{name or 'root'}": float(pair.rank) for name, pair in pairs.items()}
    return {**ranks, "parameters/before": float(before), "parameters/after": float(after)}


def tell(todo: Plan, network: nn.Module) -> None:
    """Say what was done to ``network``, and what was left for which reason."""
    if not pairs_of(network):
        rank_zero_warn(f"LowRank replaces no layer:\n{todo}")
    elif todo.ranks:
        before, after = (sum(getattr(row, side) for row in todo) for side in ("before", "after"))
        left = "".join(f"\n  left {row.name!r}: {row.reason}" for row in todo.left)
        rank_zero_info(
            f"LowRank replaces {len(todo.ranks)} of {len(todo.rows)} layers, {before:,} weights "
            f"become {after:,}{left}"
        )
    elif unmet := [f"{row.name!r} ({row.reason})" for row in todo if row.unmet]:
        rank_zero_warn(f"LowRank replaces no layer and leaves {'; '.join(unmet)}")


def warn_if_too_short(trainer: L.Trainer, at: int | float, step: int) -> None:
    """Say so if a resumed run ends before ``step``; it may be resumed once more."""
    length = trainer.global_step + remaining_steps(trainer)
    if step >= length and not is_fast_dev_run(trainer):
        rank_zero_warn(
            f"LowRank(at={at!r}): the layers are to be replaced at step {step}, as resolved when "
            f"the run began, and this run ends after {length:g} optimizer steps; train for longer, "
            "or give another at="
        )


def warn_of_changes(before: Mapping[str, Any], now: Mapping[str, Any], is_done: bool) -> None:
    """Say so if a checkpoint was made with other arguments, or, if ``before`` is empty, with none.

    Args:
        before: The arguments that it was made with.
        now: Those of the run that goes on from it.
        is_done: Whether layers have been replaced by then.
    """
    if before and not changed(before, now):
        return
    made = f"the checkpoint was made with {_call_of(before) if before else 'other callbacks'}"
    if is_done:
        rank_zero_warn(f"{made} and keeps its structure; {_call_of(now)} is not applied")
    elif before:
        rank_zero_warn(f"{made}; going on with {_call_of(now)}")


def _call_of(arguments: Mapping[str, Any]) -> str:
    return f"LowRank({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"


def _saved(pair: LowRankPair) -> int:
    first, second = pair.first.weight, pair.second.weight
    rows, columns = matrix_shape_of_pair(first.shape, second.shape)
    return rows * columns - first.numel() - second.numel()
