"""Floating-point tensors in fewer bits, where one asks for it."""

import numpy as np
import torch

from slimnets.artifact.streams import Bytes

_MANTISSA_CUT = 20  # of float32's 23 bits; what is left makes the product with an int8 exact


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
    exceed ``2**(bits - 1) - 1``, so that one byte holds it, relative to the smallest scale of all.

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
    base = int(codes[live].min())
    codes = np.where(live, codes - base, 0)
    if codes.max() > 255:
        return None
    relative = codes.astype(np.uint8)
    scale = _per_channel(base, relative, channel_dim, values.dim())
    multiples = (values / scale).round_().clamp_(-most, most)
    if not (multiples * scale).to(tensor.dtype).isfinite().all():
        return None
    return multiples.to(torch.int8), base, relative


def dequantize(
    multiples: torch.Tensor, channel_dim: int, base: int, relative: Bytes
) -> torch.Tensor:
    """Undo :func:`quantize`, in float32."""
    return multiples * _per_channel(base, relative, channel_dim, multiples.dim())


def _per_channel(base: int, relative: Bytes, channel_dim: int, dims: int) -> torch.Tensor:
    bits = (base + relative.astype(np.uint32)) << _MANTISSA_CUT
    shape = [1] * dims
    shape[channel_dim] = -1
    return torch.from_numpy(bits.view(np.float32)).reshape(shape)
