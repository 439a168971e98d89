"""Layers that compute their weight at every call, as those with weight norm do."""

from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def with_values(layer: nn.Module) -> nn.Module | None:
    """``layer`` anew, its weight the value that it computes; ``None`` where it computes none.

    Nor is there one of a layer of another type than a convolution or linear layer, or of a weight
    that is another at every call.
    """
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
        return None
    values, kind = {}, type(layer)
    if parametrize.is_parametrized(layer):
        # not remove_parametrizations: it changes the type, which copies of the layer share
        values = {name: getattr(layer, name) for name in layer.parametrizations}  # type: ignore[union-attr]
        kind = kind.__bases__[0]
    if any(not torch.equal(value, getattr(layer, name)) for name, value in values.items()):
        return None
    others: OrderedDict[int, Any] = OrderedDict()
    for key, hook in layer._forward_pre_hooks.items():
        if isinstance(hook, WeightNorm | SpectralNorm):
            hook(layer, ())
            values[hook.name] = getattr(layer, hook.name)
        else:
            others[key] = hook
    if not values:
        return None
    plain = kind.__new__(kind)
    own = {name: value for name, value in vars(layer).items() if name not in values}
    plain.__dict__.update(own, _parameters={}, _modules={}, _buffers={}, _forward_pre_hooks=others)
    for name in ("weight", "bias"):
        value = values.get(name, layer._parameters.get(name))
        plain._parameters[name] = None if value is None else nn.Parameter(value, False)
    return plain
