"""What register tiles have in common: a loop that adds to sums, written as LLVM vectors."""

from typing import Any

from llvmlite import ir

from slimnets.acceleration.memory import FLOAT, I64

# not "fast": nnan and ninf would make NaN and infinities in the input undefined
CONTRACT = ("contract",)

FIRST, LAST = 1, 2
"""Flags of a pass over a row: it starts from the bias; it ends with clamp and output."""


class Accumulator:
    """Emits the instructions that add products to ``count`` sums, each a vector of ``width``.

    Args:
        builder: Where to.
        width: Floats of a vector.
        count: Vectors that the sums of a tile are.
        unroll: How many times as many there are in the loop, to hide the latency of multiply-add
            where the sums are only a register or two.
    """

    def __init__(self, builder: ir.IRBuilder, width: int, count: int, unroll: int) -> None:
        self.b = builder
        self.width, self.count, self.unroll = width, count, unroll
        self.vector = ir.VectorType(FLOAT, width)

    def multiply(self, index: Any, sums: list[Any]) -> list[Any]:
        """The sums and the products of weight number ``index``."""
        raise NotImplementedError

    def products(self, start: Any, end: Any, sums: list[Any]) -> list[Any]:
        """The sums and the products of all weights in ``start..end``."""
        b, n = self.b, self.unroll
        zero = ir.Constant(self.vector, [0.0] * self.width)
        middle = b.add(start, b.and_(b.sub(end, start), I64(-n)))
        sums = self._loop(start, middle, [*sums, *[zero] * (self.count * (n - 1))], n)
        while len(sums) > self.count:
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
        running = [self.phi((value, before)) for value in sums]
        new = []
        for u in range(step):
            new += self.multiply(b.add(index, I64(u)), running[u * self.count :][: self.count])
        following = b.add(index, I64(step))
        index.add_incoming(following, body)
        for phi, value in zip(running, new, strict=True):
            phi.add_incoming(value, body)
        b.cbranch(b.icmp_signed("<", following, end), body, after)
        b.position_at_end(after)
        return [self.phi((p, before), (q, body)) for p, q in zip(sums, new, strict=True)]

    def phi(self, *incoming: tuple[Any, Any]) -> Any:
        """The value that comes from the block which was left."""
        phi = self.b.phi(incoming[0][0].type)
        for value, block in incoming:
            phi.add_incoming(value, block)
        return phi

    def flagged(self, flags: Any, flag: int) -> Any:
        """Whether ``flag`` is set."""
        return self.b.icmp_unsigned("!=", self.b.and_(flags, I64(flag)), I64(0))

    def load_at(self, pointer: Any, kind: Any = None) -> Any:
        """The vector at ``pointer``, of floats unless ``kind`` is another."""
        loaded = self.b.load(self.b.bitcast(pointer, (kind or self.vector).as_pointer()))
        loaded.align = 4
        return loaded

    def load(self, address: Any, offset: Any, kind: Any = None) -> Any:
        """The vector that begins ``offset`` floats after ``address``."""
        return self.load_at(self._at(address, offset), kind)

    def store(self, value: Any, address: Any, offset: Any) -> None:
        """Write the vector to where it begins ``offset`` floats after ``address``."""
        pointer = self.b.bitcast(self._at(address, offset), value.type.as_pointer())
        self.b.store(value, pointer).align = 4

    def _at(self, address: Any, offset: Any) -> Any:
        offset = I64(offset) if isinstance(offset, int) else offset
        return self.b.gep(self.b.inttoptr(address, FLOAT.as_pointer()), [offset])
