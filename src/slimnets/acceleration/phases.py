"""The input of a strided convolution, gathered so that the convolution has stride one."""

from typing import Any

import numpy as np

from slimnets.acceleration.layout import Layout
from slimnets.acceleration.steps import Conv, Shape
from slimnets.acceleration.weights import Weight


class Phases:
    """The input of a strided convolution, cut so that the convolution has stride one."""

    def __init__(self, step: Conv, image: Shape, target: Layout, samples: int) -> None:
        self.step = step
        top, bottom, left, right = step.padding
        height = -(-(image.height + top + bottom) // step.stride[0])
        width = -(-(image.width + left + right) // step.stride[1])
        taps = [(y, x) for y in range(step.kernel[0]) for x in range(step.kernel[1])]
        self.used = sorted({self._phase(y, x) for y, x in taps})
        shape = Shape(image.channels * len(self.used), height, width)
        # with the pitch of the output, tiles can run on over the ends of rows
        self.layout = Layout(shape, samples, gap=max(target.pitch - width, 0))

    def _phase(self, ky: int, kx: int) -> tuple[int, int]:
        (dy, dx), (sy, sx) = self.step.dilation, self.step.stride
        return ky * dy % sy, kx * dx % sx

    def offsets(self, weight: Weight) -> Any:
        """Where each weight reads, relative to the input of the first output."""
        channel, ky, kx = weight.places
        y, x = ky * self.step.dilation[0], kx * self.step.dilation[1]
        sh, sw = self.step.stride
        number = np.zeros((sh, sw), np.int64)
        for i, phase in enumerate(self.used):
            number[phase] = i
        plane = channel * np.int64(len(self.used)) + number[y % sh, x % sw]
        layout = self.layout
        return plane * layout.plane + (y // sh * layout.pitch + x // sw) * layout.samples
