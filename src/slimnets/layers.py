"""Which layers a method may touch: chosen by glob, type or predicate, replaced by name."""

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, TypeAlias, TypeVar

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

Selector: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""A glob over names of layers or what contains them, a type of either, or a predicate of (name,
layer)."""

Selectors: TypeAlias = Iterable[Selector] | Selector  # LightningCLI saves a list as the first


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


def as_selectors(exclude: Selectors) -> tuple[Selector, ...]:
    """``exclude`` as a tuple, each one checked.

    Raises:
        TypeError: If one is neither a glob, nor a layer type, nor a predicate.
    """
    # a layer is callable, and a Sequential is iterable too
    single = isinstance(exclude, str | nn.Module) or not isinstance(exclude, Iterable)
    found: tuple[Selector, ...] = (exclude,) if single else tuple(exclude)  # type: ignore[arg-type, assignment]
    for one in found:
        is_layer_type = isinstance(one, type) and issubclass(one, nn.Module)
        is_predicate = callable(one) and not isinstance(one, type | nn.Module)
        if not (isinstance(one, str) or is_layer_type or is_predicate):
            raise TypeError(
                f"exclude={one!r}: expected a glob over layer names such as 'classifier.*', "
                "a layer type such as nn.Linear, or a predicate of (name, layer)"
            )
    return found


def glob_matches(name: str, glob: str) -> bool:
    """Whether ``glob`` matches ``name``, or that of a module in which the layer ``name`` stands.

    So a glob that chose a layer goes on choosing it when a pair of layers has taken its place, and
    when a module around it has been compiled.

    Examples:
        >>> [glob_matches("block.conv.first", g) for g in ("block.conv", "block.*", "conv")]
        [True, True, False]
        >>> glob_matches("block._orig_mod.conv", "block.conv")
        True
    """
    ways = (name.split("."), plain_name(name).split("."))
    paths = [".".join(way[:n]) for way in ways for n in range(len(way), 0, -1)]
    return glob in paths or any(fnmatchcase(path, glob) for path in paths)  # "[" may be in a name


def matches(name: str, modules: Mapping[str, nn.Module], selector: Selector) -> bool:
    """Whether ``selector`` chooses the layer ``name``: a glob or a type also by what is around it.

    Args:
        name: Of a layer, or of a parameter of it.
        modules: The modules of the network by name.
        selector: A glob, a type, or a predicate of (name, layer).
    """
    if isinstance(selector, str):
        return glob_matches(name, selector)
    layer = name if name in modules else name.rpartition(".")[0]
    if isinstance(selector, type):
        parts = layer.split(".")
        around = [modules.get(".".join(parts[:n])) for n in range(len(parts) + 1)]
        return any(isinstance(module, selector) for module in around)
    return selector(layer, modules[layer])


def without(
    network: nn.Module,
    layers: Mapping[str, nn.Module],
    exclude: Iterable[Selector],
    pairs: Mapping[str, nn.Module] | None = None,
) -> dict[str, nn.Module]:
    """``layers`` without those that one of ``exclude`` chooses.

    Args:
        network: Where they stand.
        layers: Name to layer.
        exclude: What to leave out.
        pairs: Name to what has taken a layer's place, whose own layers are among ``layers``:
            predicates are tried on it, too, so that one goes on choosing what it chose.

    Raises:
        ValueError: If one of ``exclude`` chooses nothing.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    kept, pairs = dict(layers), pairs or {}
    for selector in exclude:
        chosen = [name for name in layers if matches(name, modules, selector)]
        if not isinstance(selector, str | type):  # those know what is around a layer
            replaced = [name for name, pair in pairs.items() if selector(name, pair)]
            chosen += [name for name in layers if name.rpartition(".")[0] in replaced]
        if not chosen:
            raise ValueError(_chose_nothing("exclude", selector, layers, modules))
        for name in chosen:
            kept.pop(name, None)
    return kept


def assign(
    values: T | Mapping[str, T],
    layers: Mapping[str, nn.Module],
    argument: str,
    network: nn.Module | None = None,
) -> dict[str, T]:
    """Give each layer its value, in the order of the globs; layers that none matches are left out.

    Args:
        values: One for all, or glob over layer names to value, of which the first match wins.
        layers: Layer name to layer.
        argument: What to call ``values`` in an error.
        network: Where the layers stand, to say in an error what a glob matches instead.

    Raises:
        ValueError: If a glob matches none of ``layers``, or only some that earlier ones match.

    Examples:
        >>> layers = {"features.0": nn.Linear(2, 2), "head": nn.Linear(2, 2)}
        >>> assign({"head": 0.5, "*": 0.9}, layers, "sparsity")
        {'head': 0.5, 'features.0': 0.9}
    """
    if not isinstance(values, Mapping):
        return dict.fromkeys(layers, values)
    winners: dict[str, str] = {}
    for glob, value in values.items():
        matched = [name for name in layers if glob_matches(name, glob)]
        if not matched:
            modules = dict(network.named_modules()) if network else {}
            raise ValueError(_chose_nothing(argument, glob, layers, modules))
        won = [name for name in matched if name not in winners]
        if not won:
            earlier = ", ".join(repr(one) for one in dict.fromkeys(winners[n] for n in matched))
            raise ValueError(
                f"{argument}[{glob!r}]={value!r} has no effect: the first glob that matches wins, "
                f"and its layers are all those of {earlier} before it; put {glob!r} first"
            )
        winners |= dict.fromkeys(won, glob)
    return {name: values[glob] for name, glob in winners.items()}


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


def _chose_nothing(
    argument: str, selector: Selector, layers: Iterable[str], modules: Mapping[str, nn.Module]
) -> str:
    what = getattr(selector, "__name__", None) or repr(selector)
    available = ", ".join(repr(name) for name in layers) or "none"
    others = {
        type(module).__name__
        for name, module in modules.items()
        if isinstance(selector, str) and module._parameters and glob_matches(name, selector)
    }
    hint = f" ({', '.join(sorted(others))} is none)" if others else ""
    return f"{argument}: {what} matches no layer{hint}; the layers are: {available}"
