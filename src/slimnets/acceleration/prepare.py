"""What comes before the choice: a copy for inference, its graph, and that graph made smaller."""

import copy
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

from slimnets.acceleration.fold import fold_batch_norm
from slimnets.acceleration.nodes import Recorder
from slimnets.acceleration.shrink import shrink
from slimnets.acceleration.trace import trace
from slimnets.generators import generators_kept
from slimnets.inputs import arguments_for, tensors_in
from slimnets.layers import compressed_network, refuse_lazy

TOLERANCE = 1e-4
"""Largest difference from PyTorch's result that is taken for rounding, as a share of its largest
value."""


def positional(model: nn.Module, example_input: Any) -> tuple[Any, ...]:
    """The arguments of ``forward`` that ``example_input`` is; copies, for it may work in place.

    Raises:
        TypeError: If ``model`` is not a network, or ``example_input`` is a dictionary with names
            that ``forward`` does not have, or does not take by position.
        ValueError: If a lazy layer of it has no weights yet.
    """
    network = compressed_network(model)
    refuse_lazy(network, "model")
    args, by_name = arguments_for(network, example_input)
    if by_name:
        raise TypeError(
            f"example_input: {', '.join(map(repr, by_name))} can only be given by name, and what "
            "is traced takes its arguments by position; a dictionary that is one of them stands in "
            "a tuple, (dictionary,)"
        )
    return copied(args)  # type: ignore[no-any-return]


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


def copy_for_inference(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters need no gradient."""
    memo: dict[int, Any] = {id(getattr(model, "_trainer", None)): None}  # a copy has no Trainer
    for module in model.modules():
        for value in vars(module).values():
            # weights that hooks compute cannot be copied with their history
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    network = copy.deepcopy(model, memo).eval()
    for parameter in network.parameters():
        if parameter.is_leaf:  # those of a copied ScriptModule are not, nor has it requires_grad_
            parameter.requires_grad_(False)
    return network


def graph_of(network: nn.Module, example: tuple[Any, ...], expected: Any) -> fx.GraphModule | None:
    """``network`` traced; None where that fails, or the graph does not compute ``expected``.

    Nor may it compute anything else than ``network`` for inputs that are unlike the example: it
    could have taken a turn that is right for the example only.
    """
    graph = trace(network, len(example))
    if graph is None or not same_results(graph, example, expected):
        return None
    return graph if all(_agree(graph, network, other) for other in _others(example)) else None


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
        # torch.fx prints what went wrong before it raises
        with redirect_stderr(io.StringIO()), same_draws():
            return _close(variant(*copied(example)), expected)
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
