"""One register tile of a dense product, written as LLVM vectors.

Where most weights are not zero, neighbouring output channels read the same inputs: a vector holds
a group of them, so that an input is read once for all, and a weight once for all pixels of the
tile. The tile is turned around at its end, as pixels are neighbours in memory and channels are not.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from slimnets.acceleration.accumulate import CONTRACT, FIRST, LAST, Accumulator
from slimnets.acceleration.codes import FEW
from slimnets.acceleration.host import WIDE
from slimnets.acceleration.memory import FLOAT, I32, I64, clamp, prefetch, splat
from slimnets.acceleration.weights import CACHE_LINE

AHEAD = 32
"""Columns of weights between those that are used and those that are fetched from memory."""


def dense_kernel(channels: int, rows: int, width: int) -> Any:
    """A function for Numba code that computes ``rows`` by ``width`` outputs of each channel.

    It adds ``vals[i * channels :][:channels]`` times ``x[offs[i] + r * xs + w]`` for ``i`` in
    ``0..count``; all sizes are powers of two. Addresses are bytes as integers, offsets and strides
    count floats. ``residual`` and ``y`` are those of the first channel, ``plane`` leads to the
    next.
    """

    @intrinsic
    def tile(  # type: ignore[no-untyped-def]
        typing, vals, offs, count, x, xs, flags, bias, residual, acc, y, ys, plane, lo, hi
    ):
        i, f = types.int64, types.float32
        signature = types.void(i, i, i, i, i, i, i, i, i, i, i, i, f, f)

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            _DenseTile(builder, channels, rows, width).emit(*args)
            return context.get_dummy_value()

        return signature, codegen

    return tile


class _DenseTile(Accumulator):
    """Emits the instructions of one tile; a vector of channels per pixel."""

    def __init__(self, builder: ir.IRBuilder, channels: int, rows: int, columns: int) -> None:
        pixels = rows * columns
        enough = (8 if WIDE else 4) // (pixels * channels // FEW)
        super().__init__(builder, channels, pixels, max(1, enough))
        self.rows, self.columns = rows, columns

    def emit(self, *args: Any) -> None:
        vals, offs, count, x, xs, flags, bias, residual, acc, y, ys, plane, lo, hi = args
        b = self.b
        self.vals, self.x = (b.inttoptr(at, FLOAT.as_pointer()) for at in (vals, x))
        self.offs = b.inttoptr(offs, I32.as_pointer())
        self.shifts = [b.mul(xs, I64(r)) for r in range(self.rows)]
        sums = self._begin(flags, bias, acc)
        sums = self.products(I64(0), count, sums)
        self._end(sums, flags, residual, acc, y, ys, plane, lo, hi)

    def _begin(self, flags: Any, bias: Any, acc: Any) -> list[Any]:
        b = self.b
        is_first = self.flagged(flags, FIRST)
        step = b.select(is_first, I64(0), I64(self.width))
        at = b.select(is_first, bias, acc)
        return [self.load(at, b.mul(step, I64(p))) for p in range(self.count)]

    def multiply(self, index: Any, sums: list[Any]) -> list[Any]:
        b = self.b
        at = b.gep(self.vals, [b.mul(index, I64(self.width))])
        weights = self.load_at(at)
        for line in range(0, self.width, CACHE_LINE // 4):  # of one image, all are new
            prefetch(b, b.gep(at, [I64(AHEAD * self.width + line)]))
        base = b.gep(self.x, [b.sext(b.load(b.gep(self.offs, [index])), I64)])
        rows = [b.gep(base, [shift]) for shift in self.shifts]
        found = []
        for p, total in enumerate(sums):
            value = b.load(b.gep(rows[p // self.columns], [I64(p % self.columns)]))
            product = b.fmul(weights, splat(b, value, self.width), flags=CONTRACT)
            found.append(b.fadd(total, product, flags=CONTRACT))
        return found

    def _end(
        self,
        sums: list[Any],
        flags: Any,
        residual: Any,
        acc: Any,
        y: Any,
        ys: Any,
        plane: Any,
        lo: Any,
        hi: Any,
    ) -> None:
        b = self.b
        last, keep, add, store, done = (
            b.append_basic_block(n) for n in ("last", "keep", "add", "store", "done")
        )
        b.cbranch(self.flagged(flags, LAST), last, keep)
        b.position_at_end(keep)
        for p, total in enumerate(sums):
            self.store(total, acc, I64(p * self.width))
        b.branch(done)
        b.position_at_end(last)
        lines = self._lines(self._turned(sums))
        places = [
            b.add(b.mul(plane, I64(c)), b.mul(ys, I64(r)))
            for c in range(self.width)
            for r in range(self.rows)
        ]
        kind = ir.VectorType(FLOAT, self.columns)
        b.cbranch(b.icmp_unsigned("!=", residual, I64(0)), add, store)
        b.position_at_end(add)
        added = [
            b.fadd(line, self.load(residual, at, kind), flags=CONTRACT)
            for line, at in zip(lines, places, strict=True)
        ]
        b.branch(store)
        b.position_at_end(store)
        lines = [self.phi((p, last), (q, add)) for p, q in zip(lines, added, strict=True)]
        low, high = splat(b, lo, self.columns), splat(b, hi, self.columns)
        for line, at in zip(lines, places, strict=True):
            self.store(clamp(b, line, low, high), y, at)
        b.branch(done)
        b.position_at_end(done)

    def _turned(self, sums: list[Any]) -> list[Any]:
        """The tile as vectors of neighbouring pixels, channel by channel.

        A perfect shuffle of all floats moves what stood half of them away next to each other; after
        as many as double one to the number of pixels, all pixels of a channel stand together.
        """
        half = len(sums) // 2
        rounds = half.bit_length()
        low = [i // 2 + self.width * (i % 2) for i in range(self.width)]
        high = [i + self.width // 2 for i in low]
        for _ in range(rounds):
            pairs = zip(sums[:half], sums[half:], strict=True)
            sums = [self._shuffle(p, q, lanes) for p, q in pairs for lanes in (low, high)]
        return sums

    def _lines(self, turned: list[Any]) -> list[Any]:
        """The rows of the tile, of all channels."""
        starts = range(0, self.width, self.columns)
        return [
            self._shuffle(vector, vector, list(range(start, start + self.columns)))
            for vector in turned
            for start in starts
        ]

    def _shuffle(self, p: Any, q: Any, lanes: list[int]) -> Any:
        return self.b.shuffle_vector(p, q, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))
