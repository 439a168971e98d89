"""What a network is called with: a tensor, several, or whatever holds them."""

from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


def arguments_in(example_input: Any) -> tuple[Any, ...]:
    """The arguments of ``forward`` that ``example_input`` is: those in a tuple, or itself.

    A tuple of a type of its own, such as a PackedSequence, is one argument.
    """
    is_plain = isinstance(example_input, tuple) and not hasattr(example_input, "_fields")
    return example_input if is_plain else (example_input,)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in ``value``, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    apply_to_collection(value, Tensor, note, allow_frozen=True)
    return found
