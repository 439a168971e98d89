"""Convolutions over sequences as those over images of one row, which all that follows knows."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from slimnets.acceleration.lower import LIMITS
from slimnets.acceleration.nodes import is_plain, is_unaltered, module_of

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""What a node calls, its arguments and its keyword arguments."""


def widen(traced: fx.GraphModule) -> bool:
    """Compute one-dimensional convolutions, and what lies between them, on images of one row.

    Results stay sequences where anything else reads them. The nodes need their shapes in ``meta``;
    new ones have none.

    Returns:
        Whether there was such a convolution.
    """
    images: dict[fx.Node, fx.Node] = {}  # of sequences
    twins: dict[str, nn.Module] = {}
    graph, convolutions = traced.graph, _convolutions(traced.graph)
    if not convolutions:
        return False

    def image_of(sequence: fx.Node) -> fx.Node:
        if sequence not in images:
            with graph.inserting_after(sequence):
                images[sequence] = graph.call_function(torch.unsqueeze, (sequence, 2))
        return images[sequence]

    for node in list(graph.nodes):
        sources, module = node.all_input_nodes, module_of(node)
        is_convolution = node.op == "call_module" and str(node.target) in convolutions
        if "shape" not in node.meta or any(len(s.meta.get("shape", ())) != 3 for s in sources):
            continue
        if not is_convolution and not any(source in images for source in sources):
            continue
        call = (node.target, node.args, {}) if is_convolution else _on_images(node)
        if call is None:
            continue
        target, args, kwargs = call
        op = node.op if isinstance(target, str) else "call_function"
        if is_convolution:  # it keeps its name, for the report
            twins[str(target)] = _convolution(module)
        elif type(module) in TWINS:  # it may be called elsewhere, too
            target = f"{target}_on_images"
            twins[target] = TWINS[type(module)](module)
        args = fx.map_arg(args, image_of)
        with graph.inserting_before(node):
            new = result = graph.create_node(op, target, args, kwargs)
            if is_convolution:
                new.meta["kind"] = type(module).__name__
            if len(node.meta["shape"]) == 3:
                result = graph.call_function(torch.squeeze, (new, 2))
                result.meta["shape"] = node.meta["shape"]
                images[result] = new
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    for name, twin in twins.items():
        traced.set_submodule(name, twin)
    for sequence in reversed(images):
        if sequence.target is torch.squeeze and not sequence.users:
            graph.erase_node(sequence)
    traced.recompile()
    return True


def _convolutions(graph: fx.Graph) -> set[str]:
    """The names of those that are called with sequences only."""
    ranks: dict[str, set[int]] = {}
    for node in graph.nodes:
        layer = module_of(node)
        if isinstance(layer, nn.Conv1d) and is_plain(layer) and layer.padding_mode == "zeros":
            called = [len(source.meta.get("shape", ())) for source in node.all_input_nodes]
            ranks.setdefault(str(node.target), set()).update(called if not node.kwargs else [0])
    return {name for name, found in ranks.items() if found == {3}}


def _row(value: Any, whole: int = 1) -> Any:
    """The size of a window, or else, over a row, for one over a sequence."""
    if isinstance(value, str):
        return value
    return whole, value if isinstance(value, int) else value[0]


def _convolution(m: Any) -> nn.Module:
    places = (_row(m.kernel_size), _row(m.stride), _row(m.padding, 0), _row(m.dilation))
    new = nn.Conv2d(m.in_channels, m.out_channels, *places, m.groups, m.bias is not None)
    new.weight = nn.Parameter(m.weight.detach().unsqueeze(2), requires_grad=False)
    new.bias = m.bias
    return new.eval()


def _norm(m: nn.BatchNorm1d) -> nn.Module:
    new = nn.BatchNorm2d(m.num_features, m.eps, m.momentum, m.affine, m.track_running_stats)
    new.load_state_dict(m.state_dict())
    return new.requires_grad_(False).eval()


def _largest(m: nn.MaxPool1d) -> nn.Module:
    window = (_row(m.kernel_size), _row(m.stride), _row(m.padding, 0), _row(m.dilation))
    return nn.MaxPool2d(*window, m.return_indices, m.ceil_mode)


def _mean(m: nn.AvgPool1d) -> nn.Module:
    window = (_row(m.kernel_size), _row(m.stride), _row(m.padding, 0))
    return nn.AvgPool2d(*window, m.ceil_mode, m.count_include_pad)


TWINS: dict[Any, Callable[[Any], nn.Module]] = {
    nn.BatchNorm1d: _norm,
    nn.MaxPool1d: _largest,
    nn.AvgPool1d: _mean,
    nn.AdaptiveAvgPool1d: lambda m: nn.AdaptiveAvgPool2d(_row(m.output_size)),
    nn.Dropout1d: lambda m: nn.Identity(),
}

SAME = (operator.add, operator.iadd, torch.add, "add", "add_", F.dropout, "contiguous")
"""Functions and methods that take images as they take sequences."""


def _on_images(node: fx.Node) -> Call | None:
    """What ``node`` has to call with images in the place of its sequences."""
    module, target, kwargs = module_of(node), node.target, dict(node.kwargs)
    same = target, node.args, kwargs
    if module is not None:
        if not is_unaltered(module) or kwargs:
            return None
        if isinstance(module, nn.Flatten):
            return same if (module.start_dim, module.end_dim) == (1, -1) else None
        if type(module) in (nn.ConstantPad1d, nn.ZeroPad1d) and not module.value:
            return F.pad, (*node.args, module.padding), {}
        return same if type(module) in LIMITS or type(module) in TWINS else None
    if target in LIMITS or target in SAME:
        return same
    if not node.args:
        return None
    source, *rest = node.args
    rest += kwargs.values()
    if target is F.pad:
        of_zeros = rest[1:] in ([], ["constant"], ["constant", None], ["constant", 0])
        return same if of_zeros and len(rest[0]) == 2 else None  # type: ignore[arg-type]
    if target in (torch.cat, torch.flatten, "flatten"):
        return same if rest == [1] else None
    if target in ("mean", torch.mean):
        return (target, (source, (2, 3)), {}) if rest in ([2], [-1]) else None
    return _cut_off(source, rest[0]) if target is operator.getitem else None


def _cut_off(source: Any, index: Any) -> Call | None:
    """What cuts a sequence off at its ends, as padding by less than nothing."""
    whole = slice(None)
    if isinstance(index, tuple) and index[:1] == (Ellipsis,):
        index = (*[whole] * (4 - len(index)), *index[1:])
    if not isinstance(index, tuple) or len(index) != 3 or index[:2] != (whole, whole):
        return None
    if not isinstance(index[2], slice) or index[2].step not in (None, 1):
        return None
    start, stop = index[2].start or 0, index[2].stop or 0
    if not isinstance(start, int) or not isinstance(stop, int) or start < 0 or stop > 0:
        return None
    return (F.pad, (source, (-start, stop)), {}) if index[2].stop != 0 else None
