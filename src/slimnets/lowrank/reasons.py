"""Why a layer is left as it is, whatever rank is asked for."""

from collections.abc import Collection, Mapping
from functools import partial
from types import MethodType
from typing import cast

from torch import Tensor, nn
from torch.optim import Optimizer

from slimnets.layers import address_of, compressed_network, inside_metrics
from slimnets.lowrank.modules import LowRankPair, refusal

READ_FROM_OUTSIDE = {
    "torch.nn.modules.activation.MultiheadAttention": ("out_proj",),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
    "timm.models.beit.Attention": ("qkv",),
}
"""Type of a module to the layers in it that it does not call, for it reads their weights."""


def reasons_to_leave(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Name of each layer, and why no pair can or should take its place; "" where one may.

    Args:
        model: As for :func:`slimnets.factorize`.
        layers: Of its compressed network.
    """
    network = compressed_network(model)
    holders, beside = _holders(network), _beside_tree(model)
    inside = {
        **_read_by_parents(network),
        **dict.fromkeys(inside_metrics(network), "it is within a metric"),
    }
    return {name: _reason(layer, holders, inside, beside) for name, layer in layers.items()}


def _reason(
    layer: nn.Module,
    holders: Mapping[int, Mapping[str, nn.Module]],
    inside: Mapping[int, str],
    beside: Mapping[int, str],
) -> str:
    if isinstance(layer, LowRankPair):
        return f"already a pair of rank {layer.rank}"
    if reason := refusal(layer):
        return reason
    if not cast(Tensor, layer.weight).numel():
        return "it has no weights"
    if id(layer) in inside:
        return inside[id(layer)]
    for one in (layer, *layer.parameters()):
        if id(one) in beside:
            which = "it" if one is layer else "a parameter of it"
            return f"{which} is also held in {beside[id(one)]}, outside of the module tree"
    for parameter in layer.parameters():
        if parameter.is_meta:
            return "it is on the meta device and has no values yet"
        for name, other in holders[address_of(parameter)].items():
            if other is not layer:
                return f"it shares parameters with {name!r}"
    return ""


def _holders(model: nn.Module) -> dict[int, dict[str, nn.Module]]:
    """Place of each parameter, and the modules that hold it; a tied one is held by several."""
    holders: dict[int, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(address_of(parameter), {})[name] = module
    return holders


def _read_by_parents(model: nn.Module) -> dict[int, str]:
    """Id of each layer whose weight a module around it multiplies by itself, and why it is left.

    The product of a pair would be computed at every call, to be multiplied by in full.
    """
    return {
        id(child): f"{type(module).__name__} reads its weight"
        for module in model.modules()
        for kind in type(module).__mro__
        for name in READ_FROM_OUTSIDE.get(f"{kind.__module__}.{kind.__name__}", ())
        if (child := module._modules.get(name)) is not None
    }


def _beside_tree(model: nn.Module) -> dict[int, str]:
    """Id of each module and parameter held outside of the module tree, and the attribute.

    No pair would take its place there, so that what runs it would train nothing, and what averages
    or penalizes it would do so to weights that are no longer the network's. A layer that is
    compiled by itself is held so, too, by a method of it; what optimizers hold is seen to later.
    """
    held: dict[int, str] = {}
    for module in model.modules():
        # a Trainer has callbacks that hold layers, LowRank among them
        own = {"_modules", "_parameters", "_trainer"}
        found = [(key, value) for key, value in vars(module).items() if key not in own]
        seen: set[int] = set()
        for key, value in found:  # grows by what containers hold
            one = value.__self__ if isinstance(value, MethodType) else value
            if isinstance(one, nn.Module | nn.Parameter):
                if one is not module:
                    held.setdefault(id(one), f"{type(module).__name__}.{key}")
            elif id(one) not in seen and (inside := _inside(one)):
                seen.add(id(one))
                found += [(key, x) for x in inside]
    return held


def _inside(one: object) -> Collection[object]:
    """What a container, a partial or an object of the user's own holds."""
    if isinstance(one, dict):
        return one.values()
    if isinstance(one, list | tuple | set):
        return one
    if isinstance(one, partial):
        return (one.func, *one.args, *one.keywords.values())
    if isinstance(one, Optimizer):
        return ()
    package = type(one).__module__.partition(".")[0]
    is_plain = hasattr(one, "__dict__") and package not in ("builtins", "torch", "lightning")
    return vars(one).values() if is_plain and not isinstance(one, type) else ()
