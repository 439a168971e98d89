"""Layers replaced in the middle of a run: when, and what has to follow."""

import copy
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import cast

import lightning as L
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from slimnets.layers import compressed_network, replace
from slimnets.lowrank.decompose import Decomposition
from slimnets.lowrank.factorize import put_pairs
from slimnets.lowrank.pair import Layer, LowRankPair
from slimnets.lowrank.plan import named_layers
from slimnets.trainer import (
    averages,
    callbacks_of,
    has_time_limit,
    is_fast_dev_run,
    remaining_steps,
    unwrapped,
)


def check_at(at: int | float | None) -> None:
    """Raise where no run could make sense of ``at``.

    Raises:
        TypeError: If it is neither an int, nor a float, nor None.
        ValueError: If it is out of range.
    """
    if at is None:
        return
    wanted = "an int of at least 1, in optimizer steps, or a float in (0, 1), a fraction of the run"
    if isinstance(at, bool) or not isinstance(at, int | float):
        raise TypeError(f"at={at!r}: expected {wanted}")
    if at < 1 if isinstance(at, int) else not 0 < at < 1:
        hint = f"; did you mean {round(at)}?" if isinstance(at, float) and 1 < at < 1e9 else ""
        raise ValueError(f"at={at!r}: expected {wanted}{hint}")


def check_run(trainer: L.Trainer, at: int | float) -> None:
    """Raise where layers cannot be replaced in the middle of a run.

    Raises:
        NotImplementedError: Under a strategy that wraps the parameters; beside a
            ``BaseFinetuning``.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise NotImplementedError(
            f"LowRank(at={at!r}) does not support {type(trainer.strategy).__name__}, which is "
            "bound to the parameters that a run begins with; use a single device, or at=None"
        )
    for callback in callbacks_of(trainer):
        if isinstance(callback, BaseFinetuning):
            raise NotImplementedError(
                f"LowRank(at={at!r}) does not support {type(callback).__name__}, whose checkpoints "
                "name the parameters that a run begins with; use at=None"
            )


def resolve_at(trainer: L.Trainer, at: int | float, begun: int) -> int:
    """The optimizer step before which layers are replaced; ask in ``on_train_start``.

    Args:
        trainer: That of the run.
        at: As the user gave it.
        begun: The ``global_step`` that the run began with, before it was resumed.

    Raises:
        ValueError: If the run ends before, or its length is needed and not known.
    """
    if is_fast_dev_run(trainer):
        return trainer.global_step
    length = trainer.global_step - begun + remaining_steps(trainer)
    if isinstance(at, float) and (math.isinf(length) or has_time_limit(trainer)):
        raise ValueError(
            f"at={at!r} is a fraction of the run, but the number of optimizer steps of this run "
            "is not known (manual optimization, a time limit, or a loader without length and no "
            "max_steps): give an int, in optimizer steps"
        )
    step = at if isinstance(at, int) else max(1, round(at * length))
    if step >= length:
        raise ValueError(
            f"at={at!r}: the run has only {length:g} optimizer steps; train for longer, or give an "
            "earlier one (at=0.5 is half of any run)"
        )
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise ValueError(f"at={at!r}: LBFGS keeps one state for all parameters; use at=None")
    return begun + step


def refuse_stale(
    optimizers: Sequence[Optimizer], module: nn.Module, originals: Mapping[str, nn.Module]
) -> None:
    """Raise ValueError where an optimizer would train weights that ``module`` has no longer.

    Args:
        optimizers: Those of the run.
        module: The module, with its pairs.
        originals: Name of each layer that was there before to that layer.
    """
    held = {
        parameter: type(optimizer).__name__
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    stale = held.keys() - set(module.parameters())
    gone = {p: name for name, layer in originals.items() for p in layer.parameters()}
    if found := stale & gone.keys():
        raise ValueError(
            f"LowRank has replaced {', '.join(sorted({gone[p] for p in found}))}, but "
            f"{held[found.pop()]} would go on with the weights before: make optimizers and "
            "lists of parameters in configure_optimizers, not earlier, as LightningCLI makes that "
            "of --optimizer"
        )
    new = [
        name
        for name, layer in named_layers(compressed_network(module)).items()
        if any(one.requires_grad and one not in held for one in layer.parameters())
    ]
    if stale and new:
        raise ValueError(
            f"LowRank: weights of another structure were loaded into {', '.join(new)} after "
            f"{held[stale.pop()]} was made, which would go on with the weights before: load "
            "them before fit, in __init__ or in configure_model"
        )


def values_of_untrained(network: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """Some values of the weight of each layer that is in none of ``optimizers``, by its name."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    weights = {
        name: layer._parameters.get("weight") for name, layer in named_layers(network).items()
    }
    return {
        name: weight.detach().flatten()[:100].clone()
        for name, weight in weights.items()
        if weight is not None
        and not weight.is_meta
        and not (id(weight) in trained and weight.requires_grad)
    }


def warn_of_averages(
    names: Collection[str], before: Mapping[str, Tensor], trainer: L.Trainer
) -> None:
    """Warn of layers that something else than an optimizer changes, such as a mean teacher's.

    Args:
        names: Of the layers that are replaced.
        before: What :func:`values_of_untrained` gave when the run began.
        trainer: That of the run.
    """
    now = values_of_untrained(compressed_network(trainer.lightning_module), trainer.optimizers)
    moved = [
        repr(name)
        for name, values in now.items()
        if name in names and name in before and not torch.equal(before[name], values)
    ]
    if moved:
        rank_zero_warn(
            f"LowRank(at=...) replaces {', '.join(moved)}, which no optimizer changes and "
            "something else does. If that is an average of other layers, averaging goes wrong from "
            "here on, for the factors of an average are not the average of the factors: use "
            "at=None, or WeightAveraging of Lightning"
        )


def swap(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    ranks: Mapping[str, int],
    decomposition: Decomposition,
) -> None:
    """Put pairs in the place of layers of ``pl_module``, and let optimizers and averages follow."""
    layers = {name: pl_module.get_submodule(name) for name in ranks}
    put_pairs(pl_module, ranks, decomposition)
    pairs = {name: cast(LowRankPair, pl_module.get_submodule(name)) for name in ranks}
    replaced: dict[Tensor, dict[str, nn.Parameter]] = {}
    for name, layer in layers.items():
        replaced |= successors(cast(Layer, layer), pairs[name])
    for optimizer in trainer.optimizers:
        take_over(optimizer, replaced)
    for callback, wrapped in averages(trainer):
        average = unwrapped(wrapped)
        for name, pair in pairs.items():
            # the factors of an averaged weight are not the average of its factors: begin anew
            device = next(average.get_submodule(name).parameters()).device
            replace(average, name, copy.deepcopy(pair).to(device))
        # the next update copies: an average of steps before and after would weigh the untrained
        # factors as much as all the steps before
        counter = getattr(wrapped, "n_averaged", getattr(callback, "n_averaged", None))
        if counter is not None:
            counter.zero_()


def successors(layer: Layer, pair: LowRankPair) -> dict[Tensor, dict[str, nn.Parameter]]:
    """Each parameter of ``layer``, and the parameters of ``pair`` that stand for it, by name."""
    new = dict(pair.named_parameters())
    found: dict[Tensor, dict[str, nn.Parameter]]
    found = {layer.weight: {name: new[name] for name in ("first.weight", "second.weight")}}
    if layer.bias is not None:
        found[layer.bias] = {"second.bias": new["second.bias"]}
    return found


def take_over(optimizer: Optimizer, replaced: Mapping[Tensor, Mapping[str, nn.Parameter]]) -> None:
    """Give ``optimizer`` new parameters in the place of old ones, in the same groups.

    The state of a parameter that has one successor goes on; that of others starts afresh.

    Args:
        optimizer: Changed in place; its schedulers know the parameters through it.
        replaced: Old parameter to new ones by name, in the order of the module.
    """
    for group in optimizer.param_groups:
        new = [replaced.get(parameter, {"": parameter}) for parameter in group["params"]]
        if "param_names" in group:
            group["param_names"] = [
                f"{name.rpartition('.')[0]}.{leaf}".lstrip(".") if leaf else name
                for name, found in zip(group["param_names"], new, strict=True)
                for leaf in found
            ]
        group["params"][:] = [parameter for found in new for parameter in found.values()]
    for old, found in replaced.items():
        state = optimizer.state.pop(old, None)
        if state and len(found) == 1:
            optimizer.state[next(iter(found.values()))] = state
