"""The largest of every 2 x 2 pixels of one image, written as LLVM vectors.

Where a single image is computed, neighbours in memory are neighbours in the image, and Numba's own
vectoriser gives up on reading every second one. With several samples it does well.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from slimnets.acceleration.memory import FLOAT, I32, clamp, splat


def halve_kernel(width: int) -> Any:
    """A function for Numba code that computes ``width`` neighbouring outputs.

    It reads ``2 * width`` floats at ``upper`` and as many at ``lower``, and writes the largest of
    each square, within ``lo`` and ``hi``, to ``y``. Addresses are bytes as integers. As in PyTorch,
    NaN is the largest.
    """
    vector, wide = ir.VectorType(FLOAT, width), ir.VectorType(FLOAT, 2 * width)

    @intrinsic
    def halve(typing, upper, lower, y, lo, hi):  # type: ignore[no-untyped-def]
        i, f = types.int64, types.float32

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            b, (upper, lower, y, lo, hi) = builder, args

            def load(address: Any) -> Any:
                loaded = b.load(b.inttoptr(address, wide.as_pointer()))
                loaded.align = 4
                return loaded

            def largest(p: Any, q: Any) -> Any:
                wins = b.or_(b.fcmp_ordered(">", q, p), b.fcmp_unordered("uno", q, q))
                return b.select(wins, q, p)

            def every_second(value: Any, first: int) -> Any:
                lanes = ir.Constant(ir.VectorType(I32, width), list(range(first, 2 * width, 2)))
                return b.shuffle_vector(value, ir.Constant(wide, ir.Undefined), lanes)

            rows = largest(load(upper), load(lower))
            value = largest(every_second(rows, 0), every_second(rows, 1))
            value = clamp(b, value, splat(b, lo, width), splat(b, hi, width))
            b.store(value, b.inttoptr(y, vector.as_pointer())).align = 4
            return context.get_dummy_value()

        return types.void(i, i, i, f, f), codegen

    return halve
