"""PyTorch's transformer layers, written so that they can be traced.

``nn.TransformerEncoderLayer`` hands its weights to one fused function, where no layer can be
exchanged; ``nn.MultiheadAttention`` does so with its projections. What stands in their place raises
where it does not know what to do, and ``Accelerated`` then asks PyTorch.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod, remove

from slimnets.acceleration import attend
from slimnets.acceleration.computed import with_values
from slimnets.acceleration.nodes import has_hooks
from slimnets.acceleration.trace import sharing_tensors
from slimnets.layers import replace


class Stand(nn.Module):
    """Stands in the place of ``original``, which still answers for everything else.

    It is the last child, so that shared layers are found under their old names.
    """

    original: nn.Module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)


class Attention(Stand):
    """``nn.MultiheadAttention``, its projections as linear layers."""

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.batch_first = original.num_heads, original.batch_first
        weight, bias = original.in_proj_weight, original.in_proj_bias
        self.fused = original.batch_first and self.heads % 2 == 0
        self.fused &= weight is not None and bias is not None
        self.in_proj = None if weight is None else _linear(weight, bias)
        parts = (original.q_proj_weight, original.k_proj_weight, original.v_proj_weight)
        weights = parts if weight is None else weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        projections = [_linear(w, b) for w, b in zip(weights, biases, strict=True)]
        self.q_proj, self.k_proj, self.v_proj = projections
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
        same = attend.one_tensor(query, key, value)
        fused = attend.fuses(self.fused, same, key_padding_mask, attn_mask)
        mixed = attend.attend(
            self.projected(query, key, value),
            self.heads,
            self.batch_first,
            fused,
            key_padding_mask,
            attn_mask,
            is_causal,
            need_weights,
            average_attn_weights,
        )
        return self.out_proj(mixed[0]), mixed[1]

    def projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value for all heads."""
        if query is key and key is value and self.in_proj is not None:
            q, k, v = self.in_proj(query).chunk(3, -1)
            return q, k, v
        return self.q_proj(query), self.k_proj(key), self.v_proj(value)


class EncoderLayer(Stand):
    """``nn.TransformerEncoderLayer``."""

    def __init__(self, original: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.self_attn: Any = original.self_attn
        self.linear1, self.linear2 = original.linear1, original.linear2
        self.norm1, self.norm2 = original.norm1, original.norm2
        self.norm_first, self.activation = original.norm_first, original.activation
        same_eps = original.norm1.eps == original.norm2.eps
        relu_or_gelu = bool(original.activation_relu_or_gelu)
        self.fused = bool(self.self_attn.fused and same_eps and relu_or_gelu)
        self.original = original

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = False,
    ) -> Tensor:
        """As ``nn.TransformerEncoderLayer``."""
        masks = attend.additive(src_key_padding_mask, src), attend.additive(src_mask, src)
        fused = self.fused or attend.fuses(self.self_attn.fused, True, *masks)
        options = fused, *masks, is_causal
        if self.norm_first:
            x = src + self._attend(self.norm1(src), *options)
            return x + self._feed(self.norm2(x))
        x = self.norm1(src + self._attend(src, *options))
        return self.norm2(x + self._feed(x))  # type: ignore[no-any-return]

    def _attend(self, x: Tensor, *options: Any) -> Tensor:
        attention = self.self_attn
        projected = attention.projected(x, x, x)
        mixed = attend.attend(projected, attention.heads, attention.batch_first, *options)
        return attention.out_proj(mixed[0])  # type: ignore[no-any-return]

    def _feed(self, x: Tensor) -> Tensor:
        return self.linear2(self.activation(self.linear1(x)))  # type: ignore[no-any-return]


class Encoder(Stand):
    """``nn.TransformerEncoder``."""

    def __init__(self, original: nn.TransformerEncoder) -> None:
        super().__init__()
        self.layers, self.norm = original.layers, original.norm
        self.nested = original.use_nested_tensor
        self.original = original

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As ``nn.TransformerEncoder``."""
        padding = attend.additive(src_key_padding_mask, src)
        padded = attend.padded_positions(src, padding, mask, self.nested)
        x = attend.blank(src, padded)
        for layer in self.layers:
            x = layer(x, mask, padding, is_causal)
        x = attend.blank(x, padded)
        return x if self.norm is None else self.norm(x)


class Decoder(Stand):
    """``nn.TransformerDecoder``, whose layers can be traced as they are."""

    def __init__(self, original: nn.TransformerDecoder) -> None:
        super().__init__()
        self.layers, self.norm = original.layers, original.norm
        self.original = original

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As ``nn.TransformerDecoder``."""
        masks = tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask
        for layer in self.layers:
            tgt = layer(tgt, memory, *masks, tgt_is_causal, memory_is_causal)
        return tgt if self.norm is None else self.norm(tgt)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _stand_in(module: nn.Module) -> nn.Module | None:
    """What stands for ``module``, in which smaller modules have been replaced."""
    if any(map(has_hooks, module.modules())):
        return None
    if type(module) is nn.MultiheadAttention and _is_simple(module):
        return Attention(module)
    if type(module) is nn.TransformerEncoderLayer and isinstance(module.self_attn, Attention):
        return EncoderLayer(module)
    if type(module) is nn.TransformerEncoder and module.mask_check:
        known = all(isinstance(layer, EncoderLayer) for layer in module.layers)
        return Encoder(module) if known else None
    if type(module) is nn.TransformerDecoder:
        known = all(type(layer) is nn.TransformerDecoderLayer for layer in module.layers)
        return Decoder(module) if known else None
    return None


def _is_simple(m: nn.MultiheadAttention) -> bool:
    return m.bias_k is None and m.bias_v is None and not m.add_zero_attn


def traceable(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that shares its tensors, with layers that can be traced.

    Masks of ``torch.nn.utils.prune`` are written into the weights. Layers that compute a weight
    have its value, a tensor of their own.
    """
    copied = sharing_tensors(model)
    for module in copied.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, BasePruningMethod):
                remove(module, hook._tensor_name)
    for name, module in reversed(list(copied.named_modules())):
        new = _stand_in(module)
        new = with_values(module) if new is None else new
        if new is not None:
            copied = replace(copied, name, new.eval())
    return copied
