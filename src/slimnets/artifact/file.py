"""A compressed network to one small file, and back."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.nn.parameter import is_lazy

from slimnets.artifact.codec import decode, same_bits, tied
from slimnets.artifact.container import PathLike, naming, pack, read, write
from slimnets.artifact.streams import ArtifactError
from slimnets.layers import compressed_network

_COMPILED = re.compile(r"(^|\.)_orig_mod(?=\.|$)")
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def save(model: nn.Module, path: PathLike, *, dtype: torch.dtype | None = None) -> None:
    """Write the parameters and persistent buffers of ``model`` to one small file.

    Tensors with zeros are stored as positions and values where that is smaller, tied ones once.
    The file is written beside ``path`` and renamed, so what was there survives any failure.

    Args:
        model: A network, a LightningModule or a DistillationModule (its student is saved);
            compiled by :func:`torch.compile` or not.
        path: Where to; ``.safetensors`` is the usual suffix.
        dtype: ``None`` is bit-exact. ``torch.float16`` and ``torch.bfloat16`` round all larger
            floating-point tensors. ``torch.int8`` rounds weights of two and more dimensions to
            multiples of one scale per output channel. A tensor that would not stay finite is
            stored as it is.

    Raises:
        ValueError: If ``dtype`` is none of these.
        TypeError: If the state dict holds what is no plain tensor, extra state for example.
        OSError: If the file cannot be written.

    Examples:
        >>> import tempfile
        >>> path = f"{tempfile.mkdtemp()}/net.safetensors"
        >>> net, fresh = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> save(net, path)
        >>> load(path, fresh).weight.equal(net.weight)
        True
    """
    network = compressed_network(model)
    transposed = {
        plain_name(f"{name}.weight")
        for name, layer in network.named_modules(remove_duplicate=False)
        if isinstance(layer, _TRANSPOSED)
    }
    state = {plain_name(name): value for name, value in network.state_dict().items()}
    write(path, pack(state, dtype, transposed))


def load(path: PathLike, model: nn.Module) -> nn.Module:
    """Give ``model`` the low-rank structure and the values that a file holds.

    Values are copied into the parameters and buffers that are there, so that these keep their
    dtype, device and ties. Which of them are no longer bit for bit what was saved, because of the
    ``dtype`` of :func:`save` or of ``model``, is logged.

    Args:
        path: A file of :func:`save`.
        model: The plain network as its author builds it.

    Returns:
        ``model``; but if it is itself a layer that the file holds as a low-rank pair, the pair.

    Raises:
        ArtifactError: If the file is damaged, or that of another network. ``model`` is as it was.
        ValueError: If ``model`` has tensors that cannot be filled. ``model`` is as it was.
        OSError: If the file cannot be read.
    """
    network = compressed_network(model)
    with naming(path), _modules_kept_on_error(network):
        info, streams = read(path)
        own = _own_names(network, info.shapes)
        shapes = {own[name]: shape for name, shape in info.shapes.items()}
        loaded = _restructured(network, shapes)
        target = loaded.state_dict()
        _refuse_unfillable(target)
        _compare(shapes, target)
        tensors = dict(zip(info.tensors, decode([*info.tensors.values()], streams), strict=True))
        tensors |= {name: tensors[first] for name, first in info.ties.items()}
        state = {own[name]: tensor for name, tensor in tensors.items()}
        _compare_ties(tied(target), state)
        changed = dict(info.inexact)
        for name, tensor in tensors.items():
            dtype = getattr(target[own[name]], "dtype", tensor.dtype)
            if not same_bits(tensor.to(dtype).to(tensor.dtype), tensor):
                changed[name] = dtype
        # In place, for the versions of the modules' own formats, which come with it.
        target.update(state)
        loaded.load_state_dict(target)
    _report(path, changed)
    return model if loaded is network else loaded


def plain_name(name: str) -> str:
    """``name`` without what :func:`torch.compile` adds."""
    return _COMPILED.sub("", name).removeprefix(".")


def _own_names(network: nn.Module, names: Mapping[str, object]) -> dict[str, str]:
    """What ``network``, parts of which may be compiled, calls each of the plain ``names``."""
    modules = {plain_name(name): name for name, _ in network.named_modules(remove_duplicate=False)}
    own = {}
    for name in names:
        place, rest = name, ""
        while place not in modules:
            place, _, last = place.rpartition(".")
            rest = f".{last}{rest}"
        own[name] = (modules[place] + rest).removeprefix(".")
    return own


@contextmanager
def _modules_kept_on_error(network: nn.Module) -> Iterator[None]:
    before = [(module, dict(module._modules)) for module in network.modules()]
    try:
        yield
    except BaseException:
        for module, children in before:
            module._modules.clear()
            module._modules.update(children)
        raise


def _restructured(network: nn.Module, shapes: Mapping[str, torch.Size]) -> nn.Module:
    from slimnets.lowrank.modules import restructure

    compiled = [m for m in network.modules() if "_orig_mod" in m._modules]
    originals = [m._modules["_orig_mod"] for m in compiled]
    try:
        loaded: nn.Module = restructure(network, shapes)
    except ValueError as error:
        raise ArtifactError(str(error)) from error
    if any(m._modules["_orig_mod"] is not o for m, o in zip(compiled, originals, strict=True)):
        raise ValueError("load: a compiled layer cannot become a low-rank pair; compile after load")
    return loaded


def _refuse_unfillable(target: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in target.items():
        if not isinstance(tensor, torch.Tensor) or is_lazy(tensor):
            continue
        if tensor.is_meta:
            raise ValueError(
                f"load: {name!r} of the model is on the meta device, without memory to fill; call "
                "model.to_empty(device=...) first"
            )
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        if any(size > 1 and not stride for size, stride in strides):
            raise ValueError(f"load: {name!r} of the model is expanded; clone it first")


def _compare(shapes: Mapping[str, torch.Size], target: Mapping[str, torch.Tensor]) -> None:
    """Raise unless the file and the model have the same keys and shapes."""
    wrong = [f"{name!r} is missing in the file" for name in target if name not in shapes]
    for name, shape in shapes.items():
        if name not in target:
            wrong.append(f"{name!r} is missing in the model")
        elif isinstance(target[name], torch.Tensor) and not is_lazy(target[name]):
            there = target[name].shape
            if there != shape and not name.endswith("_extra_state"):
                wrong.append(f"{name!r} is {tuple(shape)} in the file, {tuple(there)} in the model")
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ArtifactError(f"does not fit the model: {'; '.join(wrong[:5])}{more}")


def _compare_ties(ties: Mapping[str, str], state: Mapping[str, torch.Tensor]) -> None:
    for name, first in ties.items():
        if state[name] is not state[first] and not same_bits(state[name], state[first]):
            raise ArtifactError(
                f"does not fit the model: {name!r} and {first!r} are one tensor in the model, but "
                "have different values in the file"
            )


def _report(path: PathLike, changed: Mapping[str, torch.dtype]) -> None:
    """Say which values are not those that were saved."""
    reasons: dict[torch.dtype, list[str]] = {}
    for name, dtype in changed.items():
        reasons.setdefault(dtype, []).append(name)
    for dtype, names in reasons.items():
        rank_zero_info(f"{path}: no longer bit-exact, rounded to {dtype}: {', '.join(names)}")
