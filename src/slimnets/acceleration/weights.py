"""How the weight of a layer is walked over: its non-zeros alone, or all of it."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimnets.acceleration.codes import FEW
from slimnets.acceleration.host import WIDE

Floats = NDArray[np.float32]
Ints = NDArray[np.integer[Any]]
CACHE_LINE = 64

DENSE_FROM = 0.45
"""Share of non-zeros from which walking over all weights takes less time than over those."""


@dataclass
class NonZeros:
    """A sparse weight: for each non-zero its output row, input channel, and tap."""

    outputs: int
    inputs: int
    row: Ints
    channel: Ints
    ky: Ints
    kx: Ints
    values: Floats
    local: Ints  # input channel, counted within its group

    @property
    def places(self) -> tuple[Ints, Ints, Ints]:
        """Input channel, row and column of the kernel, of each non-zero."""
        return self.channel, self.ky, self.kx

    @property
    def products(self) -> int:
        """Multiplications for one pixel."""
        return len(self.values)

    @classmethod
    def of(cls, weight: Floats, groups: int = 1) -> "NonZeros":
        """The non-zeros of ``weight`` (outputs, inputs of a group, kernel rows, columns)."""
        row, channel, ky, kx = (i.astype(np.int32) for i in np.nonzero(weight))
        values = weight[row, channel, ky, kx]
        outputs, inputs = weight.shape[:2]
        local, channel = channel, channel + row // (outputs // groups) * inputs
        return cls(outputs, inputs * groups, row, channel, ky, kx, values, local)


def aligned(*shape: int) -> Floats:
    """Zeros that begin with a cache line."""
    size = math.prod(shape)
    memory = np.zeros(size + CACHE_LINE // 4, np.float32)
    begin = -memory.ctypes.data % CACHE_LINE // 4
    return memory[begin : begin + size].reshape(shape)


@dataclass
class Matrix:
    """A weight with few zeros, as (group of outputs, input channel and tap, output of the group).

    The last group begins earlier, if need be, so as to be as large as the others.
    """

    outputs: int
    inputs: int
    kernel: tuple[int, int]
    values: Floats

    @classmethod
    def of(cls, weight: Floats) -> "Matrix":
        """All of ``weight`` (outputs, inputs, kernel rows, columns)."""
        outputs, inputs, *kernel = weight.shape
        rows = weight.reshape(outputs, -1)
        few, many = (-(-outputs // size) for size in (FEW, 2 * FEW))
        # twice as many take less time for each, unless the last group repeats too much
        better = WIDE and outputs >= 2 * FEW and 1.4 * many <= few
        groups, size = (many, 2 * FEW) if better else (few, FEW)
        values = aligned(groups, rows.shape[1], size)  # no vector across two cache lines
        matrix = cls(outputs, inputs, (kernel[0], kernel[1]), values)
        for group, first in zip(matrix.values, matrix.firsts, strict=True):
            group[:] = rows[first : first + size].T
        return matrix

    def __setstate__(self, state: dict[str, Any]) -> None:
        values = aligned(*state["values"].shape)
        values[:] = state["values"]
        self.__dict__.update(state, values=values)

    @property
    def group_size(self) -> int:
        """Outputs of a group."""
        return int(self.values.shape[2])

    @property
    def firsts(self) -> Ints:
        """The first output of each group."""
        size = self.group_size
        return np.minimum(np.arange(0, self.outputs, size), self.outputs - size)

    @property
    def columns(self) -> int:
        """Input channels times taps."""
        return int(self.values.shape[1])

    @property
    def products(self) -> int:
        """Multiplications for one pixel."""
        return self.outputs * self.columns

    @property
    def places(self) -> tuple[Ints, Ints, Ints]:
        """Input channel, row and column of the kernel, of each column."""
        channel, ky, kx = np.unravel_index(np.arange(self.columns), (self.inputs, *self.kernel))
        return channel, ky, kx


Weight = NonZeros | Matrix


def is_full(weight: Floats, groups: int = 1) -> bool:
    """Whether all of ``weight`` (outputs, inputs of a group, ...) is walked over."""
    if groups > 1 or len(weight) < FEW or not weight.size:
        return False
    return bool(np.count_nonzero(weight) >= DENSE_FROM * weight.size)


def weight_of(weight: Floats, groups: int = 1) -> Weight:
    """How ``weight`` (outputs, inputs of a group, kernel rows, columns) is walked over."""
    return Matrix.of(weight) if is_full(weight, groups) else NonZeros.of(weight, groups)
