"""One register tile of a sparse product, written as LLVM vectors.

Numba's own vectoriser does not keep a tile of 64 floats in registers over a loop of indirect
addresses; one LLVM vector does, and LLVM lowers it to AVX2, AVX-512 or NEON.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from slimnets.acceleration.accumulate import CONTRACT, FIRST, LAST, Accumulator
from slimnets.acceleration.memory import FLOAT, I32, I64, clamp, splat


def tile_kernel(rows: int, width: int, unroll: int) -> Any:
    """A function for Numba code that computes ``rows`` by ``width`` outputs of one channel.

    It adds ``vals[i] * x[offs[i] + r * xs :][:width]`` for ``i`` in ``start..end``. Addresses are
    bytes as integers, offsets and strides count floats; ``unroll`` independent sums hide the
    latency of multiply-add where the tile is only a register or two.
    """

    @intrinsic
    def tile(  # type: ignore[no-untyped-def]
        typing, vals, offs, start, end, x, xs, flags, bias, residual, acc, y, ys, mask, lo, hi
    ):
        i, f = types.int64, types.float32
        signature = types.void(i, i, i, i, i, i, i, f, i, i, i, i, i, f, f)

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            _Tile(builder, rows, width, unroll).emit(*args)
            return context.get_dummy_value()

        return signature, codegen

    return tile


class _Tile(Accumulator):
    """Emits the instructions of one tile; a vector per row of the tile."""

    def __init__(self, builder: ir.IRBuilder, rows: int, width: int, unroll: int) -> None:
        super().__init__(builder, width, rows, unroll)
        self.ints = ir.VectorType(I32, width)

    def emit(self, *args: Any) -> None:
        vals, offs, start, end, x, xs, flags, bias, residual, acc, y, ys, mask, lo, hi = args
        b = self.b
        self.vals = b.inttoptr(vals, FLOAT.as_pointer())
        self.offs = b.inttoptr(offs, I32.as_pointer())
        self.x, self.xs = b.inttoptr(x, FLOAT.as_pointer()), xs
        sums = self._begin(flags, bias, residual, acc, ys)
        sums = self.products(start, end, sums)
        self._end(sums, flags, acc, y, ys, mask, lo, hi)

    def _begin(self, flags: Any, bias: Any, residual: Any, acc: Any, ys: Any) -> list[Any]:
        b = self.b
        first, later, plain, add, ready = (
            b.append_basic_block(n) for n in ("first", "later", "plain", "add", "ready")
        )
        b.cbranch(self.flagged(flags, FIRST), first, later)
        b.position_at_end(later)
        resumed = [self.load(acc, r * self.width) for r in range(self.count)]
        b.branch(ready)
        b.position_at_end(first)
        splat = self._splat(bias)
        b.cbranch(b.icmp_unsigned("!=", residual, I64(0)), add, plain)
        b.position_at_end(plain)
        b.branch(ready)
        b.position_at_end(add)
        added = [
            b.fadd(splat, self.load(residual, b.mul(ys, I64(r))), flags=CONTRACT)
            for r in range(self.count)
        ]
        b.branch(ready)
        b.position_at_end(ready)
        return [
            self.phi((resumed[r], later), (splat, plain), (added[r], add))
            for r in range(self.count)
        ]

    def multiply(self, index: Any, sums: list[Any]) -> list[Any]:
        b = self.b
        weight = self._splat(b.load(b.gep(self.vals, [index])))
        base = b.gep(self.x, [b.sext(b.load(b.gep(self.offs, [index])), I64)])
        found = []
        for r, total in enumerate(sums):
            row = b.gep(base, [b.mul(self.xs, I64(r))])
            product = b.fmul(weight, self.load_at(row), flags=CONTRACT)
            found.append(b.fadd(total, product, flags=CONTRACT))
        return found

    def _end(
        self, sums: list[Any], flags: Any, acc: Any, y: Any, ys: Any, mask: Any, lo: Any, hi: Any
    ) -> None:
        b = self.b
        last, keep, masked, store, done = (
            b.append_basic_block(n) for n in ("last", "keep", "masked", "store", "done")
        )
        b.cbranch(self.flagged(flags, LAST), last, keep)
        b.position_at_end(keep)
        for r, total in enumerate(sums):
            self.store(total, acc, r * self.width)
        b.branch(done)
        b.position_at_end(last)
        low, high = self._splat(lo), self._splat(hi)
        clamped = [clamp(b, total, low, high) for total in sums]
        b.cbranch(b.icmp_unsigned("!=", mask, I64(0)), masked, store)
        b.position_at_end(masked)
        kept = []
        for r, total in enumerate(clamped):
            bits = self.load(mask, b.mul(ys, I64(r)), self.ints)
            kept.append(b.bitcast(b.and_(b.bitcast(total, self.ints), bits), self.vector))
        b.branch(store)
        b.position_at_end(store)
        values = [self.phi((p, last), (q, masked)) for p, q in zip(clamped, kept, strict=True)]
        for r, value in enumerate(values):
            self.store(value, y, b.mul(ys, I64(r)))
        b.branch(done)
        b.position_at_end(done)

    def _splat(self, scalar: Any) -> Any:
        return splat(self.b, scalar, self.width)
