"""What comes before the choice: a copy for inference, its graph, and that graph made smaller."""

import copy
import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimnets.acceleration.fold import fold_batch_norm
from slimnets.acceleration.shrink import shrink
from slimnets.acceleration.trace import Recorder, trace

TOLERANCE = 1e-4
"""Largest difference from PyTorch's result that is taken for rounding, as a share of its largest
value."""


def positional(model: nn.Module, example_input: Any) -> tuple[Any, ...]:
    """The arguments of ``forward`` that ``example_input`` is; copies, for it may work in place.

    Raises:
        TypeError: If ``model`` is not a network, or ``example_input`` is a dictionary.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: expected an nn.Module")
    if isinstance(example_input, Mapping):
        raise TypeError(
            "example_input: got a dictionary, expected a tensor or a tuple of the arguments of "
            "forward; a dictionary that is one of them stands in a tuple, (dictionary,)"
        )
    return _copied(example_input if isinstance(example_input, tuple) else (example_input,))  # type: ignore[no-any-return]


def _copied(value: Any) -> Any:
    """``value`` with copies of the tensors in it."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(map(_copied, value))
    return {key: _copied(one) for key, one in value.items()} if type(value) is dict else value


def copy_for_inference(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters need no gradient."""
    trainer = getattr(model, "_trainer", None)
    # not the Trainer of a LightningModule
    memo: dict[int, Any] = {} if trainer is None else {id(trainer): None}
    for module in model.modules():  # weights that hooks compute cannot be copied with their history
        memo.update({id(t): t.detach().clone() for t in vars(module).values() if _has_history(t)})
    return copy.deepcopy(model, memo).eval().requires_grad_(False)


def _has_history(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_leaf


def graph_of(network: nn.Module, example: tuple[Any, ...], expected: Any) -> fx.GraphModule | None:
    """``network`` traced; None where that fails, or the graph does not compute ``expected``."""
    graph = trace(network, len(example))
    return graph if graph is not None and same_results(graph, example, expected) else None


def simplify(
    graph: fx.GraphModule, example: tuple[Any, ...]
) -> tuple[dict[str, tuple[Any, ...]], dict[str, int]]:
    """Fold batch norm and remove dead channels, in place.

    Returns:
        The arguments of each module that is called as a whole, and how many channels each layer
        has lost.
    """
    recorder = Recorder(graph)
    recorder.run(*example)
    fold_batch_norm(graph)
    Recorder(graph).run(*example)
    return recorder.opaque, shrink(graph)


def same_results(variant: Callable[..., Any], example: tuple[Any, ...], expected: Any) -> bool:
    """Whether ``variant`` computes what was ``expected`` of ``example``, up to rounding."""
    try:
        with redirect_stderr(io.StringIO()):  # torch.fx prints what went wrong before it raises
            return _close(variant(*example), expected)
    except Exception:
        return False


def _close(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            return False
        if not expected.is_floating_point():
            return torch.equal(found, expected)
        finite = expected[expected.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 1.0
        return torch.allclose(found, expected, rtol=0, atol=TOLERANCE * scale, equal_nan=True)
    if type(found) is not type(expected):  # as a graph makes a dict of its subclasses
        return False
    if isinstance(expected, dict):
        same = found.keys() == expected.keys()
        return same and all(_close(found[k], v) for k, v in expected.items())
    if isinstance(expected, tuple | list):
        same = len(found) == len(expected)
        return same and all(_close(f, e) for f, e in zip(found, expected, strict=True))
    if is_dataclass(expected):
        return _close(vars(found), vars(expected))
    return bool(found == expected)
