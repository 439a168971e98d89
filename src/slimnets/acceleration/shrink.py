"""Removes channels that are never felt: all-zero outputs, and outputs that nobody reads."""

import torch
from torch import Tensor, fx, nn

from slimnets.acceleration.lower import LIMITS
from slimnets.acceleration.nodes import is_plain, is_unaltered, layer_of, module_of

PASSING = (nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten)
"""Modules that give a constant channel as it is, and keep the order of channels."""


def shrink(traced: fx.GraphModule) -> dict[str, int]:
    """Remove what is not felt from pairs of layers that follow each other.

    An output channel whose weights are all zero is a constant. The next layer takes it into its
    bias, unless it pads its input with zeros and the constant is none. An output channel that the
    next layer multiplies by zeros only is not needed. Results stay the same for finite inputs.

    Returns:
        How many output channels were removed, for each layer that lost some.
    """
    removed: dict[str, int] = {}
    changed = True
    while changed:
        changed = False
        for node in traced.graph.nodes:
            follower = _follower(node)
            if follower is None:
                continue
            second, limits = follower
            lost = _remove(traced, node, second, limits)
            if lost:
                removed[str(node.target)] = removed.get(str(node.target), 0) + lost
                changed = True
    return removed


def _layer(node: fx.Node) -> nn.Conv2d | nn.Linear | None:
    """The layer of ``node``, if its channels may be removed."""
    layer = module_of(node)
    if not isinstance(layer, nn.Conv2d | nn.Linear) or not is_plain(layer):
        return None
    uses = [n for n in node.graph.nodes if layer_of(n) == node.target]
    return layer if len(uses) == 1 and getattr(layer, "groups", 1) == 1 else None


def _follower(node: fx.Node) -> tuple[fx.Node, list[tuple[float, float]]] | None:
    """The layer that alone reads ``node``, and the clamps in between."""
    if _layer(node) is None:
        return None
    limits: list[tuple[float, float]] = []
    while len(node.users) == 1:
        node = next(iter(node.users))
        module = module_of(node)
        key = type(module) if module is not None else node.target
        if _layer(node) is not None:
            return node, limits
        if module is not None and not is_unaltered(module):
            return None
        if key in LIMITS:
            limits.append(LIMITS[key])
        elif key not in PASSING and not (key is torch.flatten and node.args[1:] == (1,)):
            return None
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
            return None
    return None


def _remove(
    traced: fx.GraphModule, first: fx.Node, second: fx.Node, limits: list[tuple[float, float]]
) -> int:
    """Remove the channels of ``first`` that ``second`` does not feel, and return how many."""
    one, two, reads = _layer(first), _layer(second), _reads(first, second)
    if one is None or two is None or reads is None:
        return 0
    constant = one.weight.new_zeros(len(one.weight)) if one.bias is None else one.bias.detach()
    for low, high in limits:
        constant = constant.clamp(low, high)
    unread = (reads == 0).all(2).all(0)
    silent = (one.weight.detach() == 0).flatten(1).all(1)
    if isinstance(two, nn.Conv2d) and (isinstance(two.padding, str) or any(two.padding)):
        silent &= constant == 0
    if isinstance(two, nn.Conv2d) and two.padding_mode != "zeros":
        silent &= False
    keep = ~(unread | silent)
    if keep.all() or not keep.any():
        return 0
    folded = (reads.sum(2) * constant)[:, silent & ~unread].sum(1)
    traced.set_submodule(str(first.target), _with_outputs(one, keep))
    traced.set_submodule(str(second.target), _with_inputs(two, reads[:, keep], folded))
    return int((~keep).sum())


def _reads(first: fx.Node, second: fx.Node) -> Tensor | None:
    """The weight of ``second`` as (outputs, channels of ``first``, all else).

    None where it is not known which of its inputs are which channel.
    """
    one, two = _layer(first), _layer(second)
    assert one is not None and two is not None
    channels, rank = len(one.weight), len(first.meta["shape"])
    if isinstance(one, nn.Linear) and (rank != 2 or isinstance(two, nn.Conv2d)):
        return None  # of more dimensions the last, unless something was flattened in between
    if isinstance(one, nn.Conv2d) and rank != 4:
        return None  # an image without a batch: flattening begins with the rows
    if isinstance(one, nn.Conv2d) and isinstance(two, nn.Linear):
        source = second.args[0]
        if not isinstance(source, fx.Node) or len(source.meta["shape"]) != 2:
            return None  # not flattened: the second acts on the width
    if not channels or two.weight.shape[1] % channels:
        return None
    return two.weight.detach().reshape(len(two.weight), channels, -1)


def _with_outputs(layer: nn.Conv2d | nn.Linear, keep: Tensor) -> nn.Module:
    bias = None if layer.bias is None else layer.bias.detach()[keep]
    return _like(layer, layer.weight.detach()[keep], bias)


def _with_inputs(layer: nn.Conv2d | nn.Linear, weight: Tensor, folded: Tensor) -> nn.Module:
    bias = None if layer.bias is None else layer.bias.detach()
    if bool(folded.any()):
        bias = folded if bias is None else bias + folded
    kernel = layer.weight.shape[2:]
    inputs = weight.shape[1] if kernel else weight.shape[1] * weight.shape[2]
    return _like(layer, weight.reshape(len(weight), inputs, *kernel), bias)


def _like(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Module:
    new: nn.Conv2d | nn.Linear
    if isinstance(layer, nn.Linear):
        new = nn.Linear(weight.shape[1], len(weight), bias=bias is not None)
    else:
        places = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        more = {"bias": bias is not None, "padding_mode": layer.padding_mode}
        new = nn.Conv2d(weight.shape[1], len(weight), *places, **more)  # type: ignore[arg-type]
    new.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias, requires_grad=False)
    return new.eval()
