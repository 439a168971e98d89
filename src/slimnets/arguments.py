"""What users give: numbers checked, and all of it as checkpoints hold it."""

from collections.abc import Callable, Mapping
from functools import partial
from numbers import Number, Real
from typing import Any


def check_number(
    argument: str,
    value: object,
    expected: str,
    is_right: Callable[[float], bool],
    hint: Callable[[float], str] = lambda number: "",
) -> None:
    """Raise unless ``value`` is a number that ``is_right``.

    Args:
        argument: What to call it in an error.
        value: What was given.
        expected: In words.
        is_right: Whether a number may be given; ``nan`` may not.
        hint: What may have been meant by a number that is not, to end the error with.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is another.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{argument}={value!r}: expected {expected}")
    if not is_right(float(value)):
        raise ValueError(f"{argument}={value!r}: expected {expected}{hint(float(value))}")


def spell(value: object) -> str:
    """``value`` in words that are the same in every process, without addresses."""
    if isinstance(value, partial):
        arguments = [spell(one) for one in value.args]
        arguments += [f"{name}={spell(one)}" for name, one in value.keywords.items()]
        return f"{spell(value.func)}({', '.join(arguments)})"
    if isinstance(value, str | Number | Mapping) or value is None:
        return repr(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of what a checkpoint notes otherwise than it is now; what it lacks is not known.

    Examples:
        >>> changed({"r": "8", "at": "1"}, {"r": "4", "at": "1", "energy": "None"})
        ['r']
    """
    return [name for name, value in now.items() if before.get(name, value) != value]


def plain(value: Any) -> Any:
    """``value`` with Python's numbers for NumPy's, which a checkpoint may not hold."""
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    return value.item() if isinstance(value, Number) and hasattr(value, "item") else value
