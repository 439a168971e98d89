"""The layers of a network: found in what is around it, told apart, replaced by name."""

import re
from collections.abc import Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel
from torchmetrics import Metric

T = TypeVar("T")

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers that are as wide as floats of so many bytes, for a look at their bits."""

LAZY = "has no values yet; run one batch through the network first"
"""What is wrong with a lazy parameter."""

_COMPILED = re.compile(r"(^|\.)_orig_mod(?=\.|$)")

_WRAPPERS = (_FabricModule, DistributedDataParallel, nn.DataParallel, AveragedModel)


def compressed_network(module: nn.Module) -> nn.Module:
    """The network that compression acts on: the one ``module`` declares, or ``module`` itself.

    A wrapper such as :class:`slimnets.DistillationModule` declares it in an attribute
    ``compressed_network``; what :func:`torch.compile`, Fabric, DDP, ``DataParallel`` and
    ``AveragedModel`` put around a network is taken off.

    Examples:
        >>> net = nn.Linear(2, 2)
        >>> compressed_network(net) is net
        True

    Raises:
        TypeError: If ``module`` is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"model={module!r:.80}: expected an nn.Module")
    inner = getattr(module, "compressed_network", module)
    inner = getattr(inner, "_orig_mod", inner)
    inner = inner.module if isinstance(inner, _WRAPPERS) else inner
    return inner if inner is module else compressed_network(inner)


def paths_in(module: nn.Module, by_name: Mapping[str, T]) -> dict[str, T]:
    """``by_name`` with the names that layers of the compressed network have in ``module``.

    Raises:
        ValueError: If that network is no submodule of ``module``.
    """
    network = compressed_network(module)
    names = names_of(module, network)
    if not names:
        raise ValueError(
            f"compressed_network of {type(module).__name__} is a {type(network).__name__} that is "
            "none of its submodules; register it as one"
        )
    return {".".join(filter(None, (names[0], name))): value for name, value in by_name.items()}


def is_parametrized(layer: nn.Module, tensor: str = "weight") -> bool:
    """Whether ``layer`` computes ``tensor`` from other parameters (weight norm, for example)."""
    return parametrize.is_parametrized(layer, tensor) or (
        tensor not in layer._parameters and hasattr(layer, tensor)
    )


def address_of(parameter: Tensor) -> int:
    """Where its values are; those of another one that shares them, transposed or not, are there.

    Examples:
        >>> encoder, decoder = nn.Linear(3, 2), nn.Linear(2, 3)
        >>> decoder.weight.data = encoder.weight.data.t()
        >>> address_of(encoder.weight) == address_of(decoder.weight)
        True
    """
    # lazy ones and subclasses may have no such place, and on some devices it is 0
    is_plain = type(parameter) is nn.Parameter
    return (is_plain and parameter.data_ptr()) or id(parameter)


def version_of(tensor: Tensor) -> int:
    """How often ``tensor`` has been changed in place; 0 where PyTorch does not count."""
    return 0 if tensor.is_inference() else tensor._version


def refuse_lazy(network: nn.Module, argument: str) -> None:
    """Raise ValueError, which names ``argument``, if a lazy layer has no weights yet."""
    for name, tensor in chain(network.named_parameters(), network.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{argument}: {name!r} {LAZY}")


def plain_name(name: str) -> str:
    """``name``, of a layer or in a state dict, without what :func:`torch.compile` adds.

    Examples:
        >>> plain_name("block._orig_mod.conv.weight")
        'block.conv.weight'
    """
    return _COMPILED.sub("", name).removeprefix(".")


def names_of(network: nn.Module, layer: nn.Module) -> list[str]:
    """Every name under which ``layer`` stands in ``network``; a shared layer has several."""
    return [name for name, other in network.named_modules(remove_duplicate=False) if other is layer]


def inside_metrics(network: nn.Module) -> set[int]:
    """Ids of the modules within metrics, such as LPIPS and FID: networks that measure others."""
    metrics = [module for module in network.modules() if isinstance(module, Metric)]
    return {id(inner) for metric in metrics for inner in metric.modules()}


def computes_as(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the forward pass of ``layer`` is that of ``kind``, a convolution or linear layer."""
    methods = ("forward", "_conv_forward")
    return not any(
        m in vars(layer) or getattr(type(layer), m, None) is not getattr(kind, m, None)
        for m in methods
    )


def replace(network: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put ``new`` in the place of the layer ``name``, everywhere that layer stands.

    Returns:
        The network; ``new`` itself if ``name`` is ``""``, the root.
    """
    if not name:
        return new
    for place in names_of(network, network.get_submodule(name)):
        path, _, child = place.rpartition(".")
        parent = network.get_submodule(path)
        parent._modules[child] = new
        if isinstance(parent, nn.TransformerEncoderLayer):
            _mind_fast_path(parent)
    return network


def _mind_fast_path(layer: nn.TransformerEncoderLayer) -> None:
    """Leave PyTorch's fast path, which multiplies by the weights itself, to linear layers."""
    kinds: dict[Any, int] = {F.relu: 1, nn.ReLU: 1, F.gelu: 2, nn.GELU: 2}
    activation = kinds.get(layer.activation) or kinds.get(type(layer.activation), 0)
    both = (layer._modules.get("linear1"), layer._modules.get("linear2"))
    is_plain = all(type(one) is nn.Linear for one in both)
    layer.activation_relu_or_gelu = activation if is_plain else 0
