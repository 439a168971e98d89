"""The pair of layers that stands for a dense one, made from it and turned back."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from slimnets.lowrank.decompose import Decomposition, factors

Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d
"""The layers that a pair can stand for, and that it is made of."""


class LowRankPair(nn.Sequential):
    """Two thin layers in the place of a dense one, with nothing between them.

    It is an ordinary :class:`torch.nn.Sequential` of two ordinary layers, and has the attributes
    of the layer it stands for (``in_features``, ``kernel_size``, ``stride``, ...), for code that
    reads them. ``weight`` is the product of the two, computed whenever it is read.

    Args:
        first: Inputs to ``rank`` channels, without bias.
        second: ``rank`` channels to outputs.

    Examples:
        >>> pair = LowRankPair(nn.Linear(8, 2, bias=False), nn.Linear(2, 4))
        >>> pair.rank, pair.in_features, pair.out_features, tuple(pair.weight.shape)
        (2, 8, 4, (4, 8))
    """

    if TYPE_CHECKING:  # TorchScript understands neither the union nor the properties
        first: Layer
        second: Layer
    __jit_unused_properties__ = [  # noqa: RUF012
        "rank",
        "weight",
        "bias",
        "in_features",
        "out_features",
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "dilation",
        "padding",
        "padding_mode",
        "groups",
    ]

    def __init__(self, first: Layer, second: Layer) -> None:
        super().__init__(OrderedDict(first=first, second=second))

    def __getitem__(self, index: Any) -> Any:
        """One of the two layers; of a slice, a plain ``Sequential``."""
        return nn.Sequential(OrderedDict(self.named_children()))[index]

    @property
    def rank(self) -> int:
        """How many channels there are between the two layers."""
        return self.first.weight.shape[0]

    @property
    def weight(self) -> Tensor:
        """The weight of the dense layer, ``(outputs, inputs, *kernel)``; differentiable."""
        return torch.einsum("nk...,kc...->nc...", self.second.weight, self.first.weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias, ``(outputs,)``."""
        return self.second.bias

    @property
    def in_features(self) -> int:
        """Inputs of a linear pair."""
        return cast(nn.Linear, self.first).in_features

    @property
    def out_features(self) -> int:
        """Outputs of a linear pair."""
        return cast(nn.Linear, self.second).out_features

    @property
    def in_channels(self) -> int:
        """Input channels of a convolutional pair."""
        return cast(nn.Conv2d, self.first).in_channels

    @property
    def out_channels(self) -> int:
        """Output channels of a convolutional pair."""
        return cast(nn.Conv2d, self.second).out_channels

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Kernel size of the dense convolution."""
        return self._per_axis("kernel_size")

    @property
    def stride(self) -> tuple[int, ...]:
        """Stride of the dense convolution."""
        return self._per_axis("stride")

    @property
    def dilation(self) -> tuple[int, ...]:
        """Dilation of the dense convolution."""
        return self._per_axis("dilation")

    @property
    def padding(self) -> str | tuple[int, ...]:
        """Padding of the dense convolution."""
        padding = cast(nn.Conv2d, self.first).padding
        return padding if isinstance(padding, str) else self._per_axis("padding")

    @property
    def padding_mode(self) -> str:
        """Padding mode of the dense convolution."""
        return cast(nn.Conv2d, self.first).padding_mode

    @property
    def groups(self) -> int:
        """Always 1: grouped convolutions are not factorized."""
        return cast(nn.Conv2d, self.first).groups

    def _per_axis(self, attribute: str) -> tuple[int, ...]:
        # each axis belongs to one of the two layers; the other one has 1 there, or 0 of padding
        first, second = (getattr(layer, attribute) for layer in self)
        return tuple(max(pair) for pair in zip(first, second, strict=True))


def make_pair(layer: Layer, rank: int, decomposition: Decomposition = "spatial") -> LowRankPair:
    """The pair of ``rank`` that comes closest to ``layer``.

    See :func:`slimnets.lowrank.decompose.factors`.
    """
    first, second = factors(layer.weight, rank, decomposition)
    pair = empty_pair(layer, rank, second.shape[2:])
    _fill(pair.first, first, None)
    _fill(pair.second, second, layer.bias)
    return pair


def make_dense(pair: LowRankPair) -> Layer:
    """The dense layer that computes what ``pair`` does; half precision is multiplied in float32."""
    first, second = pair.first.weight.detach(), pair.second.weight.detach()
    wide = torch.promote_types(first.dtype, torch.float32)
    dense = empty_dense(pair)
    weight = torch.einsum("nk...,kc...->nc...", second.to(wide), first.to(wide))
    _fill(dense, weight, pair.bias)
    return dense


def empty_pair(layer: Layer, rank: int, second_kernel: Sequence[int]) -> LowRankPair:
    """A pair for ``layer``, its weights uninitialised; stride and padding are split by axis."""
    weight, bias = layer.weight, layer.bias
    if isinstance(layer, nn.Linear):
        first = _empty(nn.Linear, layer.in_features, rank, weight, None)
        second = _empty(nn.Linear, rank, layer.out_features, weight, bias)
    else:
        kind = cast(type[Layer], kind_of(layer))
        of_second = [size != 1 for size in second_kernel]
        of_first = [not own for own in of_second]
        first = _empty(kind, layer.in_channels, rank, weight, None, **_on_axes(layer, of_first))
        second = _empty(kind, rank, layer.out_channels, weight, bias, **_on_axes(layer, of_second))
    return cast(LowRankPair, _in_place_of(layer, LowRankPair(first, second)))


def empty_dense(pair: LowRankPair) -> Layer:
    """The dense layer that ``pair`` stands for, its weight uninitialised."""
    weight, bias = pair.first.weight, pair.bias
    if isinstance(pair.first, nn.Linear):
        dense = _empty(nn.Linear, pair.in_features, pair.out_features, weight, bias)
    else:
        kind = cast(type[Layer], kind_of(pair.first))
        every = _on_axes(pair, [True] * len(pair.kernel_size))
        dense = _empty(kind, pair.in_channels, pair.out_channels, weight, bias, **every)
    return cast(Layer, _in_place_of(pair, dense))


def _on_axes(conv: nn.Conv1d | nn.Conv2d | LowRankPair, axes: Sequence[bool]) -> dict[str, Any]:
    """The geometry of ``conv`` on those of its axes, that of a 1 x 1 convolution on the others."""

    def pick(values: Sequence[int], neutral: int) -> tuple[int, ...]:
        return tuple(v if own else neutral for v, own in zip(values, axes, strict=True))

    return {
        "kernel_size": pick(conv.kernel_size, 1),
        "stride": pick(conv.stride, 1),
        "dilation": pick(conv.dilation, 1),
        "padding": conv.padding if isinstance(conv.padding, str) else pick(conv.padding, 0),
        # other modes than zeros copy their input even where there is nothing to pad
        "padding_mode": conv.padding_mode if any(axes) else "zeros",
    }


def _empty(
    kind: type[Layer],
    inputs: int,
    outputs: int,
    like: Tensor,
    bias: Tensor | None,
    **geometry: Any,
) -> Layer:
    # drawing initial weights would be slow, and move the global random state
    new: Layer = skip_init(
        kind,
        inputs,
        outputs,
        bias=bias is not None,
        dtype=like.dtype,
        device=like.device,
        **geometry,
    )
    if not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last):
        new.to(memory_format=torch.channels_last)  # or every pass would convert the weight
    new.weight.requires_grad_(like.requires_grad)
    if new.bias is not None and bias is not None:
        new.bias.requires_grad_(bias.requires_grad)
    return new


def _fill(layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)


def _in_place_of(old: nn.Module, new: nn.Module) -> nn.Module:
    """``new`` with the training flag and the forward and backward hooks of ``old``."""
    new.train(old.training)
    for name, value in vars(old).items():
        if name.startswith(("_forward_", "_backward_")) or name == "_is_full_backward_hook":
            vars(new)[name] = value  # the same dict, so that the handles go on working
    return new


def kind_of(layer: nn.Module) -> type[Layer] | None:
    """Which of the three types of layer ``layer`` is, if any."""
    kinds: tuple[type[Layer], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return next((kind for kind in kinds if isinstance(layer, kind)), None)
