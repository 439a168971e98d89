"""What the engine can compute, as plain steps that know no shapes yet.

A region of a network is a list of steps over numbered values; a value is an image of some
channels (features are an image of one pixel).
"""

import math
from dataclasses import dataclass, field

import numpy as np

from slimnets.acceleration.weights import Floats, NonZeros, Weight, weight_of

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
