"""One register tile of a sparse product, written as LLVM vectors.

Numba's own vectoriser does not keep a tile of 64 floats in registers over a loop of indirect
addresses; one LLVM vector does, and LLVM lowers it to AVX2, AVX-512 or NEON.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from slimnets.acceleration.memory import FLOAT, I32, I64, clamp, splat

# not "fast": nnan and ninf would make NaN and infinities in the input undefined
CONTRACT = ("contract",)

FIRST, LAST = 1, 2
"""Flags of a pass over a row: it starts from the bias; it ends with clamp, mask and output."""


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


class _Tile:
    """Emits the instructions of one tile; a vector per row of the tile."""

    def __init__(self, builder: ir.IRBuilder, rows: int, width: int, unroll: int) -> None:
        self.b = builder
        self.rows, self.width, self.unroll = rows, width, unroll
        self.vector = ir.VectorType(FLOAT, width)
        self.ints = ir.VectorType(I32, width)

    def emit(self, *args: Any) -> None:
        vals, offs, start, end, x, xs, flags, bias, residual, acc, y, ys, mask, lo, hi = args
        b = self.b
        self.vals = b.inttoptr(vals, FLOAT.as_pointer())
        self.offs = b.inttoptr(offs, I32.as_pointer())
        self.x, self.xs = b.inttoptr(x, FLOAT.as_pointer()), xs
        sums = self._begin(flags, bias, residual, acc, ys)
        sums = self._products(start, end, sums)
        self._end(sums, flags, acc, y, ys, mask, lo, hi)

    def _begin(self, flags: Any, bias: Any, residual: Any, acc: Any, ys: Any) -> list[Any]:
        b = self.b
        first, later, plain, add, ready = (
            b.append_basic_block(n) for n in ("first", "later", "plain", "add", "ready")
        )
        b.cbranch(b.icmp_unsigned("!=", b.and_(flags, I64(FIRST)), I64(0)), first, later)
        b.position_at_end(later)
        resumed = [self._load(acc, r * self.width) for r in range(self.rows)]
        b.branch(ready)
        b.position_at_end(first)
        splat = self._splat(bias)
        b.cbranch(b.icmp_unsigned("!=", residual, I64(0)), add, plain)
        b.position_at_end(plain)
        b.branch(ready)
        b.position_at_end(add)
        added = [
            b.fadd(splat, self._load(residual, b.mul(ys, I64(r))), flags=CONTRACT)
            for r in range(self.rows)
        ]
        b.branch(ready)
        b.position_at_end(ready)
        return [
            self._phi((resumed[r], later), (splat, plain), (added[r], add))
            for r in range(self.rows)
        ]

    def _products(self, start: Any, end: Any, sums: list[Any]) -> list[Any]:
        b, n = self.b, self.unroll
        zero = ir.Constant(self.vector, [0.0] * self.width)
        middle = b.add(start, b.and_(b.sub(end, start), I64(-n)))
        sums = self._loop(start, middle, [*sums, *[zero] * (self.rows * (n - 1))], n)
        while len(sums) > self.rows:
            half = len(sums) // 2
            sums = [
                b.fadd(p, q, flags=CONTRACT) for p, q in zip(sums[:half], sums[half:], strict=True)
            ]
        return self._loop(middle, end, sums, 1) if n > 1 else sums

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
            new += self._multiply(b.add(index, I64(u)), running[u * self.rows :][: self.rows])
        following = b.add(index, I64(step))
        index.add_incoming(following, body)
        for phi, value in zip(running, new, strict=True):
            phi.add_incoming(value, body)
        b.cbranch(b.icmp_signed("<", following, end), body, after)
        b.position_at_end(after)
        return [self._phi((p, before), (q, body)) for p, q in zip(sums, new, strict=True)]

    def _multiply(self, index: Any, sums: list[Any]) -> list[Any]:
        b = self.b
        weight = self._splat(b.load(b.gep(self.vals, [index])))
        base = b.gep(self.x, [b.sext(b.load(b.gep(self.offs, [index])), I64)])
        found = []
        for r, total in enumerate(sums):
            row = b.gep(base, [b.mul(self.xs, I64(r))])
            product = b.fmul(weight, self._load_at(row), flags=CONTRACT)
            found.append(b.fadd(total, product, flags=CONTRACT))
        return found

    def _end(
        self, sums: list[Any], flags: Any, acc: Any, y: Any, ys: Any, mask: Any, lo: Any, hi: Any
    ) -> None:
        b = self.b
        last, keep, masked, store, done = (
            b.append_basic_block(n) for n in ("last", "keep", "masked", "store", "done")
        )
        b.cbranch(b.icmp_unsigned("!=", b.and_(flags, I64(LAST)), I64(0)), last, keep)
        b.position_at_end(keep)
        for r, total in enumerate(sums):
            self._store(total, acc, r * self.width)
        b.branch(done)
        b.position_at_end(last)
        low, high = self._splat(lo), self._splat(hi)
        clamped = [clamp(b, total, low, high) for total in sums]
        b.cbranch(b.icmp_unsigned("!=", mask, I64(0)), masked, store)
        b.position_at_end(masked)
        kept = []
        for r, total in enumerate(clamped):
            bits = self._load(mask, b.mul(ys, I64(r)), self.ints)
            kept.append(b.bitcast(b.and_(b.bitcast(total, self.ints), bits), self.vector))
        b.branch(store)
        b.position_at_end(store)
        values = [self._phi((p, last), (q, masked)) for p, q in zip(clamped, kept, strict=True)]
        for r, value in enumerate(values):
            self._store(value, y, b.mul(ys, I64(r)))
        b.branch(done)
        b.position_at_end(done)

    def _phi(self, *incoming: tuple[Any, Any]) -> Any:
        phi = self.b.phi(self.vector)
        for value, block in incoming:
            phi.add_incoming(value, block)
        return phi

    def _splat(self, scalar: Any) -> Any:
        return splat(self.b, scalar, self.width)

    def _at(self, address: Any, offset: Any) -> Any:
        offset = I64(offset) if isinstance(offset, int) else offset
        return self.b.gep(self.b.inttoptr(address, FLOAT.as_pointer()), [offset])

    def _load_at(self, pointer: Any, kind: Any = None) -> Any:
        loaded = self.b.load(self.b.bitcast(pointer, (kind or self.vector).as_pointer()))
        loaded.align = 4
        return loaded

    def _load(self, address: Any, offset: Any, kind: Any = None) -> Any:
        return self._load_at(self._at(address, offset), kind)

    def _store(self, value: Any, address: Any, offset: Any) -> None:
        pointer = self.b.bitcast(self._at(address, offset), self.vector.as_pointer())
        self.b.store(value, pointer).align = 4
