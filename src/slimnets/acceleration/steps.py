"""What the sparse engine can compute, as plain steps that know no shapes yet.

A region of a network is a list of steps over numbered values; a value is an image of some
channels (features are an image of one pixel).
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.integer[Any]]
INFINITY = math.inf


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

    @classmethod
    def of(cls, weight: Floats, groups: int = 1) -> "NonZeros":
        """The non-zeros of ``weight`` (outputs, inputs of a group, kernel rows, columns)."""
        row, channel, ky, kx = (i.astype(np.int32) for i in np.nonzero(weight))
        values = weight[row, channel, ky, kx]
        outputs, inputs = weight.shape[:2]
        local, channel = channel, channel + row // (outputs // groups) * inputs
        return cls(outputs, inputs * groups, row, channel, ky, kx, values, local)


@dataclass
class Conv(Step):
    """A convolution with zero padding, a bias, maybe a residual (second source), and a clamp."""

    weight: NonZeros = field(kw_only=True)
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
class Linear(Step):
    """A linear layer over all channels and pixels of its source (in torch's order)."""

    weight: Floats = field(kw_only=True)
    bias: Floats = field(kw_only=True)
    nonzeros: dict[Shape, NonZeros] = field(default_factory=dict, repr=False)

    def shape(self, *inputs: Shape) -> Shape:
        """The shape of the target."""
        if inputs[0].size != self.weight.shape[1]:
            raise ValueError("features do not fit the layer")
        return _with_residual(Shape(len(self.weight), 1, 1), inputs)

    def sparse(self, image: Shape) -> NonZeros:
        """The weight as a convolution whose kernel covers the whole ``image``."""
        if image not in self.nonzeros:
            shaped = self.weight.reshape(-1, image.channels, image.height, image.width)
            self.nonzeros[image] = NonZeros.of(shaped)
        return self.nonzeros[image]


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
