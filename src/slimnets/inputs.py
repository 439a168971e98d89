"""What a network is called with: a tensor, several, or whatever holds them."""

import inspect
from collections.abc import Mapping
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn


def arguments_for(network: nn.Module, example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``forward`` of ``network`` is called with, as far as possible by position.

    Args:
        network: Whose names the keys of a dictionary are.
        example_input: A dictionary of keyword arguments, a tuple of positional ones, or one alone;
            a tuple of a type of its own, such as a PackedSequence, is one.

    Returns:
        The positional arguments, with the defaults of those between them, and the others by name.

    Raises:
        TypeError: If a dictionary lacks an argument, or ``forward`` has none of a key's name; if it
            is a list and ``forward`` takes several arguments.

    Examples:
        >>> arguments_for(nn.Bilinear(1, 1, 1), {"input2": 2, "input1": 1})
        ((1, 2), {})
    """
    if not isinstance(example_input, Mapping):
        if isinstance(example_input, list) and not _fits(network, example_input):
            raise TypeError(
                "example_input: got a list, which is one argument, and forward takes several; give "
                "a tuple of them"
            )
        is_plain = isinstance(example_input, tuple) and not hasattr(example_input, "_fields")
        return (example_input if is_plain else (example_input,)), {}
    try:
        signature = inspect.signature(network.forward)
    except ValueError:  # what torch.jit.trace has made has none
        return (), dict(example_input)
    try:
        bound = signature.bind(**example_input)
    except TypeError as error:
        raise TypeError(f"example_input: {error} of forward{signature}") from None
    between: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if name in bound.arguments:
            bound.arguments.update(between)
        elif parameter.default is not parameter.empty:
            between[name] = parameter.default
    return bound.args, bound.kwargs


def _fits(network: nn.Module, argument: Any) -> bool:
    """Whether ``forward`` can be called with ``argument`` alone, as far as its signature tells."""
    try:
        inspect.signature(network.forward).bind(argument)
    except TypeError:
        return False
    except ValueError:  # as above
        pass
    return True


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in ``value``, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    apply_to_collection(value, Tensor, note, allow_frozen=True)
    return found
