"""Which nodes of a traced network the engine can compute, and their steps."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from slimnets.acceleration.nodes import is_plain, is_unaltered, module_of
from slimnets.acceleration.steps import INFINITY, Add, Clamp, Concat, Conv, Linear, Pad, Pool, Step
from slimnets.acceleration.weights import NonZeros, weight_of

LEAST_ZEROS = 0.3
"""Of a layer in groups, below which the engine is not worth trying; without groups it always is."""

SMALL = 10_000

Form = str
"""How a value lies outside the engine: ``"image"`` (batch, channels, rows, columns) or
``"features"`` (..., features)."""

Make = Callable[[list[int], int], Step]
"""Makes the step of a node from the numbers of its source values and of its own."""

Lowered = tuple[list[fx.Node], Make, Form]
"""A node's sources, its step, and the form of its result."""


def lowered(node: fx.Node) -> Lowered | None:
    """How the engine computes ``node``, or ``None`` where it cannot.

    ``node.meta["form"]`` has to be there for sources that the engine computes as well.
    """
    if node.meta.get("dtype") != torch.float32 or not node.args:
        return None
    try:
        module = module_of(node)
        if module is not None:
            return _of_module(node, module)
        return _of_call(node)
    except (TypeError, ValueError, IndexError):  # arguments of a kind not thought of
        return None


def form_of(node: fx.Node) -> Form | None:
    """The form of a value, known or guessed from its rank."""
    if "form" in node.meta:
        return str(node.meta["form"])
    return {2: "features", 4: "image"}.get(len(node.meta.get("shape", ())))


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)


def _of_module(node: fx.Node, m: nn.Module) -> Lowered | None:
    (source,) = node.args
    if not isinstance(source, fx.Node) or not is_unaltered(m) or node.kwargs:
        return None
    form = form_of(source)
    if is_plain(m):
        return _of_layer(m, source, form)
    kind = type(m)
    if kind in LIMITS:
        return _clamped(source, *LIMITS[kind])
    if kind in (nn.BatchNorm2d, nn.BatchNorm1d) and m.running_var is not None:
        rank = 4 if kind is nn.BatchNorm2d else 2
        flat = rank == 4 or _is_a_vector(source)
        known_rank = len(source.meta["shape"]) == rank and form is not None and flat
        return ([source], _norm(m), form) if known_rank else None  # type: ignore[return-value]
    if kind is nn.Flatten:
        return _flatten(source) if [m.start_dim, m.end_dim] == [1, -1] else None
    return _of_pooling(m, source) if form == "image" else None


_RELU = (nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")

LIMITS: dict[Any, tuple[float, float]] = {
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout2d), (-INFINITY, INFINITY)),
    **dict.fromkeys(_RELU, (0.0, INFINITY)),
    **dict.fromkeys((nn.ReLU6, F.relu6), (0.0, 6.0)),
}
"""What cuts single values to a range, in eval mode, and the range."""


def _of_layer(m: nn.Module, source: fx.Node, form: Form | None) -> Lowered | None:
    if m.weight.dtype != torch.float32 or not _worth_trying(m):
        return None
    if isinstance(m, nn.Linear):
        return ([source], _linear(m), "features") if _is_flat(source) else None
    rank = len(source.meta["shape"])
    if not isinstance(m, nn.Conv2d) or form != "image" or rank != 4 or m.padding_mode != "zeros":
        return None
    return [source], _conv(m), "image"


def _worth_trying(m: Any) -> bool:
    """Whether the engine may win, or costs next to nothing (depthwise, for example)."""
    size = int(m.weight.numel())
    if size <= SMALL or getattr(m, "groups", 1) == 1:
        return size > 0
    return bool(size - int(torch.count_nonzero(m.weight)) >= LEAST_ZEROS * size)


def _is_flat(source: fx.Node) -> bool:
    """Whether the last dimension of ``source`` is what the engine takes for its features."""
    return "form" not in source.meta or source.meta["form"] == "features"


def _is_a_vector(source: fx.Node) -> bool:
    """Whether the engine has the features of ``source`` as channels, not as pixels too."""
    return "form" not in source.meta or bool(source.meta.get("vector"))


def _of_pooling(m: nn.Module, source: fx.Node) -> Lowered | None:
    if getattr(m, "return_indices", False):
        return None
    if type(m) is nn.MaxPool2d:
        window = (m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode)
        return [source], _pool(True, *window), "image"
    plain = type(m) is nn.AvgPool2d and not m.ceil_mode and m.divisor_override is None
    if plain and (m.count_include_pad or _pair(m.padding) == (0, 0)):
        return [source], _pool(False, m.kernel_size, m.stride, m.padding), "image"
    if type(m) in TO_ONE_PIXEL and _pair(m.output_size) == (1, 1):
        return [source], _pool(TO_ONE_PIXEL[type(m)]), "image"
    return None


TO_ONE_PIXEL: dict[Any, bool] = {
    nn.AdaptiveMaxPool2d: True,
    nn.AdaptiveAvgPool2d: False,
    F.adaptive_max_pool2d: True,
    F.adaptive_avg_pool2d: False,
}
"""Pooling of a whole image, if the size asked for is one pixel, and whether it is the largest."""


def _of_call(node: fx.Node) -> Lowered | None:
    target, kwargs = node.target, node.kwargs
    source, *rest = node.args
    if target in (operator.add, operator.iadd, torch.add, "add", "add_"):
        return _sum(node)
    if target is torch.cat:
        return _concat(node)
    if not isinstance(source, fx.Node):
        return None
    if target in (torch.flatten, "flatten"):
        return _flatten(source) if [*rest, *kwargs.values()] in ([1], [1, -1]) else None
    if target in ("mean", torch.mean):
        return _mean(source, rest, dict(kwargs))
    if target in LIMITS and not rest and set(kwargs) <= {"inplace"}:
        return _clamped(source, *LIMITS[target])
    if target == "contiguous" and not rest and not kwargs:
        return _clamped(source)  # as every value of the engine is
    if target in (F.dropout, F.dropout2d) and kwargs.get("training") is False:
        return _clamped(source)
    if form_of(source) != "image":
        return None
    if target is F.pad:
        return _padded(source, *rest, **kwargs)  # type: ignore[arg-type]
    if target is F.max_pool2d:
        return [source], _pool(True, *rest, **kwargs), "image"  # type: ignore[arg-type]
    if target in TO_ONE_PIXEL:
        (size,) = rest
        one = _pair(size) == (1, 1) and not any(kwargs.values())  # return_indices=False
        return ([source], _pool(TO_ONE_PIXEL[target]), "image") if one else None
    return None


def _sum(node: fx.Node) -> Lowered | None:
    if node.kwargs or len(node.args) != 2:
        return None
    sources = [a for a in node.args if isinstance(a, fx.Node)]
    if len(sources) != 2 or sources[0].meta.get("shape") != sources[1].meta.get("shape"):
        return None
    if any(s.meta.get("dtype") != torch.float32 for s in sources):
        return None
    forms = {str(s.meta["form"]) for s in sources if "form" in s.meta}
    forms = forms or {f for f in map(form_of, sources) if f}
    if len(forms) != 1 or any("form" in s.meta and not _agrees(s, sources) for s in sources):
        return None
    return sources, Add, forms.pop()


def _agrees(source: fx.Node, sources: Sequence[fx.Node]) -> bool:
    """Flattened pixels inside the engine cannot be added to features from outside."""
    if source.meta["form"] == "image" or source.meta.get("vector"):
        return True
    return all(s.meta.get("vector", True) is False for s in sources)


def _concat(node: fx.Node) -> Lowered | None:
    sources, dim = node.args[0], [*node.args[1:], *node.kwargs.values()]
    if not isinstance(sources, list | tuple) or dim != [1]:
        return None
    if any(not isinstance(s, fx.Node) or form_of(s) != "image" for s in sources):
        return None
    return list(sources), Concat, "image"


def _clamped(source: fx.Node, low: float = -INFINITY, high: float = INFINITY) -> Lowered | None:
    if form := form_of(source):
        return [source], lambda sources, target: Clamp(sources, target, low, high), form
    return None


def _padded(
    source: fx.Node, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Lowered | None:
    if mode != "constant" or value:
        return None
    left, right, top, bottom = (*pad, 0, 0)[:4]
    padding = (top, bottom, left, right)
    return [source], lambda sources, target: Pad(sources, target, padding=padding), "image"


def _flatten(source: fx.Node) -> Lowered | None:
    if len(source.meta["shape"]) not in (2, 4) or not form_of(source):
        return None
    return [source], Clamp, "features"


def _mean(source: fx.Node, dims: list[Any], kwargs: dict[str, Any]) -> Lowered | None:
    keepdim = kwargs.pop("keepdim", False)
    (dim,) = (*dims, *kwargs.values())
    if form_of(source) != "image" or sorted(d % 4 for d in dim) != [2, 3]:
        return None
    return [source], _pool(False), "image" if keepdim else "features"


def _floats(tensor: Any) -> Any:
    return tensor.detach().contiguous().numpy()


def _bias(m: Any) -> Any:
    return _floats(m.bias if m.bias is not None else m.weight.new_zeros(len(m.weight)))


def _linear(m: nn.Linear) -> Make:
    return lambda sources, target: Linear(sources, target, weight=_floats(m.weight), bias=_bias(m))


def _conv(m: nn.Conv2d) -> Make:
    kernel, dilation = _pair(m.kernel_size), _pair(m.dilation)
    if m.padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        top, left = (t // 2 for t in total)
        padding = (top, total[0] - top, left, total[1] - left)
    else:
        h, w = (0, 0) if m.padding == "valid" else _pair(m.padding)
        padding = (h, h, w, w)
    shape = {"kernel": kernel, "stride": _pair(m.stride), "dilation": dilation}

    def make(sources: list[int], target: int) -> Step:
        weight = weight_of(_floats(m.weight), m.groups)
        return Conv(sources, target, weight=weight, bias=_bias(m), padding=padding, **shape)  # type: ignore[arg-type]

    return make


def _norm(m: Any) -> Make:
    def make(sources: list[int], target: int) -> Step:
        scale: Tensor = (m.running_var + m.eps).rsqrt()
        scale = scale if m.weight is None else scale * m.weight
        bias = -m.running_mean * scale
        bias = bias if m.bias is None else bias + m.bias
        channels = len(scale)
        weight = NonZeros.of(_floats(scale.reshape(-1, 1, 1, 1)), channels)
        return Conv(sources, target, weight=weight, bias=_floats(bias))

    return make


def _pool(
    maximum: bool,
    kernel_size: Any = None,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Make:
    """A pool with PyTorch's arguments; without a ``kernel_size``, of the whole image."""
    if return_indices:
        raise ValueError
    window = None if kernel_size is None else _pair(kernel_size)
    step = _pair(stride) if stride is not None and stride != [] else window or (1, 1)
    places = (window, step, _pair(padding), _pair(dilation), ceil_mode)
    return lambda sources, target: Pool(sources, target, -INFINITY, INFINITY, maximum, *places)
