"""Tensors to bytes and back, at the size that information theory allows.

A tensor with ``nnz`` of ``n`` values that are not zero takes ``nnz * bits(value) + n * H(nnz / n)``
bits at least, ``H`` the binary entropy, if its values are noise. Each tensor is split into byte
streams; streams of one kind are joined over all tensors, so that small tensors share a Huffman
table:

==========  ============================================================================  =======
``masks``   one bit a value, set where it is not zero                                     Huffman
``gaps``    how many zeros come before each other value, in one byte, 255 as escape       Huffman
``scales``  of int8 values, one byte per output channel                                   Huffman
``high``    the top byte of each value that is stored; of a float, its exponent           Huffman
``low``     their other bytes; before them, bits cut off gaps that are very long          as is
==========  ============================================================================  =======

A zero is a value whose bits are all zero: -0.0 is kept like any other value, and a NaN keeps its
payload.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.parameter import is_lazy

from slimnets.artifact.quantize import dequantize, narrow, quantize
from slimnets.artifact.streams import (
    ArtifactError,
    Bits,
    Bytes,
    Reader,
    cost,
    cut_bits,
    gaps_of,
    huffman,
    join,
    mask_of,
    most_gap_bytes,
    positions_of_gaps,
    positions_of_mask,
    split,
    unhuffman,
)
from slimnets.layers import LAZY

STREAMS = ("masks", "gaps", "scales", "high", "low")

_NAMES = (
    *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
)
DTYPES: dict[str, torch.dtype] = {n: getattr(torch, n) for n in _NAMES if hasattr(torch, n)}

_SPARSE = 0.3  # share of non-zeros above which gaps are never smaller than the mask


@dataclass(frozen=True)
class Entry:
    """What the index of a file says of one tensor.

    Attributes:
        shape: Of the tensor.
        dtype: Of the tensor.
        stored: Of the values in the file. ``torch.int8`` in the place of a floating-point
            ``dtype`` means multiples of one scale per output channel.
        exact: Whether the tensor comes back bit for bit.
        layout: How the positions of the values are stored; ``"dense"`` needs none.
        nonzeros: How many values are stored.
        scale: Of scaled values, the dimension of the output channels and the smallest scale.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: torch.dtype
    exact: bool
    layout: Literal["dense", "mask", "gaps"]
    nonzeros: int
    scale: tuple[int, int] | None = None

    @property
    def count(self) -> int:
        """How many values the tensor has; a complex number is two."""
        return math.prod(self.shape) * (2 if self.dtype.is_complex else 1)

    @property
    def value(self) -> torch.dtype:
        """The dtype of one stored value."""
        return self.stored.to_real() if self.stored.is_complex else self.stored

    @property
    def cut_bits(self) -> int:
        """How many bits of each gap are in ``low``."""
        return cut_bits(self.count, self.nonzeros) if self.layout == "gaps" else 0

    def lengths(self) -> dict[str, int]:
        """Bytes of each stream before Huffman; of ``gaps``, the most that it can be."""
        low = self.nonzeros * (self.value.itemsize - 1)
        gaps = most_gap_bytes(self.count, self.nonzeros)
        return {
            "masks": -(-self.count // 8) if self.layout == "mask" else 0,
            "gaps": gaps if self.layout == "gaps" else 0,
            "scales": self.shape[self.scale[0]] if self.scale else 0,
            "high": self.nonzeros,
            "low": low + -(-self.nonzeros * self.cut_bits // 8),
        }


class Coded(NamedTuple):
    """One tensor as its index entry and its part of each stream."""

    entry: Entry
    streams: dict[str, Bytes]


def encode(
    tensor: torch.Tensor, stored: torch.dtype | None = None, channel_dim: int = 0, bits: int = 8
) -> Coded:
    """Split one tensor into streams.

    Args:
        tensor: A strided tensor of any shape and device.
        stored: A smaller floating-point dtype, or ``torch.int8`` for one scale per output channel.
            A tensor that it does not suit (not floating-point, no smaller, or not finite in it)
            is stored bit for bit, as with ``None``.
        channel_dim: The dimension of the output channels.
        bits: Of each value that is stored as ``torch.int8``.

    Raises:
        TypeError: If the tensor has no plain values: sparse, quantized, meta and others.
    """
    _refuse_special(tensor)
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu()
    values, scale, parts = tensor, None, {}
    if stored and tensor.is_floating_point() and stored.itemsize < tensor.dtype.itemsize:
        if stored.is_floating_point:
            values = narrow(tensor, stored)
        elif quantized := quantize(tensor, channel_dim, bits):
            values, base, parts["scales"] = quantized
            scale = (channel_dim, base)
    restored = dequantize(values, *scale, parts["scales"]) if scale else values
    exact = restored is tensor or same_bits(restored.to(tensor.dtype), tensor)
    raw = _bits(values)
    nonzero = raw != 0
    nonzeros = int(np.count_nonzero(nonzero))
    layout, positions = _positions(nonzero, nonzeros)
    if sum(map(cost, positions.values())) + nonzeros * raw.itemsize < raw.nbytes:
        raw = raw[nonzero]
        parts |= positions
    else:
        layout, nonzeros = "dense", raw.size
    entry = Entry(tuple(tensor.shape), tensor.dtype, values.dtype, exact, layout, nonzeros, scale)
    parts["high"], low = split(raw, floating=entry.value.is_floating_point)
    parts["low"] = np.concatenate([parts["low"], low]) if "low" in parts else low
    return Coded(entry, parts)


def pool(coded: Sequence[Coded]) -> dict[str, bytes]:
    """Join the streams of all tensors and Huffman-code them; empty ones are left out."""
    joined = {}
    for name in STREAMS:
        parts = [coded[i].streams.get(name) for i in _order([one.entry for one in coded])]
        if present := [part for part in parts if part is not None and part.size]:
            joined[name] = np.concatenate(present).tobytes() if name == "low" else huffman(present)
    return joined


def decode(entries: Sequence[Entry], data: Mapping[str, bytes]) -> list[torch.Tensor]:
    """Undo :func:`encode` and :func:`pool`, with no more memory than ``entries`` declare.

    Returns:
        A tensor on the CPU for each entry, of its shape and dtype.

    Raises:
        ArtifactError: If ``data`` is not what the entries say.
    """
    readers = {}
    for name in STREAMS:
        most = sum(entry.lengths()[name] for entry in entries)
        raw = data.get(name, b"")
        coded = raw and name != "low"
        stream = unhuffman(raw, most, name) if coded else np.frombuffer(raw, np.uint8)
        readers[name] = Reader(name, stream)
    tensors = {i: _decode_one(entries[i], readers) for i in _order(entries)}
    for reader in readers.values():
        reader.finish()
    return [tensors[i] for i in range(len(entries))]


def tied(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The keys whose tensor stands in ``state`` under an earlier key too, with that key."""
    first: dict[Any, str] = {}
    ties = {}
    for name, tensor in state.items():
        if is_lazy(tensor) or tensor.is_meta or tensor.layout is not torch.strided:
            continue
        if tensor.numel():
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            view = (*place, tensor.is_conj(), tensor.is_neg())  # computed when they are read
            if first.setdefault(view, name) != name:
                ties[name] = first[view]
    return ties


def _refuse_special(tensor: torch.Tensor) -> None:
    if is_lazy(tensor):
        raise TypeError(f"a lazy parameter {LAZY}")
    if type(tensor.detach()) is not torch.Tensor or tensor.layout is not torch.strided:
        kind = f"{type(tensor).__name__} of layout {tensor.layout}"
        raise TypeError(f"only plain dense tensors can be stored, not a {kind}")
    if tensor.is_meta:
        raise TypeError("a tensor on the meta device has no values to store")
    if tensor.dtype not in DTYPES.values():
        raise TypeError(f"a tensor of {tensor.dtype} cannot be stored")


def _positions(nonzero: NDArray[np.bool_], nonzeros: int) -> tuple[Any, dict[str, Bytes]]:
    """The smaller of mask and gaps."""
    mask = mask_of(nonzero)
    if nonzeros < _SPARSE * nonzero.size:
        gaps, low = gaps_of(nonzero)
        if len(huffman([gaps])) + low.size < len(huffman([mask])):
            return "gaps", {"gaps": gaps, "low": low}
    return "mask", {"masks": mask}


def _order(entries: Sequence[Entry]) -> list[int]:
    """The order of tensors in the streams: neighbours that are alike share a Huffman table."""

    def likeness(i: int) -> tuple[str, float]:
        entry = entries[i]
        return str(entry.stored), entry.nonzeros / max(entry.count, 1)

    return sorted(range(len(entries)), key=likeness)


def _decode_one(entry: Entry, readers: Mapping[str, Reader]) -> torch.Tensor:
    lengths = entry.lengths()
    where: Any = slice(None)
    if entry.layout == "mask":
        where = positions_of_mask(readers["masks"].take(lengths["masks"]), entry.count)
        if (found := np.count_nonzero(where)) != entry.nonzeros:
            raise ArtifactError(f"stream 'masks': {found} values of {entry.nonzeros}")
    elif entry.layout == "gaps":
        gaps = readers["gaps"].take_gaps(entry.nonzeros, lengths["gaps"])
        cut = readers["low"].take(-(-entry.nonzeros * entry.cut_bits // 8))
        where = positions_of_gaps(gaps, cut, entry.count, entry.nonzeros)
    size, floating = entry.value.itemsize, entry.value.is_floating_point
    high = readers["high"].take(entry.nonzeros)
    low = readers["low"].take(entry.nonzeros * (size - 1))
    bits = join(high, low, size=size, floating=floating)
    if entry.layout != "dense":
        values, bits = bits, np.zeros(entry.count, bits.dtype)
        bits[where] = values
    if entry.value is torch.bool and (bits > 1).any():
        raise ArtifactError("a bool that is neither 0 nor 1")
    tensor = torch.from_numpy(bits.view(np.uint8)).view(entry.stored).reshape(entry.shape)
    if entry.scale:
        tensor = dequantize(tensor, *entry.scale, readers["scales"].take(lengths["scales"]))
    return tensor.to(entry.dtype)


def _bits(tensor: torch.Tensor) -> Bits:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = real.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().view(f"u{flat.itemsize}")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors on the CPU have the same bits: NaN equals NaN, 0.0 is not -0.0."""
    return bool(np.array_equal(_bits(a), _bits(b)))
