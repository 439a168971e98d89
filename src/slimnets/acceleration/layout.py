"""Where the samples, pixels and channels of a value lie in the engine's arena."""

from dataclasses import dataclass

import numpy as np

from slimnets.acceleration.codes import DENSE_KINDS, KINDS
from slimnets.acceleration.steps import Conv, Shape
from slimnets.acceleration.weights import CACHE_LINE, Ints, Matrix, NonZeros

L1_BYTES = 28 * 1024
"""What a block of input channels may take of the first-level cache (32 KiB on most cores)."""

L2_BYTES = 384 * 1024
"""What dense weights that several tiles share may take of the second-level cache."""

SHORTEST_ROW = 8
"""Non-zeros that a row should have in a block, else loading and storing its sums costs more."""


@dataclass(frozen=True)
class Layout:
    """A value as (channel, row, column, sample), with zeros around every image.

    A column of zeros stands between rows once, not twice: it is the right margin of one row and
    the left margin of the next.
    """

    shape: Shape
    samples: int
    top: int = 0
    left: int = 0
    gap: int | None = None

    @property
    def pitch(self) -> int:
        """Pixels from one row to the next."""
        return self.shape.width + (self.left if self.gap is None else self.gap)

    @property
    def row(self) -> int:
        """Floats from one row to the next."""
        return self.pitch * self.samples

    @property
    def base(self) -> int:
        """Floats from the start of a channel to its first pixel."""
        return (self.top * self.pitch + self.left) * self.samples

    @property
    def plane(self) -> int:
        """Floats from one channel to the next."""
        size = ((self.shape.height + 2 * self.top) * self.pitch + self.left) * self.samples
        if size > self.samples:
            size = -(-size // 16) * 16
        # channels a multiple of 512 bytes apart would share a few sets of the first-level cache
        return size + 16 if size % 128 == 0 else size

    @property
    def floats(self) -> int:
        """Floats of all channels."""
        return self.plane * self.shape.channels

    def mask(self) -> Ints:
        """All bits set where a pixel is, none in the margins, for one channel."""
        mask = np.zeros(self.plane + 64, np.int32)
        for r in range(self.shape.height):
            start = self.base + r * self.row
            mask[start : start + self.shape.width * self.samples] = -1
        return mask


@dataclass(frozen=True)
class Tiling:
    """How the outputs of one channel are cut into register tiles."""

    kind: int
    rows: int
    width: int  # floats in a row of a tile
    x_step: int
    y_step: int
    starts: Ints  # (tiles, 2): where a tile starts in the input, and in the output
    masked: bool


def tiling(image: Layout, pitch: int) -> Tiling:
    """The cheapest way to cut ``image``, computed from an input with ``pitch`` pixels a row."""
    options = []
    for kind, (rows, width) in enumerate(KINDS):
        if pitch == image.pitch and rows == 1:
            options.append(_along(image, kind, width))
        options.append(_across(image, kind, rows, width, pitch))
    return min((t for t in options if t is not None), key=_cost)


def dense_tiling(image: Layout, pitch: int, group_size: int) -> Tiling:
    """The cheapest way to cut ``image`` into tiles of dense products, a group of outputs each."""
    options = [
        _across(image, kind, rows, width, pitch)
        for kind, (outputs, rows, width) in enumerate(DENSE_KINDS)
        if outputs == group_size
    ]
    return min((t for t in options if t is not None), key=_dense_cost)


def _cost(t: Tiling) -> float:
    """Cycles for one non-zero of every tile: vectors of eight, and its address and value."""
    return len(t.starts) * (t.rows * max(1, t.width / 8) * 0.55 + 0.7)


def _dense_cost(t: Tiling) -> float:
    """Time for one column of every tile, in that of a pixel's multiply-add."""
    return len(t.starts) * (t.rows * t.width + 3.5)


def _along(image: Layout, kind: int, width: int) -> Tiling | None:
    """Tiles along all rows and the gaps between them, which the mask sets back to zero."""
    length = (image.shape.height - 1) * image.row + image.shape.width * image.samples
    if length < width and image.base + width > image.plane:
        return None
    starts = np.minimum(np.arange(0, length, width), max(length - width, 0))
    whole = image.pitch == image.shape.width and length >= width
    places = np.stack([starts, starts + image.base], 1)
    return Tiling(kind, 1, width, width, width, places, masked=not whole)


def _across(image: Layout, kind: int, rows: int, width: int, pitch: int) -> Tiling | None:
    """Tiles of some rows each, without the gaps."""
    length = image.shape.width * image.samples
    if length < width or image.shape.height < rows:
        return None
    columns = np.minimum(np.arange(0, length, width), length - width)
    lines = np.minimum(np.arange(0, image.shape.height, rows), image.shape.height - rows)
    x = lines[:, None] * pitch * image.samples + columns
    y = lines[:, None] * image.row + columns + image.base
    starts = np.stack([x.ravel(), y.ravel()], 1)
    return Tiling(kind, rows, width, pitch * image.samples, image.row, starts, masked=False)


@dataclass(frozen=True)
class Blocked:
    """Non-zeros sorted by block of input channels, then by output row."""

    blocks: int
    order: Ints  # of the non-zeros
    rows: Ints  # (blocks * outputs): the output rows of each block, longest first
    pointers: Ints  # (blocks * outputs + 1): where each begins


def block(weight: NonZeros, channels: int, shares: int = 1) -> Blocked:
    """Sort ``weight`` into blocks of ``channels`` input channels.

    Rows of one block are sorted by length, so that the end of the inner loop is predicted, within
    ``shares`` of neighbours: threads that wrote to neighbours would write to one cache line.
    """
    which = weight.local // channels
    blocks = int(which.max()) + 1 if len(which) else 1
    counts = np.bincount(which * weight.outputs + weight.row, minlength=blocks * weight.outputs)
    counts = counts.reshape(blocks, weight.outputs)
    share = np.arange(weight.outputs) * shares // weight.outputs
    rows = np.argsort(share * (counts.max(initial=0) + 1) - counts, axis=1, kind="stable")
    rank = np.empty_like(rows)
    np.put_along_axis(rank, rows, np.arange(weight.outputs)[None], axis=1)
    order = np.lexsort((weight.channel, rank[which, weight.row], which))
    lengths = np.take_along_axis(counts, rows, axis=1).ravel()
    return Blocked(blocks, order, rows.ravel(), np.concatenate([[0], np.cumsum(lengths)]))


def block_size(conv: Conv, weight: NonZeros, tiles: Tiling, samples: int) -> int:
    """Input channels of a block: what fits the first-level cache, unless rows get too short."""
    if not len(weight.values):
        return 1
    channels = int(weight.local.max()) + 1
    fitting = _fitting(conv, tiles, samples)
    affordable = max(1, len(weight.values) // (weight.outputs * SHORTEST_ROW))
    blocks = min(-(-channels // fitting), affordable)
    return -(-channels // blocks)


def dense_blocks(conv: Conv, weight: Matrix, tiles: Tiling, samples: int) -> tuple[Ints, int]:
    """Where blocks of columns begin and end, and how many groups of outputs are taken at once.

    The inputs of a block fit the first-level cache; its weights for these groups the second.
    """
    blocks = -(-weight.inputs // _fitting(conv, tiles, samples))
    channels = np.arange(blocks + 1) * weight.inputs // blocks
    starts = channels * (weight.columns // weight.inputs)
    longest = int(np.diff(starts).max())
    fitting = max(1, L2_BYTES // (4 * weight.group_size * longest))
    return starts, min(fitting, len(weight.values))


def _fitting(conv: Conv, tiles: Tiling, samples: int) -> int:
    """How many channels of what a tile reads fit the first-level cache."""
    kernel = conv.kernel
    reach = [d * (k - 1) for k, d in zip(kernel, conv.dilation, strict=True)]
    rows = min(tiles.rows + reach[0], tiles.rows * kernel[0])
    floats = min(tiles.width + reach[1] * samples, tiles.width * kernel[1])
    footprint = CACHE_LINE * rows * -(-4 * floats // CACHE_LINE)
    return max(1, L1_BYTES // footprint)
