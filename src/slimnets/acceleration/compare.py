"""Whether what was made of a network computes the same, on the example and elsewhere."""

import io
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, fx, nn

from slimnets.generators import generators_kept
from slimnets.inputs import tensors_in

TOLERANCE = 1e-4
"""Largest difference from PyTorch's result that is taken for rounding, as a share of its largest
value."""


def copied(value: Any) -> Any:
    """``value`` with copies of the tensors in it."""
    return apply_to_collection(value, Tensor, lambda one: one.detach().clone(), allow_frozen=True)


@contextmanager
def same_draws() -> Iterator[None]:
    """Draw the same random numbers each time, and none of those that are drawn outside."""
    with generators_kept():
        torch.default_generator.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        yield


def same_results(variant: Callable[..., Any], example: tuple[Any, ...], expected: Any) -> bool:
    """Whether ``variant`` computes what was ``expected`` of ``example``, up to rounding."""
    try:
        # torch.fx prints what went wrong before it raises
        with redirect_stderr(io.StringIO()), same_draws():
            return _close(variant(*copied(example)), expected)
    except Exception:
        return False


def agree_elsewhere(graph: fx.GraphModule, network: nn.Module, example: tuple[Any, ...]) -> bool:
    """Whether ``graph`` computes the same as ``network`` for inputs that are unlike ``example``."""
    return all(_agree(graph, network, other) for other in _others(example))


def _agree(graph: fx.GraphModule, network: nn.Module, inputs: tuple[Any, ...]) -> bool:
    try:
        with torch.compiler.set_stance("force_eager"), same_draws():
            expected = network(*copied(inputs))
        with redirect_stderr(io.StringIO()), same_draws():
            found = graph(*copied(inputs))
    except Exception:  # such inputs are not for this network, or the graph leaves them to it
        return True
    return _close(found, expected)


def _others(example: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Inputs with other values, also of another number and of another width."""
    batch = next((len(tensor) for tensor in tensors_in(example) if tensor.dim()), 0)

    def values(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bool:
            return ~tensor
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor // 2  # indices stay within their table
        steps = torch.linspace(-1, 1, tensor.numel(), device=tensor.device)
        return (steps.view(tensor.shape) - 1.5 * tensor).to(tensor.dtype)

    def samples(tensor: Tensor) -> Tensor:
        if not tensor.dim() or len(tensor) != batch:
            return tensor
        return tensor[:-1] if batch > 1 else torch.cat([tensor, tensor])

    def width(tensor: Tensor) -> Tensor:
        return tensor[..., : -(-3 * tensor.shape[-1] // 4)] if tensor.dim() > 2 else tensor

    for change in (Tensor.clone, samples, width):
        yield apply_to_collection(
            example, Tensor, lambda one, change=change: values(change(one)), allow_frozen=True
        )


def _close(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            return False
        if not expected.is_floating_point():
            return torch.equal(found, expected)
        finite = expected[expected.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 1.0
        share = max(TOLERANCE, 2 * torch.finfo(expected.dtype).eps)  # of halves
        return torch.allclose(found, expected, rtol=0, atol=share * scale, equal_nan=True)
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
