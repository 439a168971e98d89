"""The memory that a table works in: values that come and go, and arrays that stay."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slimnets.acceleration.layout import Layout
from slimnets.acceleration.steps import Conv, Pad, Shape, Step
from slimnets.acceleration.weights import CACHE_LINE, aligned

SLACK = 4096
"""Floats before and after the arena, for tiles that read past the end of a value."""


class Arena:
    """Places for values, in floats; one whose value nobody reads any more is given away again.

    Args:
        steps: What is to be computed.
        shapes: The shape of each value.
        samples: How many are computed at once.
    """

    def __init__(self, steps: Sequence[Step], shapes: Mapping[int, Shape], samples: int) -> None:
        self.places: dict[int, int] = {}
        self._shapes, self._samples = shapes, samples
        self._margins = _margins(steps, shapes)
        self._free: dict[Layout, list[int]] = {}
        self._end = SLACK

    @property
    def floats(self) -> int:
        """How large it has become.

        Raises:
            ValueError: If a place in it does not fit 32 bits.
        """
        floats = self._end + SLACK
        if floats > 2**31 - 1:
            raise ValueError("offsets that do not fit 32 bits")
        return floats

    def layout(self, value: int) -> Layout:
        """How ``value`` lies in its place."""
        shape = self._shapes[value]
        top, left = self._margins.get((shape.height, shape.width), (0, 0))
        return Layout(shape, self._samples, top, left)

    def put(self, value: int) -> int:
        """Give ``value`` a place; one that held the same layout has its zero margins already."""
        free = self._free.get(self.layout(value))
        self.places[value] = free.pop() if free else self.reserve(self.layout(value))
        return self.places[value]

    def reserve(self, layout: Layout) -> int:
        """A new place, all zeros."""
        place = self._end
        self._end += -(-layout.floats // 16) * 16
        return place

    def release(self, value: int) -> None:
        """Let the place of ``value`` be given away again."""
        self._free.setdefault(self.layout(value), []).append(self.places.pop(value))


def _margins(
    steps: Sequence[Step], shapes: Mapping[int, Shape]
) -> dict[tuple[int, int], tuple[int, int]]:
    """Zeros around all images of one size, so that values can be added as they lie."""
    margins: dict[tuple[int, int], tuple[int, int]] = {}
    for step in steps:
        if isinstance(step, Pad) or (isinstance(step, Conv) and step.stride == (1, 1)):
            shape = shapes[step.sources[0]]
            top, left = margins.get((shape.height, shape.width), (0, 0))
            p = step.padding
            margins[shape.height, shape.width] = max(top, *p[:2]), max(left, *p[2:])
    return margins


class Arrays:
    """Arrays in one piece of memory, which huge pages can back."""

    def __init__(self) -> None:
        self._arrays: list[tuple[int, Any]] = []
        self._size = CACHE_LINE  # no array begins at 0, which is none

    def add(self, values: Any, kind: Any) -> int:
        """Where the values will stand, in bytes."""
        array = np.ascontiguousarray(values, kind).view(np.uint8).ravel()
        at = self._size
        self._arrays.append((at, array))
        self._size += -(-array.nbytes // CACHE_LINE) * CACHE_LINE
        return at

    def joined(self) -> Any:
        """All of them, as bytes."""
        data = aligned(self._size // 4).view(np.uint8)
        for at, array in self._arrays:
            data[at : at + array.nbytes] = array
        return data
