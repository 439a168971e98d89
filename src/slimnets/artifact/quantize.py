"""Floating-point tensors in fewer bits, where one asks for it."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slimnets.artifact.streams import Bytes

_MANTISSA_CUT = 20  # of float32's 23 bits; what is left makes the product with an int8 exact
_REACH = 6  # how far above the smallest scale that of values may be that had 2 bits before


def narrow(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` in a smaller floating-point dtype; as it is, if a value would not stay finite.

    What is rounded to zero is +0.0, so that it takes no room as a value.
    """
    narrowed = tensor.to(dtype)
    if not torch.equal(narrowed.isfinite(), tensor.isfinite()):
        return tensor
    return narrowed.masked_fill_(narrowed == 0, 0.0)


def quantize(
    tensor: torch.Tensor, channel_dim: int, bits: int = 8
) -> tuple[torch.Tensor, int, Bytes] | None:
    """``tensor`` as int8 multiples of one scale per channel, of at most ``bits`` bits each.

    A scale is the smallest float32 with 3 bits of mantissa that lets no value of the channel
    exceed ``2**(bits - 1) - 1``, so that one byte holds it, relative to the smallest scale of all;
    or one that is a little larger, if all values are multiples of that, as they are of a file.

    Returns:
        The multiples, the smallest scale's code, and each channel's beyond that one; ``None`` if
        there are fewer than two dimensions, a value is not finite, or the channels differ by more
        than 32 octaves.
    """
    if tensor.dim() < 2:
        return None
    values = tensor.float()
    others = [dim for dim in range(values.dim()) if dim != channel_dim]
    largest = values.abs().amax(others) if values.numel() else values.new_zeros(0)
    live = (largest > 0).numpy()
    if not live.any() or not largest.isfinite().all():
        return None
    most = 2 ** (bits - 1) - 1
    codes = ((largest / (most + 0.5)).numpy().view(np.uint32) >> _MANTISSA_CUT).astype(np.int64) + 1
    codes = _of_multiples(tensor.movedim(channel_dim, 0).flatten(1), largest, codes)
    base = int(codes[live].min())
    codes = np.where(live, codes - base, 0)
    if codes.max() > 255:
        return None
    scale = _scales(codes + base, channel_dim, values.dim())
    flat = scale.flatten()
    if not ((largest / flat).round_().clamp_(max=most) * flat).to(tensor.dtype).isfinite().all():
        return None
    multiples = (values / scale).round_().clamp_(-most, most)
    return multiples.to(torch.int8), base, codes.astype(np.uint8)


def _of_multiples(
    rows: torch.Tensor, largest: torch.Tensor, codes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """``codes`` with the largest scale within reach of which all values of a row are multiples."""
    found, largest = codes.copy(), largest.to(rows.dtype)[:, None]
    for more in range(1, _REACH + 1):
        scale = _scales(codes + more, 0, 2)
        left = _are_multiples(largest, scale).nonzero().flatten()  # which is none, as a rule
        left = left[_are_multiples(rows[left], scale[left])]
        found[left.numpy()] = codes[left.numpy()] + more
    return found


def _are_multiples(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    restored = (rows.float() / scale).round_() * scale
    return (restored.to(rows.dtype) == rows).all(1)


def dequantize(
    multiples: torch.Tensor, channel_dim: int, base: int, relative: Bytes
) -> torch.Tensor:
    """Undo :func:`quantize`, in float32."""
    return multiples * _scales(base + relative.astype(np.uint32), channel_dim, multiples.dim())


def _scales(codes: NDArray[np.integer[Any]], channel_dim: int, dims: int) -> torch.Tensor:
    shape = [1] * dims
    shape[channel_dim] = -1
    floats = (codes.astype(np.uint32) << _MANTISSA_CUT).view(np.float32)
    return torch.from_numpy(floats).reshape(shape)
