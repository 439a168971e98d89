"""Which layers a method may touch: chosen by glob, type or predicate."""

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias, TypeVar

from torch import nn

from slimnets.layers import plain_name

T = TypeVar("T")

Selector: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""A glob over names of layers or what contains them, a type of either, or a predicate of (name,
layer)."""

Selectors: TypeAlias = Iterable[Selector] | Selector  # LightningCLI saves a list as the first


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
