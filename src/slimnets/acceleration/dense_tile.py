"""One register tile of a dense product, written as LLVM vectors.

Where most weights are not zero, neighbouring output channels read the same inputs: a vector holds
a group of them, so that an input is read once for all, and a weight once for all pixels of the
tile. The tile is turned around at its end, as pixels are neighbours in memory and channels are not.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from slimnets.acceleration.codes import FEW, WIDE
from slimnets.acceleration.memory import FLOAT, I32, I64, clamp, splat
from slimnets.acceleration.tile import CONTRACT, FIRST, LAST


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


class _DenseTile:
    """Emits the instructions of one tile; a vector of channels per pixel."""

    def __init__(self, builder: ir.IRBuilder, channels: int, rows: int, width: int) -> None:
        self.b = builder
        self.channels, self.rows, self.width = channels, rows, width
        self.pixels = rows * width
        self.vector = ir.VectorType(FLOAT, channels)
        sums = self.pixels * channels // FEW
        self.unroll = max(1, (8 if WIDE else 4) // sums)  # so many hide a multiply-add's latency

    def emit(self, *args: Any) -> None:
        vals, offs, count, x, xs, flags, bias, residual, acc, y, ys, plane, lo, hi = args
        b = self.b
        self.vals, self.x = (b.inttoptr(at, FLOAT.as_pointer()) for at in (vals, x))
        self.offs = b.inttoptr(offs, I32.as_pointer())
        self.shifts = [b.mul(xs, I64(r)) for r in range(self.rows)]
        sums = self._begin(flags, bias, acc)
        sums = self._products(count, sums)
        self._end(sums, flags, residual, acc, y, ys, plane, lo, hi)

    def _begin(self, flags: Any, bias: Any, acc: Any) -> list[Any]:
        b = self.b
        is_first = b.icmp_unsigned("!=", b.and_(flags, I64(FIRST)), I64(0))
        step = b.select(is_first, I64(0), I64(self.channels))
        at = b.select(is_first, bias, acc)
        return [self._load(at, b.mul(step, I64(p))) for p in range(self.pixels)]

    def _products(self, count: Any, sums: list[Any]) -> list[Any]:
        b, n = self.b, self.unroll
        zero = ir.Constant(self.vector, [0.0] * self.channels)
        middle = b.and_(count, I64(-n))
        sums = self._loop(I64(0), middle, [*sums, *[zero] * (self.pixels * (n - 1))], n)
        while len(sums) > self.pixels:
            half = len(sums) // 2
            sums = [
                b.fadd(p, q, flags=CONTRACT) for p, q in zip(sums[:half], sums[half:], strict=True)
            ]
        return self._loop(middle, count, sums, 1) if n > 1 else sums

    def _loop(self, start: Any, end: Any, sums: list[Any], step: int) -> list[Any]:
        b = self.b
        before = b.block
        body, after = b.append_basic_block("body"), b.append_basic_block("after")
        b.cbranch(b.icmp_signed("<", start, end), body, after)
        b.position_at_end(body)
        index = b.phi(I64)
        index.add_incoming(start, before)
        running = [self._phi((value, before)) for value in sums]
        new = []
        for u in range(step):
            new += self._multiply(b.add(index, I64(u)), running[u * self.pixels :][: self.pixels])
        following = b.add(index, I64(step))
        index.add_incoming(following, body)
        for phi, value in zip(running, new, strict=True):
            phi.add_incoming(value, body)
        b.cbranch(b.icmp_signed("<", following, end), body, after)
        b.position_at_end(after)
        return [self._phi((p, before), (q, body)) for p, q in zip(sums, new, strict=True)]

    def _multiply(self, index: Any, sums: list[Any]) -> list[Any]:
        b = self.b
        weights = self._load_at(b.gep(self.vals, [b.mul(index, I64(self.channels))]))
        base = b.gep(self.x, [b.sext(b.load(b.gep(self.offs, [index])), I64)])
        rows = [b.gep(base, [shift]) for shift in self.shifts]
        found = []
        for p, total in enumerate(sums):
            value = b.load(b.gep(rows[p // self.width], [I64(p % self.width)]))
            product = b.fmul(weights, splat(b, value, self.channels), flags=CONTRACT)
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
        b.cbranch(b.icmp_unsigned("!=", b.and_(flags, I64(LAST)), I64(0)), last, keep)
        b.position_at_end(keep)
        for p, total in enumerate(sums):
            self._store(total, acc, I64(p * self.channels))
        b.branch(done)
        b.position_at_end(last)
        lines = self._lines(self._turned(sums))
        places = [
            b.add(b.mul(plane, I64(c)), b.mul(ys, I64(r)))
            for c in range(self.channels)
            for r in range(self.rows)
        ]
        kind = ir.VectorType(FLOAT, self.width)
        b.cbranch(b.icmp_unsigned("!=", residual, I64(0)), add, store)
        b.position_at_end(add)
        added = [
            b.fadd(line, self._load(residual, at, kind), flags=CONTRACT)
            for line, at in zip(lines, places, strict=True)
        ]
        b.branch(store)
        b.position_at_end(store)
        lines = [self._phi((p, last), (q, add)) for p, q in zip(lines, added, strict=True)]
        low, high = splat(b, lo, self.width), splat(b, hi, self.width)
        for line, at in zip(lines, places, strict=True):
            self._store(clamp(b, line, low, high), y, at)
        b.branch(done)
        b.position_at_end(done)

    def _turned(self, sums: list[Any]) -> list[Any]:
        """The tile as vectors of neighbouring pixels, channel by channel, by perfect shuffles."""
        half = len(sums) // 2
        rounds = half.bit_length()
        low = [i // 2 + self.channels * (i % 2) for i in range(self.channels)]
        high = [i + self.channels // 2 for i in low]
        for _ in range(rounds):
            pairs = zip(sums[:half], sums[half:], strict=True)
            sums = [self._shuffle(p, q, lanes) for p, q in pairs for lanes in (low, high)]
        return sums

    def _lines(self, turned: list[Any]) -> list[Any]:
        """The rows of the tile, of all channels."""
        starts = range(0, self.channels, self.width)
        return [
            self._shuffle(vector, vector, list(range(start, start + self.width)))
            for vector in turned
            for start in starts
        ]

    def _shuffle(self, p: Any, q: Any, lanes: list[int]) -> Any:
        return self.b.shuffle_vector(p, q, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    def _phi(self, *incoming: tuple[Any, Any]) -> Any:
        phi = self.b.phi(incoming[0][0].type)
        for value, block in incoming:
            phi.add_incoming(value, block)
        return phi

    def _at(self, address: Any, offset: Any) -> Any:
        return self.b.gep(self.b.inttoptr(address, FLOAT.as_pointer()), [offset])

    def _load_at(self, pointer: Any, kind: Any = None) -> Any:
        loaded = self.b.load(self.b.bitcast(pointer, (kind or self.vector).as_pointer()))
        loaded.align = 4
        return loaded

    def _load(self, address: Any, offset: Any, kind: Any = None) -> Any:
        return self._load_at(self._at(address, offset), kind)

    def _store(self, value: Any, address: Any, offset: Any) -> None:
        pointer = self.b.bitcast(self._at(address, offset), value.type.as_pointer())
        self.b.store(value, pointer).align = 4
