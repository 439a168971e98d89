"""Which weights are pruned, and how many of each."""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from slimnets.arguments import check_number
from slimnets.layers import LAZY, address_of, inside_metrics, is_parametrized
from slimnets.lowrank.modules import pairs_of
from slimnets.selectors import (
    Selector,
    Selectors,
    as_selectors,
    assign,
    glob_matches,
    matches,
    without,
)

Sparsity: TypeAlias = float | Mapping[str, float]
Scope: TypeAlias = Literal["layer", "global"]

# in "Type.parameter" of others: tables of biases, positions and tokens, and norms of several axes
_NO_WEIGHT = re.compile(r"\..*(bias|token)|embed|norm(\dd)?\.", re.IGNORECASE)


def prunable_weights(
    network: nn.Module, exclude: Selectors = (), *, layers: Mapping[str, object] | None = None
) -> dict[str, nn.Parameter]:
    """The weights of convolutions, linear and recurrent layers and attention projections.

    Biases, norms and embeddings are never among them, nor weights that are computed from other
    parameters (weight norm) or quantized, nor those of networks within metrics (LPIPS). A weight
    that several layers share is there once, and not at all if one of them is excluded.

    Args:
        network: The network whose layers' names the selectors see.
        exclude: Layers to leave out: globs over names, types, with what is within them, or
            predicates of (name, layer).
        layers: If given, only layers of these names.

    Returns:
        Name, as in the state dict, to parameter.

    Raises:
        TypeError: If a selector is neither a glob, nor a layer type, nor a predicate.
        ValueError: If a selector chooses no layer, or a lazy layer has no weights yet.
    """
    candidates, measuring = prunable_layers(network), inside_metrics(network)
    kept = without(network, candidates, as_selectors(exclude), pairs_of(network))
    kept = {name: layer for name, layer in kept.items() if id(layer) not in measuring}
    out = {
        address_of(weights)
        for name, layer in candidates.items()
        if name not in kept
        for weights in _weights_of(layer).values()
    } | _of_embeddings(network)
    found: dict[str, nn.Parameter] = {}
    for name, layer in kept.items():
        if layers is not None and name not in layers:
            continue
        for key, parameter in _weights_of(layer).items():
            if is_lazy(parameter):
                raise ValueError(f"layer {name!r} ({type(layer).__name__}) {LAZY}")
            if parameter.numel() and address_of(parameter) not in out:
                out.add(address_of(parameter))
                found[_path(name, key)] = parameter
    return found


def prunable_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Name to layer, for every layer that owns a weight to prune; a shared layer by each name."""
    modules = network.named_modules(remove_duplicate=False)
    return {name: layer for name, layer in modules if _weights_of(layer)}


def left_alone(network: nn.Module) -> dict[str, str]:
    """Name of each layer that a user would expect to be pruned and that is not, and why.

    Where the type of the layer is not known, or others of its weights are pruned, the name of the
    weight.
    """
    embeddings, measuring = _of_embeddings(network), inside_metrics(network)
    weights = [w for layer in network.modules() for w in _weights_of(layer).values()]
    known = embeddings.union(map(address_of, weights))
    reasons: dict[str, str] = {}
    for name, layer in network.named_modules():
        if id(layer) in measuring:
            continue
        if computed := [key for key in _names_of(layer) if is_parametrized(layer, key)]:
            which = [_path(name, key) for key in computed] if _weights_of(layer) else [name]
            reasons |= dict.fromkeys(which, "its weight is computed from other parameters")
        elif any(address_of(w) in embeddings for w in _weights_of(layer).values()):
            reasons[name] = "its weight is that of an embedding"
        elif quantized := [w.dtype for w in _own(layer).values() if not _has_magnitudes(w)]:
            reasons[name] = f"its weight is of {quantized[0]}"
        elif not _names_of(layer) and not isinstance(layer, ParametrizationList):
            kind = type(layer).__name__
            for key, parameter in layer.named_parameters(recurse=False):
                if address_of(parameter) not in known and _is_matrix(f"{kind}.{key}", parameter):
                    reasons[_path(name, key)] = (
                        f"the type of its layer, {kind}, is not known (in an nn.Linear it would "
                        "be pruned)"
                    )
    return reasons


def left_unasked(network: nn.Module, sparsity: Sparsity, exclude: Iterable[Selector]) -> list[str]:
    """What is left alone and was not excluded, and why: a sentence's end for each reason."""
    alone: dict[str, list[str]] = {}
    modules = dict(network.named_modules())
    for name, reason in left_alone(network).items():
        asked = not isinstance(sparsity, Mapping) or any(glob_matches(name, g) for g in sparsity)
        if asked and not any(matches(name, modules, one) for one in exclude):
            alone.setdefault(reason, []).append(repr(name))
    return [
        f"{names[0] if len(names) == 1 else 'each of ' + ', '.join(names)} alone: {reason}"
        for reason, names in alone.items()
    ]


def _path(layer: str, key: str) -> str:
    """The name of a layer's parameter in the network; the root is called ""."""
    return f"{layer}.{key}" if layer else key


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter looks like a weight to prune: no vector, nothing that is broadcast."""
    if is_lazy(parameter) or parameter.ndim < 2:
        return False
    return 1 < len(parameter) < parameter.numel() and not _NO_WEIGHT.search(name)


def _of_embeddings(network: nn.Module) -> set[int]:
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return {address_of(layer.weight) for layer in network.modules() if isinstance(layer, kinds)}


def _weights_of(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weights for name, weights in _own(layer).items() if _has_magnitudes(weights)}


def _own(layer: nn.Module) -> dict[str, nn.Parameter]:
    own = layer._parameters
    return {name: weights for name in _names_of(layer) if (weights := own.get(name)) is not None}


def _has_magnitudes(weights: nn.Parameter) -> bool:
    """Whether there is arithmetic for its values: none for integers' and those of one byte."""
    return weights.is_complex() or (weights.is_floating_point() and weights.itemsize > 1)


def _names_of(layer: nn.Module) -> list[str]:
    """The names of the weights that a layer of this type has."""
    if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
        return ["weight"]
    if isinstance(layer, nn.RNNBase):
        return [name for name in layer._flat_weights_names if name.startswith("weight")]
    if isinstance(layer, nn.RNNCellBase):
        return ["weight_ih", "weight_hh"]
    if isinstance(layer, nn.MultiheadAttention):
        return ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
    return []


def check_sparsity(sparsity: Sparsity) -> None:
    """Raise unless ``sparsity`` is a fraction in [0, 1), or a mapping of globs to such fractions.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is out of range.
    """
    if not isinstance(sparsity, Mapping):
        check_fraction(sparsity, "sparsity")
        return
    if not sparsity:
        raise ValueError("sparsity={}: expected at least one glob and its sparsity")
    for glob, value in sparsity.items():
        if not isinstance(glob, str):
            raise TypeError(f"sparsity: expected globs as keys, got {glob!r}")
        check_fraction(value, f"sparsity[{glob!r}]")


def check_fraction(value: object, argument: str) -> None:
    """Raise TypeError or ValueError unless ``value`` is a number in [0, 1)."""

    def hint(number: float) -> str:
        return f", did you mean {number / 100:g}?" if 1 < number < 100 else ""

    check_number(argument, value, "a fraction in [0, 1)", lambda number: 0 <= number < 1, hint)


def check_scope(scope: str, sparsity: Sparsity) -> None:
    """Raise unless ``scope`` is known and goes together with ``sparsity``.

    Raises:
        ValueError: If it does not.
    """
    if scope not in ("layer", "global"):
        raise ValueError(f"scope={scope!r}: expected 'layer' or 'global'")
    if scope == "global" and isinstance(sparsity, Mapping):
        raise ValueError(
            "scope='global' with a mapping as sparsity: a global target is one number; "
            "give one, or scope='layer'"
        )


def target_sparsity(
    network: nn.Module, sparsity: Sparsity, exclude: Selectors = ()
) -> tuple[dict[str, nn.Parameter], dict[str, float]]:
    """The weights to prune and the final sparsity of each.

    Args:
        network: The network to prune.
        sparsity: A fraction in [0, 1) for every layer, or a mapping of globs over layer names to
            fractions; the first that matches wins, and layers that none matches are left alone. A
            weight that several layers share is matched by the names of all that are not left.
        exclude: As in :func:`prunable_weights`.

    Returns:
        Name to parameter, and name to fraction.

    Raises:
        ValueError: If a glob or selector chooses nothing, or there is nothing to prune.
    """
    layers = without(network, prunable_layers(network), as_selectors(exclude), pairs_of(network))
    per_layer = assign(sparsity, layers, "sparsity", network)
    parameters = prunable_weights(network, exclude, layers=per_layer)
    shares: dict[int, float] = {}
    for name, share in per_layer.items():
        for weights in _weights_of(layers[name]).values():
            shares.setdefault(address_of(weights), float(share))
    targets = {name: shares[address_of(weights)] for name, weights in parameters.items()}
    if not parameters:
        raise ValueError(
            f"{type(network).__name__} has no layer to prune: no convolution, linear or recurrent "
            "layer with weights of its own is left"
        )
    return parameters, targets
