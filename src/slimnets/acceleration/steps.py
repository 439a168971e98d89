"""What the engine can compute, as plain steps that know no shapes yet.

A region of a network is a list of steps over numbered values; a value is an image of some
channels (features are an image of one pixel).
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimnets.acceleration.codes import FEW
from slimnets.acceleration.host import WIDE

Floats = NDArray[np.float32]
Ints = NDArray[np.integer[Any]]
INFINITY = math.inf
CACHE_LINE = 64

DENSE_FROM = 0.45
"""Share of non-zeros from which walking over all weights takes less time than over those."""


@dataclass(frozen=True)
class Shape:
    """An image: channels, rows, columns."""

    channels: int
    height: int
    width: int

    @property
    def size(self) -> int:
        """Floats of one sample."""
        return self.channels * self.height * self.width


@dataclass
class Step:
    """Reads the values ``sources``, writes the value ``target``."""

    sources: list[int]
    target: int
    low: float = -INFINITY
    high: float = INFINITY
    name: str = field(default="", kw_only=True)

    def shape(self, *inputs: Shape) -> Shape:
        """The shape of the target; raises ValueError where the step cannot be done."""
        raise NotImplementedError


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


@dataclass
class Conv(Step):
    """A convolution with zero padding, a bias, maybe a residual (second source), and a clamp."""

    weight: Weight = field(kw_only=True)
    bias: Floats = field(kw_only=True)
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, bottom, left, right

    def shape(self, *inputs: Shape) -> Shape:
        """The shape of the target."""
        top, bottom, left, right = self.padding
        image = inputs[0]
        if image.channels != self.weight.inputs:
            raise ValueError("channels do not fit the layer")
        sizes = []
        for i, (n, pad) in enumerate(((image.height, top + bottom), (image.width, left + right))):
            reach = self.dilation[i] * (self.kernel[i] - 1) + 1
            if n + pad < reach:
                raise ValueError("kernel larger than the padded input")
            sizes.append((n + pad - reach) // self.stride[i] + 1)
        return _with_residual(Shape(self.weight.outputs, *sizes), inputs)


@dataclass
class Pad(Step):
    """Zeros around the image, or, where it is less than 0, an image cut off."""

    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, bottom, left, right

    def shape(self, *inputs: Shape) -> Shape:
        """The shape of the target."""
        image, (top, bottom, left, right) = inputs[0], self.padding
        height, width = image.height + top + bottom, image.width + left + right
        if min(height, width) < 1:
            raise ValueError("nothing is left of the image")
        return Shape(image.channels, height, width)

    def as_conv(self, channels: int) -> Conv:
        """The convolution that does this to an image of so many channels."""
        ones = NonZeros.of(np.ones((channels, 1, 1, 1), np.float32), channels)
        bias, padding = np.zeros(channels, np.float32), self.padding
        places = (self.sources, self.target, self.low, self.high)
        return Conv(*places, weight=ones, bias=bias, padding=padding)


@dataclass
class Linear(Step):
    """A linear layer over all channels and pixels of its source (in torch's order)."""

    weight: Floats = field(kw_only=True)
    bias: Floats = field(kw_only=True)
    kernels: dict[Shape, Weight] = field(default_factory=dict, repr=False)

    def shape(self, *inputs: Shape) -> Shape:
        """The shape of the target."""
        if inputs[0].size != self.weight.shape[1]:
            raise ValueError("features do not fit the layer")
        return _with_residual(Shape(len(self.weight), 1, 1), inputs)

    def as_conv(self, image: Shape) -> Conv:
        """The convolution whose kernel covers the whole ``image``."""
        if image not in self.kernels:
            shaped = self.weight.reshape(-1, image.channels, image.height, image.width)
            self.kernels[image] = weight_of(shaped)
        weight, kernel = self.kernels[image], (image.height, image.width)
        places = (self.sources, self.target, self.low, self.high)
        return Conv(*places, name=self.name, weight=weight, bias=self.bias, kernel=kernel)


@dataclass
class Pool(Step):
    """Maximum or mean of a window; ``None`` as kernel is the whole image."""

    maximum: bool = True
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil: bool = False

    def window(self, image: Shape) -> tuple[int, int]:
        """The window on ``image``, (rows, columns)."""
        return self.kernel or (image.height, image.width)

    def shape(self, *inputs: Shape) -> Shape:
        """The shape of the target."""
        image, sizes = inputs[0], []
        if self.kernel is None:
            return Shape(image.channels, 1, 1)
        for i, n in enumerate((image.height, image.width)):
            room = n + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1
            if room < 0:
                raise ValueError("window larger than the padded input")
            size = (-(-room // self.stride[i]) if self.ceil else room // self.stride[i]) + 1
            if self.ceil and (size - 1) * self.stride[i] >= n + self.padding[i]:
                size -= 1
            sizes.append(size)
        return Shape(image.channels, *sizes)


@dataclass
class Add(Step):
    """Sum of two values of one shape."""

    def shape(self, *inputs: Shape) -> Shape:
        """The shape of the target."""
        if inputs[0] != inputs[1]:
            raise ValueError("a sum that broadcasts")
        return inputs[0]


@dataclass
class Clamp(Step):
    """Values cut to ``low..high``; the identity without limits."""

    def shape(self, *inputs: Shape) -> Shape:
        """The shape of the target."""
        return inputs[0]


@dataclass
class Concat(Step):
    """Channels of all sources one after the other."""

    def shape(self, *inputs: Shape) -> Shape:
        """The shape of the target."""
        if len({(s.height, s.width) for s in inputs}) > 1:
            raise ValueError("images of several sizes")
        return Shape(sum(s.channels for s in inputs), inputs[0].height, inputs[0].width)


def _with_residual(shape: Shape, inputs: tuple[Shape, ...]) -> Shape:
    if len(inputs) > 1 and inputs[1] != shape:
        raise ValueError("a sum that broadcasts")
    return shape
