"""From steps and the shape of the input to the table that the engine runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimnets.acceleration import codes
from slimnets.acceleration.layout import (
    Layout,
    Tiling,
    block,
    block_size,
    dense_blocks,
    dense_tiling,
    tiling,
)
from slimnets.acceleration.phases import Phases
from slimnets.acceleration.steps import (
    CACHE_LINE,
    Add,
    Clamp,
    Concat,
    Conv,
    Linear,
    Matrix,
    NonZeros,
    Pad,
    Pool,
    Shape,
    Step,
    aligned,
)

SLACK = 4096
"""Floats before and after the arena, for tiles that read past the end of a value."""

DENSE_GAIN = 3
"""Products of the dense kernel in the time of one of the sparse kernel."""


@dataclass
class Table:
    """Steps for one shape and number of samples, and how much memory they run in."""

    ops: Any
    floats: Any
    arena: int
    scratch: int
    outputs: list[Shape]
    work: int  # in products of the sparse kernel
    owners: list[str]  # of each op: the name of its step, "" at the borders
    data: Any = field(repr=False)  # kept, as addresses among the ops point to it
    dense_bytes: int  # of weights that are walked over whole


def build(
    steps: Sequence[Step],
    inputs: Sequence[tuple[int, Shape]],
    outputs: Sequence[int],
    samples: int,
    threads: int = 1,
) -> Table:
    """The table for images of these shapes, to be run by one thread or by ``threads``.

    Raises:
        ValueError: If a step cannot be done on its shapes.
    """
    return _Builder(steps, inputs, outputs, samples, threads).table()


class _Builder:
    def __init__(
        self,
        steps: Sequence[Step],
        inputs: Sequence[tuple[int, Shape]],
        outputs: Sequence[int],
        samples: int,
        threads: int,
    ) -> None:
        self.steps, self.inputs, self.outputs = steps, inputs, outputs
        self.samples, self.threads = samples, threads
        self.shapes = dict(inputs)
        for step in steps:
            self.shapes[step.target] = step.shape(*(self.shapes[s] for s in step.sources))
        self.margins = self._margins()
        self.last_use = {s: i for i, step in enumerate(steps) for s in step.sources}
        self.last_use.update(dict.fromkeys(outputs, len(steps)))
        self.ops: list[dict[int, int]] = []
        self.floats: list[tuple[float, float, float]] = []
        self.owners: list[str] = []
        self.data: list[Any] = []
        self.matrices: dict[int, Matrix] = {}  # by the numbers of their ops
        self.size = CACHE_LINE  # bytes of the data; no address in it is 0, which is none
        self.places: dict[int, int] = {}
        self.free: dict[Layout, list[int]] = {}
        self.end, self.scratch, self.work = SLACK, 16, 0

    def table(self) -> Table:
        for number, (value, _) in enumerate(self.inputs):
            self._border(codes.IMPORT, number, value)
        for i, step in enumerate(self.steps):
            self._step(step)
            for source in set(step.sources) | {step.target}:
                if self.last_use.get(source, -1) <= i:
                    self._release(source)
        for number, value in enumerate(self.outputs):
            self._border(codes.EXPORT, len(self.inputs) + number, value)
        ops = np.zeros((len(self.ops), codes.FIELDS), np.int64)
        for i, op in enumerate(self.ops):
            ops[i, list(op)] = list(op.values())
        data = self._together(ops)
        floats = np.array(self.floats, np.float32).reshape(-1, 3)
        shapes, end = [self.shapes[v] for v in self.outputs], self.end + SLACK
        if end > 2**31 - 1:
            raise ValueError("offsets that do not fit 32 bits")
        dense_bytes = sum(matrix.values.nbytes for matrix in self.matrices.values())
        return Table(
            ops,
            floats,
            arena=end,
            scratch=self.scratch,
            outputs=shapes,
            work=self.work,
            owners=self.owners,
            data=data,
            dense_bytes=dense_bytes,
        )

    def _margins(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Zeros around all images of one size, so that values can be added as they lie."""
        margins: dict[tuple[int, int], tuple[int, int]] = {}
        for step in self.steps:
            if isinstance(step, Pad) or (isinstance(step, Conv) and step.stride == (1, 1)):
                shape = self.shapes[step.sources[0]]
                top, left = margins.get((shape.height, shape.width), (0, 0))
                p = step.padding
                margins[shape.height, shape.width] = max(top, *p[:2]), max(left, *p[2:])
        return margins

    def _layout(self, value: int) -> Layout:
        shape = self.shapes[value]
        top, left = self.margins.get((shape.height, shape.width), (0, 0))
        return Layout(shape, self.samples, top, left)

    def _allocate(self, layout: Layout) -> int:
        """A place in the arena; one that held the same layout has its zero margins already."""
        if self.free.get(layout):
            return self.free[layout].pop()
        place, self.end = self.end, self.end + -(-layout.floats // 16) * 16
        return place

    def _release(self, value: int) -> None:
        self.free.setdefault(self._layout(value), []).append(self.places.pop(value))

    def _target(self, value: int) -> int:
        self.places[value] = self._allocate(self._layout(value))
        return self.places[value]

    def _emit(
        self,
        op: dict[int, int],
        step: Step | None = None,
        scale: float = 1.0,
        matrix: Matrix | None = None,
    ) -> None:
        if matrix:
            self.matrices[len(self.ops)] = matrix
        self.ops.append(op)
        self.owners.append(step.name if step else "")
        limits = (step.low, step.high) if step else (-np.inf, np.inf)
        self.floats.append((scale, *limits))

    def _array(self, values: Any, kind: Any) -> int:
        """Where the values will stand in the data, in bytes."""
        array = np.ascontiguousarray(values, kind).view(np.uint8).ravel()
        at = self.size
        self.data.append((at, array))
        self.size += -(-array.nbytes // CACHE_LINE) * CACHE_LINE
        return at

    def _together(self, ops: Any) -> Any:
        """All arrays in one, which huge pages can back, and matrices, which tables share.

        ``ops`` get their addresses.
        """
        data = aligned(self.size // 4).view(np.uint8)
        for at, array in self.data:
            data[at : at + array.nbytes] = array
        for column in codes.ADDRESSES:
            ops[ops[:, column] > 0, column] += data.ctypes.data
        for i, matrix in self.matrices.items():
            ops[i, codes.VALUES] = matrix.values.ctypes.data
        return data, self.matrices

    def _border(self, code: int, number: int, value: int) -> None:
        at = self._target(value) if code == codes.IMPORT else self.places[value]
        op = {codes.CODE: code, codes.NUMBER: number, codes.PLACE: at}
        self._emit(op | _image(self._layout(value)))

    def _step(self, step: Step) -> None:
        match step:
            case Conv():
                self._conv(step)
            case Linear():
                self._linear(step)
            case Pad():
                self._pad(step)
            case Pool():
                self._pool(step)
            case Add():
                self._add(step)
            case Clamp():
                self._clamp(step)
            case Concat():
                self._concat(step)

    def _linear(self, step: Linear) -> None:
        image = self.shapes[step.sources[0]]
        conv = Conv(
            step.sources,
            step.target,
            step.low,
            step.high,
            name=step.name,
            weight=step.kernel(image),
            bias=step.bias,
            kernel=(image.height, image.width),
        )
        self._conv(conv)

    def _pad(self, step: Pad) -> None:
        channels = self.shapes[step.target].channels
        ones = NonZeros.of(np.ones((channels, 1, 1, 1), np.float32), channels)
        limits = (step.low, step.high)
        bias = np.zeros(channels, np.float32)
        places = (step.sources, step.target)
        self._conv(Conv(*places, *limits, weight=ones, bias=bias, padding=step.padding))

    def _conv(self, step: Conv) -> None:
        source, at = self._layout(step.sources[0]), self.places[step.sources[0]]
        residual = self.places[step.sources[1]] if len(step.sources) > 1 else -1
        target = self._target(step.target)
        image, weight = self._layout(step.target), step.weight
        if step.stride == (1, 1):
            offsets, pitch = self._taps(step, source), source.pitch
        else:
            phases = Phases(step, source.shape, image, self.samples)
            offsets, pitch = phases.offsets(weight), phases.layout.pitch
            at = self._split(source, at, phases)
        work = weight.products * image.shape.height * image.shape.width * self.samples
        if isinstance(weight, Matrix):
            code, self.work = codes.DENSE, self.work + work // DENSE_GAIN
            tiles = dense_tiling(image, pitch, weight.together)
            walk = self._dense(step, weight, tiles, offsets)
        else:
            code, self.work = codes.CONV, self.work + work
            tiles = tiling(image, pitch)
            walk = self._sparse(step, weight, tiles, offsets)
        op = {
            codes.CODE: code,
            codes.SOURCE: at,
            codes.TARGET: target,
            codes.OUT_PLANE: image.plane,
            codes.X_STEP: tiles.x_step,
            codes.Y_STEP: tiles.y_step,
            codes.STARTS: self._array(tiles.starts, np.int32),
            codes.TILES: len(tiles.starts),
            codes.TILE: tiles.kind,
            codes.BIAS: self._array(step.bias, np.float32),
            codes.MASK: self._array(image.mask(), np.int32) if tiles.masked else 0,
            codes.RESIDUAL: residual,
        }
        self._emit(op | walk, step, matrix=weight if isinstance(weight, Matrix) else None)

    def _sparse(self, step: Conv, weight: NonZeros, tiles: Tiling, offsets: Any) -> dict[int, int]:
        """How a sparse convolution walks over its weight."""
        channels = block_size(step, weight, tiles, self.samples)
        blocked = block(weight, channels, self.threads)
        self.scratch = max(self.scratch, weight.outputs * tiles.rows * tiles.width)
        return {
            codes.VALUES: self._array(weight.values[blocked.order], np.float32),
            codes.OFFSETS: self._array(offsets[blocked.order], np.int32),
            codes.POINTERS: self._array(blocked.pointers, np.int32),
            codes.ROWS: self._array(blocked.rows, np.int32),
            codes.BLOCKS: blocked.blocks,
            codes.OUTPUTS: weight.outputs,
        }

    def _dense(self, step: Conv, weight: Matrix, tiles: Tiling, offsets: Any) -> dict[int, int]:
        """How a dense convolution walks over its weight."""
        starts, at_once = dense_blocks(step, weight, tiles, self.samples)
        if len(starts) > 2:  # sums wait for the next block
            sums = len(tiles.starts) * at_once * weight.together * tiles.rows * tiles.width
            self.scratch = max(self.scratch, sums)
        return {
            codes.OFFSETS: self._array(offsets, np.int32),
            codes.POINTERS: self._array(starts, np.int32),
            codes.FIRSTS: self._array(weight.firsts, np.int32),
            codes.BLOCKS: len(starts) - 1,
            codes.GROUPS: len(weight.values),
            codes.AT_ONCE: at_once,
        }

    def _taps(self, step: Conv, source: Layout) -> Any:
        """Where each weight reads, relative to the input of the first output."""
        channel, ky, kx = step.weight.places
        y = ky * step.dilation[0] + source.top - step.padding[0]
        x = kx * step.dilation[1] + source.left - step.padding[2]
        return channel * np.int64(source.plane) + (y * source.pitch + x) * self.samples

    def _split(self, source: Layout, at: int, phases: Phases) -> int:
        """Gather the rows and columns that a strided convolution reads, phase by phase."""
        layout = phases.layout
        place = self._allocate(layout)
        for number, (y, x) in enumerate(phases.used):
            op = {
                codes.CODE: codes.PHASE,
                codes.SOURCE: at,
                codes.TARGET: place + number * layout.plane,
                codes.OUT_HEIGHT: layout.shape.height,
                codes.OUT_WIDTH: layout.shape.width,
                codes.OUT_ROW: layout.row,
                codes.OUT_PLANE: len(phases.used) * layout.plane,
                codes.STRIDE_Y: phases.stride[0],
                codes.STRIDE_X: phases.stride[1],
                codes.FIRST_Y: y - phases.padding[0],
                codes.FIRST_X: x - phases.padding[2],
            }
            self._emit(op | _image(source), phases.step)
        return place

    def _pool(self, step: Pool) -> None:
        source, image = self._layout(step.sources[0]), self._layout(step.target)
        s, o = source.shape, image.shape
        kernel = step.window(s)
        places = (kernel, step.stride, step.padding, step.dilation)
        whole = o.height * 2 <= s.height and o.width * 2 <= s.width
        halving = step.maximum and whole and places == ((2, 2), (2, 2), (0, 0), (1, 1))
        op = {
            codes.CODE: codes.POOL,
            codes.SOURCE: self.places[step.sources[0]],
            codes.TARGET: self._target(step.target),
            codes.OUT_HEIGHT: o.height,
            codes.OUT_WIDTH: o.width,
            codes.OUT_ROW: image.row,
            codes.OUT_BASE: image.base,
            codes.OUT_PLANE: image.plane,
            codes.KERNEL_Y: kernel[0],
            codes.KERNEL_X: kernel[1],
            codes.STRIDE_Y: step.stride[0],
            codes.STRIDE_X: step.stride[1],
            codes.PADDING_Y: step.padding[0],
            codes.PADDING_X: step.padding[1],
            codes.DILATION_Y: step.dilation[0],
            codes.DILATION_X: step.dilation[1],
            codes.POOLING: codes.HALVE if halving else codes.LARGEST if step.maximum else codes.SUM,
        }
        scale = 1.0 if step.maximum else 1.0 / (kernel[0] * kernel[1])
        self._emit(op | _image(source), step, scale)

    def _add(self, step: Add) -> None:
        a, b = (self.places[s] for s in step.sources)
        op = {codes.CODE: codes.ADD, codes.SOURCE: a, codes.OTHER: b}
        self._emit(op | self._whole(step.target), step)

    def _clamp(self, step: Clamp) -> None:
        op = {codes.CODE: codes.COPY, codes.SOURCE: self.places[step.sources[0]]}
        self._emit(op | self._whole(step.target), step)

    def _whole(self, value: int) -> dict[int, int]:
        return {codes.TARGET: self._target(value), codes.FLOATS: self._layout(value).floats}

    def _concat(self, step: Concat) -> None:
        to = self._target(step.target)
        for source in step.sources:
            floats = self._layout(source).floats
            place = {codes.SOURCE: self.places[source], codes.TARGET: to, codes.FLOATS: floats}
            self._emit({codes.CODE: codes.COPY} | place, step)
            to += floats


def _image(layout: Layout) -> dict[int, int]:
    return {
        codes.CHANNELS: layout.shape.channels,
        codes.SAMPLES: layout.samples,
        codes.HEIGHT: layout.shape.height,
        codes.WIDTH: layout.shape.width,
        codes.ROW: layout.row,
        codes.BASE: layout.base,
        codes.PLANE: layout.plane,
    }
