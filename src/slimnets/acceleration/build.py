"""From steps and the shape of the input to the table that the engine runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimnets.acceleration import codes
from slimnets.acceleration.arena import Arena, Arrays
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
from slimnets.acceleration.steps import Add, Clamp, Concat, Conv, Linear, Pad, Pool, Shape, Step
from slimnets.acceleration.weights import Matrix, NonZeros

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
        self.arena, self.arrays = Arena(steps, self.shapes, samples), Arrays()
        self.ops: list[dict[int, int]] = []
        self.floats: list[tuple[float, float, float]] = []
        self.owners: list[str] = []
        self.matrices: dict[int, Matrix] = {}  # by the numbers of their ops
        self.scratch, self.work = 16, 0

    def table(self) -> Table:
        last_use = {s: i for i, step in enumerate(self.steps) for s in step.sources}
        last_use.update(dict.fromkeys(self.outputs, len(self.steps)))
        for number, (value, _) in enumerate(self.inputs):
            self._border(codes.IMPORT, number, value)
        for i, step in enumerate(self.steps):
            self._step(step)
            for value in set(step.sources) | {step.target}:
                if last_use.get(value, -1) <= i:
                    self.arena.release(value)
        for number, value in enumerate(self.outputs):
            self._border(codes.EXPORT, len(self.inputs) + number, value)
        ops = np.zeros((len(self.ops), codes.FIELDS), np.int64)
        for i, op in enumerate(self.ops):
            ops[i, list(op)] = list(op.values())
        data = self.arrays.joined()
        for column in codes.ADDRESSES:
            ops[ops[:, column] > 0, column] += data.ctypes.data
        for i, matrix in self.matrices.items():  # which tables share
            ops[i, codes.VALUES] = matrix.values.ctypes.data
        return Table(
            ops,
            floats=np.array(self.floats, np.float32).reshape(-1, 3),
            arena=self.arena.floats,
            scratch=self.scratch,
            outputs=[self.shapes[value] for value in self.outputs],
            work=self.work,
            owners=self.owners,
            data=(data, self.matrices),
            dense_bytes=sum(matrix.values.nbytes for matrix in self.matrices.values()),
        )

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

    def _border(self, code: int, number: int, value: int) -> None:
        at = self.arena.put(value) if code == codes.IMPORT else self.arena.places[value]
        op = {codes.CODE: code, codes.NUMBER: number, codes.PLACE: at}
        self._emit(op | _image(self.arena.layout(value)))

    def _step(self, step: Step) -> None:
        match step:
            case Conv():
                self._conv(step)
            case Linear():
                self._conv(step.as_conv(self.shapes[step.sources[0]]))
            case Pad():
                self._conv(step.as_conv(self.shapes[step.target].channels))
            case Pool():
                self._pool(step)
            case Add():
                self._add(step)
            case Clamp():
                self._clamp(step)
            case Concat():
                self._concat(step)

    def _conv(self, step: Conv) -> None:
        source, at = self.arena.layout(step.sources[0]), self.arena.places[step.sources[0]]
        residual = self.arena.places[step.sources[1]] if len(step.sources) > 1 else -1
        target = self.arena.put(step.target)
        image, weight = self.arena.layout(step.target), step.weight
        if step.stride == (1, 1):
            offsets, pitch = self._taps(step, source), source.pitch
        else:
            phases = Phases(step, source.shape, image, self.samples)
            offsets, pitch = phases.offsets(weight), phases.layout.pitch
            at = self._split(source, at, phases)
        work = weight.products * image.shape.height * image.shape.width * self.samples
        if isinstance(weight, Matrix):
            code, self.work = codes.DENSE, self.work + work // DENSE_GAIN
            tiles = dense_tiling(image, pitch, weight.group_size)
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
            codes.STARTS: self.arrays.add(tiles.starts, np.int32),
            codes.TILES: len(tiles.starts),
            codes.TILE: tiles.kind,
            codes.BIAS: self.arrays.add(step.bias, np.float32),
            codes.MASK: self.arrays.add(image.mask(), np.int32) if tiles.masked else 0,
            codes.RESIDUAL: residual,
        }
        self._emit(op | walk, step, matrix=weight if isinstance(weight, Matrix) else None)

    def _sparse(self, step: Conv, weight: NonZeros, tiles: Tiling, offsets: Any) -> dict[int, int]:
        """How a sparse convolution walks over its weight."""
        channels = block_size(step, weight, tiles, self.samples)
        blocked = block(weight, channels, self.threads)
        self.scratch = max(self.scratch, weight.outputs * tiles.rows * tiles.width)
        return {
            codes.VALUES: self.arrays.add(weight.values[blocked.order], np.float32),
            codes.OFFSETS: self.arrays.add(offsets[blocked.order], np.int32),
            codes.POINTERS: self.arrays.add(blocked.pointers, np.int32),
            codes.ROWS: self.arrays.add(blocked.rows, np.int32),
            codes.BLOCKS: blocked.blocks,
            codes.OUTPUTS: weight.outputs,
        }

    def _dense(self, step: Conv, weight: Matrix, tiles: Tiling, offsets: Any) -> dict[int, int]:
        """How a dense convolution walks over its weight."""
        starts, at_once = dense_blocks(step, weight, tiles, self.samples)
        if len(starts) > 2:  # sums wait for the next block
            sums = len(tiles.starts) * at_once * weight.group_size * tiles.rows * tiles.width
            self.scratch = max(self.scratch, sums)
        return {
            codes.OFFSETS: self.arrays.add(offsets, np.int32),
            codes.POINTERS: self.arrays.add(starts, np.int32),
            codes.FIRSTS: self.arrays.add(weight.firsts, np.int32),
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
        step, layout = phases.step, phases.layout
        place = self.arena.reserve(layout)
        for number, (y, x) in enumerate(phases.used):
            op = {
                codes.CODE: codes.PHASE,
                codes.SOURCE: at,
                codes.TARGET: place + number * layout.plane,
                codes.OUT_HEIGHT: layout.shape.height,
                codes.OUT_WIDTH: layout.shape.width,
                codes.OUT_ROW: layout.row,
                codes.OUT_PLANE: len(phases.used) * layout.plane,
                codes.STRIDE_Y: step.stride[0],
                codes.STRIDE_X: step.stride[1],
                codes.FIRST_Y: y - step.padding[0],
                codes.FIRST_X: x - step.padding[2],
            }
            self._emit(op | _image(source), step)
        return place

    def _pool(self, step: Pool) -> None:
        source, image = self.arena.layout(step.sources[0]), self.arena.layout(step.target)
        s, o = source.shape, image.shape
        kernel = step.window(s)
        places = (kernel, step.stride, step.padding, step.dilation)
        whole = o.height * 2 <= s.height and o.width * 2 <= s.width
        halving = step.maximum and whole and places == ((2, 2), (2, 2), (0, 0), (1, 1))
        op = {
            codes.CODE: codes.POOL,
            codes.SOURCE: self.arena.places[step.sources[0]],
            codes.TARGET: self.arena.put(step.target),
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
        a, b = (self.arena.places[s] for s in step.sources)
        op = {codes.CODE: codes.ADD, codes.SOURCE: a, codes.OTHER: b}
        self._emit(op | self._whole(step.target), step)

    def _clamp(self, step: Clamp) -> None:
        op = {codes.CODE: codes.COPY, codes.SOURCE: self.arena.places[step.sources[0]]}
        self._emit(op | self._whole(step.target), step)

    def _whole(self, value: int) -> dict[int, int]:
        return {codes.TARGET: self.arena.put(value), codes.FLOATS: self.arena.layout(value).floats}

    def _concat(self, step: Concat) -> None:
        to = self.arena.put(step.target)
        for source in step.sources:
            floats = self.arena.layout(source).floats
            op = {codes.CODE: codes.COPY, codes.SOURCE: self.arena.places[source]}
            self._emit(op | {codes.TARGET: to, codes.FLOATS: floats}, step)
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
