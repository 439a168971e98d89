"""Networks that are given a low-rank structure, and the pairs it is made of."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from slimnets.layers import LAZY, computes_as, is_parametrized, replace
from slimnets.lowrank.decompose import matrix_shape_of_pair
from slimnets.lowrank.pair import Layer, empty_dense, empty_pair, kind_of
from slimnets.lowrank.pair import LowRankPair as LowRankPair


def pairs_of(network: nn.Module) -> dict[str, LowRankPair]:
    """The pairs of ``network`` by name."""
    return {name: m for name, m in network.named_modules() if isinstance(m, LowRankPair)}


def weights_of(layer: nn.Module) -> list[nn.Parameter]:
    """Its parameters of two or more dimensions that are no biases and not lazy; none of a norm's.

    Of a pair they are those of both layers.
    """
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):  # of several dimensions, so are theirs
        return []
    named = layer.named_parameters(recurse=isinstance(layer, LowRankPair))
    return [one for name, one in named if not is_lazy(one) and one.dim() > 1 and "bias" not in name]


def replaceable(network: nn.Module, *others: type[nn.Module]) -> dict[str, nn.Module]:
    """All that is linear, a convolution, a pair or of the types ``others``, by name; each once.

    The two layers of a pair are not among them.
    """
    kinds: tuple[type[nn.Module], ...]
    kinds = (LowRankPair, nn.Linear, nn.modules.conv._ConvNd, *others)
    halves = {id(half) for pair in pairs_of(network).values() for half in pair}
    return {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, kinds) and id(layer) not in halves
    }


def refusal(layer: nn.Module) -> str:
    """Why no pair can take the place of ``layer``; empty if one can."""
    kind = kind_of(layer)
    if kind is None:
        return f"{type(layer).__name__} is not supported"
    if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():
        return f"it {LAZY}"
    if is_parametrized(layer):
        return "its weight is computed from other parameters"
    layer = cast(Layer, layer)
    if type(layer.weight) is not nn.Parameter or not layer.weight.is_floating_point():
        return f"its weight is a {type(layer.weight).__name__} of {layer.weight.dtype}"
    if getattr(layer, "groups", 1) != 1:
        return f"it is grouped (groups={layer.groups})"
    if not computes_as(layer, kind):
        return f"{type(layer).__name__} has a forward pass of its own"
    own = [*layer._parameters, *layer._buffers, *layer._modules]
    if more := [name for name in own if name not in ("weight", "bias")]:
        return f"it has {', '.join(more)} besides its weight and bias"
    return ""


def restructure(
    network: nn.Module, shapes: Mapping[str, torch.Size], prefix: str = ""
) -> nn.Module:
    """Give ``network`` the low-rank structure that the keys and shapes of a state dict describe.

    Dense layers become uninitialised pairs of the shapes found, pairs take on the rank found, and
    pairs that are dense there become uninitialised dense layers. What has that structure already
    is left alone, and so is a layer without a key. Dtype, device, ``requires_grad`` and the
    training flag are kept.

    Args:
        network: Changed in place, except for a root that is itself a layer.
        shapes: Key of the state dict to shape.
        prefix: What stands before the network's names in the keys.

    Returns:
        The network, or what takes its place.

    Raises:
        ValueError: If the shapes cannot come from the layer that is there; nothing is changed.
    """
    changes = {
        name: new
        for name, layer in replaceable(network).items()
        if (new := _described(layer, shapes, f"{prefix}{name}." if name else prefix)) is not None
    }
    for name, new in changes.items():
        network = replace(network, name, new)
    return network


def _described(
    layer: nn.Module, shapes: Mapping[str, torch.Size], key: str
) -> LowRankPair | Layer | None:
    """What has to take the place of ``layer``, if anything."""
    halves = [f"{key}first.weight", f"{key}second.weight"]
    if f"{key}weight" in shapes:
        if not isinstance(layer, LowRankPair):
            return None
        new: LowRankPair | Layer = empty_dense(layer)
    elif any(half in shapes for half in halves):
        first, second = (shapes.get(half, torch.Size()) for half in halves)
        if isinstance(layer, LowRankPair):
            if [first, second] == [half.weight.shape for half in layer]:
                return None
            layer = empty_dense(layer)
        elif reason := refusal(layer):
            raise ValueError(f"{halves[0]}: no pair can take the place of that layer: {reason}")
        dense = cast(Layer, layer)
        if not _is_split(dense.weight.shape, first, second):
            raise ValueError(
                f"{halves[0]}: {tuple(first)} and then {tuple(second)} cannot stand for the "
                f"layer's weight of {tuple(dense.weight.shape)}"
            )
        new = empty_pair(dense, first[0], second[2:])
    else:
        return None
    for name, tensor in new.state_dict().items():
        if shapes.get(key + name) != tensor.shape:
            found = "nothing" if key + name not in shapes else tuple(shapes[key + name])
            raise ValueError(f"{key}{name}: expected {tuple(tensor.shape)}, found {found}")
    return new


def _is_split(weight: torch.Size, first: torch.Size, second: torch.Size) -> bool:
    """Whether weights of shapes ``first`` and ``second`` can stand for one of shape ``weight``."""
    if not len(weight) == len(first) == len(second):
        return False
    kernels = zip(weight[2:], first[2:], second[2:], strict=True)
    full_rank = min(matrix_shape_of_pair(first, second))
    return (
        (second[0], first[1]) == (weight[0], weight[1])
        and first[0] == second[1]
        and 1 <= first[0] <= full_rank
        and all((a, b) in ((k, 1), (1, k)) for k, a, b in kernels)
    )
