"""Attention between its projections, as PyTorch computes it in eval mode.

PyTorch has three ways, and they differ where masks leave a query nothing to attend to: NaN if
weights are returned, zero from ``scaled_dot_product_attention``, NaN from the fused kernels, to
which every number but zero in a mask means "masked".

The functions are leaves of a trace, so masks are looked at when the network runs. What they do not
know raises, and ``Accelerated`` then asks PyTorch, which has its own errors.
"""

import math

import torch
from torch import Tensor, fx
from torch.nn import functional as F


def additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """``mask`` as numbers to add to the scores: minus infinity where a Boolean one is true.

    Raises:
        TypeError: If it is of integers.
    """
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise TypeError(f"a mask of {mask.dtype}")
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)


def one_tensor(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether it is self-attention."""
    return query is key and key is value


def fuses(
    possible: bool, same: bool, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> bool:
    """Whether ``nn.MultiheadAttention`` uses a fused kernel, where it is ``possible``."""
    masks = [mask for mask in (key_padding_mask, attn_mask) if mask is not None]
    return possible and same and not any(mask.is_floating_point() for mask in masks)


def padded_positions(
    src: Tensor, key_padding_mask: Tensor | None, mask: Tensor | None, nested: bool
) -> Tensor | None:
    """Where ``nn.TransformerEncoder`` drops the padding and puts zeros: (batch, sequence).

    It does with padding at the ends and no other mask; otherwise ``None``.

    Raises:
        ValueError: If there is nothing but padding.
    """
    if not nested or key_padding_mask is None or mask is not None or src.dim() != 3:
        return None
    if torch.compiler.is_compiling() or not torch.backends.mha.get_fastpath_enabled():
        return None
    if not torch._nested_tensor_from_mask_left_aligned(src, key_padding_mask.logical_not()):
        return None
    padded = key_padding_mask != 0
    if padded.all():
        raise ValueError("nothing but padding")
    return padded


def blank(x: Tensor, padded: Tensor | None) -> Tensor:
    """``x`` (batch, sequence, features) with zeros where it is ``padded``."""
    return x if padded is None else x.masked_fill(padded.unsqueeze(-1), 0.0)


def attend(
    projected: tuple[Tensor, Tensor, Tensor],
    heads: int,
    batch_first: bool,
    fused: bool,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool | None = False,
    need_weights: bool = False,
    average_attn_weights: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention of the ``projected`` query, key and value, before the output projection.

    Args:
        projected: Each (batch, length, features), (length, batch, features) if not
            ``batch_first``, or (length, features).
        heads: Features are split into so many.
        batch_first: Where the batch is.
        fused: Whether PyTorch uses a fused kernel, if the input is a batch.
        key_padding_mask: As in ``nn.MultiheadAttention``, like the other arguments.
        attn_mask: ``is_causal`` is a hint that it is causal.
        is_causal: Read where PyTorch reads it.
        need_weights: Whether to return the weights too.
        average_attn_weights: Whether over the heads.

    Raises:
        ValueError: If shapes do not fit, for which PyTorch has its own errors.
    """
    batched = projected[0].dim() == 3
    if len({t.dim() for t in projected}) > 1 or projected[0].dim() not in (2, 3):
        raise ValueError("query, key and value of different ranks")
    q, k, v = (_heads(t, heads, batched, batch_first) for t in projected)
    if k.shape != v.shape or k.shape[0] != q.shape[0]:
        raise ValueError("key and value of different shapes")
    fused = fused and batched and torch.backends.mha.get_fastpath_enabled()
    if is_causal and attn_mask is None and not fused:
        raise ValueError("is_causal without attn_mask")
    if key_padding_mask is not None and not batched:
        key_padding_mask = key_padding_mask.unsqueeze(0)
    mask = _merged(attn_mask, key_padding_mask, q, k)
    weights = None
    if need_weights:
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        mixed = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        hint = bool(is_causal) and not fused and key_padding_mask is None
        mixed = _mixed(q, k, v, mask, fused, hint)
    mixed = mixed.transpose(1, 2).flatten(2)
    if not batched:
        return mixed.squeeze(0), weights
    return mixed if batch_first else mixed.transpose(0, 1), weights


def _mixed(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, fused: bool, is_causal: bool
) -> Tensor:
    if is_causal:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if mask is None or not fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    kept = mask == 0
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=kept)
    return mixed.masked_fill(~kept.any(-1, keepdim=True), math.nan)


def _heads(t: Tensor, heads: int, batched: bool, batch_first: bool) -> Tensor:
    """(batch, heads, length, features)."""
    if not batched:
        t = t.unsqueeze(0)
    elif not batch_first:
        t = t.transpose(0, 1)
    by_heads: Tensor = t.unflatten(-1, (heads, -1))
    return by_heads.transpose(1, 2)


def _merged(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
) -> Tensor | None:
    """What is added to the scores: (batch or 1, heads or 1, targets or 1, sources)."""
    (batch, heads, targets, _), sources = q.shape, k.shape[2]
    attn_mask, padding = additive(attn_mask, q), additive(key_padding_mask, q)
    if attn_mask is not None:
        if attn_mask.shape == (batch * heads, targets, sources):
            attn_mask = attn_mask.unflatten(0, (batch, heads))
        elif attn_mask.shape == (targets, sources):
            attn_mask = attn_mask[None, None]
        else:
            raise ValueError(f"attn_mask of shape {tuple(attn_mask.shape)}")
    if padding is not None:
        if padding.shape != (batch, sources):
            raise ValueError(f"key_padding_mask of shape {tuple(padding.shape)}")
        padding = padding[:, None, None]
    if attn_mask is None or padding is None:
        return padding if attn_mask is None else attn_mask
    return attn_mask + padding


for _leaf in ("additive", "one_tensor", "fuses", "padded_positions", "blank", "attend"):
    fx.wrap(_leaf)
