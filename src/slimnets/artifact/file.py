"""A compressed network to one small file, and back."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.parameter import is_lazy

from slimnets.artifact.codec import decode, same_bits, tied
from slimnets.artifact.container import naming, pack, place_of, read
from slimnets.artifact.streams import ArtifactError
from slimnets.files import PathLike, write
from slimnets.layers import INTEGERS, compressed_network, paths_in, plain_name, replace
from slimnets.lowrank.modules import restructure

_MANY = 0.01  # share of negative zeros that is worth a warning
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def save(
    model: nn.Module, path: PathLike, *, dtype: torch.dtype | None = None, bits: int = 8
) -> None:
    """Write the parameters and persistent buffers of ``model`` to one small file.

    Tensors with zeros are stored as positions and values where that is smaller, tied ones once.
    The file is written beside ``path`` and renamed, so what was there survives any failure. A
    negative zero takes as much room as any value; many of them are warned of.

    Args:
        model: A network, a LightningModule or a DistillationModule (its student is saved);
            compiled by :func:`torch.compile` or not.
        path: Where to; ``.safetensors`` is the usual suffix.
        dtype: ``None`` is bit-exact. ``torch.float16`` and ``torch.bfloat16`` round all larger
            floating-point tensors. ``torch.int8`` rounds parameters of two and more dimensions with
            "weight" in their names to multiples of one scale per output channel. A tensor that
            would not stay finite is stored as it is.
        bits: Of each value that ``torch.int8`` rounds, 2 to 8. As values are Huffman-coded, a bit
            less makes the file smaller by about a bit for each (Han, Mao and Dally 2016, arXiv
            1510.00149, have 8 in convolutions and 5 in other layers). Of 6 and fewer, batch norm's
            statistics are worth taking anew: :func:`load`, :func:`torch.optim.swa_utils.update_bn`
            and ``save`` again, which leaves values as they are that were rounded before.

    Raises:
        ValueError: If ``dtype`` is none of these, or ``bits`` does not go with it.
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
    state = {plain_name(name): value for name, value in network.state_dict().items()}
    layers = {plain_name(name): one for name, one in network.named_modules(remove_duplicate=False)}
    transposed = {name for name in state if isinstance(layers.get(place_of(name)[0]), _TRANSPOSED)}
    buffers = {plain_name(name) for name, _ in network.named_buffers(remove_duplicate=False)}
    write(path, pack(state, dtype, bits, transposed, buffers))
    if dtype is None:  # others round them to plain ones
        _warn_of_negative_zeros(path, state)


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

    An error of a hook of the model's own, or of ``set_extra_state``, comes when values are copied:
    the structure is as it was then, but some of the values are those of the file.
    """
    network = compressed_network(model)
    with naming(path), _structure_kept_on_error(network):
        info, streams = read(path)
        own = _own_names(network, info.shapes)
        shapes = {own[name]: shape for name, shape in info.shapes.items()}
        _refuse_unfillable(_tensors(network.state_dict()))
        loaded = _restructured(network, shapes)
        state = loaded.state_dict()
        target = _tensors(state)
        _compare(shapes, state, target)
        tensors = dict(zip(info.tensors, decode([*info.tensors.values()], streams), strict=True))
        tensors |= {name: tensors[first] for name, first in info.ties.items()}
        filled = {own[name]: tensor for name, tensor in tensors.items()}
        _compare_ties(tied(target), filled)
        rounded = dict(info.inexact) | {
            name: target[own[name]].dtype
            for name, tensor in tensors.items()
            if own[name] in target and not _fits(tensor, target[own[name]].dtype)
        }
        # In place, for the versions of the modules' own formats, which come with the state dict.
        state.update(filled)
        loaded.load_state_dict(state)
    _report(path, rounded)
    if loaded is network:
        return model
    (place,) = paths_in(model, {"": loaded})
    return replace(model, place, loaded)


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
def _structure_kept_on_error(network: nn.Module) -> Iterator[None]:
    before = [(one, dict(vars(one)), dict(one._modules)) for one in network.modules()]
    try:
        yield
    except BaseException:
        for module, attributes, children in before:
            vars(module).update(attributes)  # among them whether there is a fast path
            module._modules.clear()
            module._modules.update(children)
        raise


def _restructured(network: nn.Module, shapes: Mapping[str, torch.Size]) -> nn.Module:
    compiled = [m for m in network.modules() if "_orig_mod" in m._modules]
    originals = [m._modules["_orig_mod"] for m in compiled]
    try:
        loaded: nn.Module = restructure(network, shapes)
    except ValueError as error:
        raise ArtifactError(str(error)) from error
    if any(m._modules["_orig_mod"] is not o for m, o in zip(compiled, originals, strict=True)):
        raise ValueError("load: a compiled layer cannot become a low-rank pair; compile after load")
    return loaded


def _tensors(state: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """The values of a state dict that have a shape: no lazy ones, no extra state."""
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not is_lazy(value)
    }


def _refuse_unfillable(target: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in target.items():
        if tensor.is_meta:
            raise ValueError(
                f"load: {name!r} of the model is on the meta device, without memory to fill; call "
                "model.to_empty(device=...) first"
            )
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        if any(size > 1 and not stride for size, stride in strides):
            raise ValueError(f"load: {name!r} of the model is expanded; clone it first")


def _compare(
    shapes: Mapping[str, torch.Size],
    names: Collection[str],
    target: Mapping[str, torch.Tensor],
) -> None:
    """Raise unless the file and the model have the same keys and shapes."""
    wrong = [f"{name!r} is missing in the file" for name in names if name not in shapes]
    wrong += [f"{name!r} is missing in the model" for name in shapes if name not in names]
    for name in [name for name in target if name in shapes]:
        shape, own = shapes[name], target[name].shape
        if own != shape and not name.endswith("_extra_state"):
            wrong.append(f"{name!r} is {tuple(shape)} in the file, {tuple(own)} in the model")
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        if part := _only_part(shapes, names):
            more += (
                f"; all of the file is in {part!r}: save that part alone, or, of a checkpoint, "
                f"convert_checkpoint(..., network={part!r})"
            )
        elif part := _only_part(names, shapes):
            more += f"; all of the model is in {part!r}: load into that part"
        raise ArtifactError(f"does not fit the model: {'; '.join(wrong[:5])}{more}")


def _only_part(names: Collection[str], inner: Collection[str]) -> str:
    """The part that all ``names`` are in, if without it they are like ``inner``; otherwise ""."""
    part, *others = {name.partition(".")[0] for name in names} or {""}
    rest = {name.partition(".")[2] for name in names}
    return "" if others or not rest & set(inner) or set(names) & set(inner) else part


def _compare_ties(ties: Mapping[str, str], state: Mapping[str, torch.Tensor]) -> None:
    for name, first in ties.items():
        if state[name] is not state[first] and not same_bits(state[name], state[first]):
            raise ArtifactError(
                f"does not fit the model: {name!r} and {first!r} are one tensor in the model, but "
                "have different values in the file"
            )


def _fits(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype or same_bits(tensor.to(dtype).to(tensor.dtype), tensor)


def _warn_of_negative_zeros(path: PathLike, state: Mapping[str, torch.Tensor]) -> None:
    floats = [t for t in state.values() if t.is_floating_point() and t.itemsize > 1]
    integers = [t.view(INTEGERS[t.itemsize]) for t in floats]  # the sign alone is the least
    negative = sum(int((t == torch.iinfo(t.dtype).min).count_nonzero()) for t in integers)
    if negative > _MANY * sum(t.numel() for t in floats):
        rank_zero_warn(
            f"{path}: {negative:,} zeros are negative, as weights times a mask have them, and kept "
            "bit for bit, each with the room of any value; for a smaller file, make them plain by "
            "weight.data.add_(0.0), weight by weight, and save again"
        )


def _report(path: PathLike, rounded: Mapping[str, torch.dtype]) -> None:
    """Say which values are not those that were saved."""
    names_of: dict[torch.dtype, list[str]] = {}
    for name, dtype in rounded.items():
        names_of.setdefault(dtype, []).append(name)
    for dtype, names in names_of.items():
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        rank_zero_info(
            f"{path}: {len(names)} tensors are no longer bit-exact, rounded to {dtype}: "
            f"{', '.join(names[:20])}{more}"
        )
