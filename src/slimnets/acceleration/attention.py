"""PyTorch's transformer layers, written so that they can be traced.

``nn.TransformerEncoderLayer`` hands its weights to one fused function, where no layer can be
exchanged; ``nn.MultiheadAttention`` does so with its projections.
"""

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.prune import BasePruningMethod, remove

from slimnets.layers import replace


class _Stand(nn.Module):
    """Stands in the place of ``original``, which still answers for everything else.

    It is the last child, so that shared layers are found under their old names.
    """

    original: nn.Module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)


class Swapped(_Stand):
    """A layer with a faster module that computes it."""

    def __init__(self, original: nn.Module, fast: nn.Module) -> None:
        super().__init__()
        self.fast = fast
        self.original = original

    def forward(self, x: Tensor) -> Tensor:
        """What the layer computes of ``x``."""
        return self.fast(x)  # type: ignore[no-any-return]


class SelfAttention(_Stand):
    """Self-attention without masks, its projections as linear layers."""

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.batch_first = original.num_heads, original.batch_first
        self.in_proj = _linear(original.in_proj_weight, original.in_proj_bias)
        self.out_proj = _linear(original.out_proj.weight, original.out_proj.bias)
        self.original = original

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``."""
        masked = key_padding_mask is not None or attn_mask is not None or is_causal
        if masked or need_weights or query is not key or key is not value:
            found = self.original(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
            return found  # type: ignore[no-any-return]
        return self.attend(query), None

    def attend(self, x: Tensor) -> Tensor:
        """Attention of ``x`` (batch, sequence, features), or (sequence, batch, features)."""
        x = x if self.batch_first else x.transpose(0, 1)
        q, k, v = self.in_proj(x).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)
        y: Tensor = self.out_proj(mixed)
        return y if self.batch_first else y.transpose(0, 1)


class EncoderLayer(_Stand):
    """A transformer encoder layer without masks."""

    def __init__(self, original: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.self_attn = SelfAttention(original.self_attn)
        self.linear1, self.linear2 = original.linear1, original.linear2
        self.norm1, self.norm2 = original.norm1, original.norm2
        self.norm_first, self.activation = original.norm_first, original.activation
        self.original = original

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As ``nn.TransformerEncoderLayer``."""
        if src_mask is not None or src_key_padding_mask is not None or is_causal:
            masked = self.original(src, src_mask, src_key_padding_mask, is_causal)
            return masked  # type: ignore[no-any-return]
        if self.norm_first:
            x = src + self.self_attn.attend(self.norm1(src))
            return x + self._feed(self.norm2(x))
        x = self.norm1(src + self.self_attn.attend(src))
        return self.norm2(x + self._feed(x))  # type: ignore[no-any-return]

    def _feed(self, x: Tensor) -> Tensor:
        return self.linear2(self.activation(self.linear1(x)))  # type: ignore[no-any-return]


class Encoder(_Stand):
    """A stack of encoder layers without masks."""

    def __init__(self, original: nn.TransformerEncoder) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_stand_in(layer) or layer for layer in original.layers)
        self.norm = original.norm
        self.original = original

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As ``nn.TransformerEncoder``."""
        if mask is not None or src_key_padding_mask is not None or is_causal:
            masked = self.original(src, mask, src_key_padding_mask, is_causal)
            return masked  # type: ignore[no-any-return]
        for layer in self.layers:
            src = layer(src)
        return src if self.norm is None else self.norm(src)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _stand_in(module: nn.Module) -> nn.Module | None:
    inner = list(module.modules())
    if any(m._forward_hooks or m._forward_pre_hooks for m in inner):
        return None
    if type(module) is nn.TransformerEncoder:
        return Encoder(module)
    if type(module) is nn.TransformerEncoderLayer and _is_simple(module.self_attn):
        return EncoderLayer(module)
    if type(module) is nn.MultiheadAttention and _is_simple(module):
        return SelfAttention(module)
    return None


def _is_simple(m: nn.MultiheadAttention) -> bool:
    whole = m._qkv_same_embed_dim and m.in_proj_weight is not None
    return bool(whole and m.bias_k is None and m.bias_v is None and not m.add_zero_attn)


def traceable(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that shares its tensors, with layers that can be traced.

    Masks of ``torch.nn.utils.prune`` are written into the weights.
    """
    tensors = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, {id(t): t for t in tensors})
    for module in copied.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, BasePruningMethod):
                remove(module, hook._tensor_name)
    done: set[str] = set()
    for name, module in list(copied.named_modules()):
        if any(name == d or name.startswith(f"{d}.") for d in done if d):
            continue
        new = _stand_in(module)
        if new is not None:
            copied = replace(copied, name, new.eval())
            done.add(name)
    return copied
