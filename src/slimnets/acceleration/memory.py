"""Memory, vectors and barriers for compiled code: addresses are bytes, indices count elements."""

# mypy: ignore-errors
# Numba gives these functions their types

import os
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

FLOAT, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)


@intrinsic
def load(typing, address, index):
    """The float number ``index`` at ``address``."""

    def codegen(context, builder, signature, args):
        return builder.load(_element(builder, FLOAT, *args))

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def store(typing, address, index, value):
    """Write the float number ``index`` at ``address``."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], _element(builder, FLOAT, *args[:2]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def load_int(typing, address, index):
    """The 32-bit integer number ``index`` at ``address``."""

    def codegen(context, builder, signature, args):
        return builder.sext(builder.load(_element(builder, I32, *args)), I64)

    return types.int64(types.int64, types.int64), codegen


def _element(builder: ir.IRBuilder, kind: ir.Type, address: Any, index: Any) -> Any:
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


def splat(builder: ir.IRBuilder, scalar: Any, width: int) -> Any:
    """A vector of ``width`` times the float ``scalar``."""
    undefined = ir.Constant(ir.VectorType(FLOAT, width), ir.Undefined)
    one = builder.insert_element(undefined, scalar, I32(0))
    lanes = ir.Constant(ir.VectorType(I32, width), [0] * width)
    return builder.shuffle_vector(one, undefined, lanes)


def prefetch(builder: ir.IRBuilder, pointer: Any) -> None:
    """Begin to fetch the cache line at ``pointer``, which may lie anywhere, to the second level."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
    builder.call(function, [builder.bitcast(pointer, byte), I32(0), I32(2), I32(1)])


def clamp(builder: ir.IRBuilder, value: Any, low: Any, high: Any) -> Any:
    """``value`` within ``low..high``, compared so that a NaN is kept, as torch.clamp does."""
    value = builder.select(builder.fcmp_ordered("<", value, low), low, value)
    return builder.select(builder.fcmp_ordered(">", value, high), high, value)


@intrinsic
def arrive(typing, address):
    """Add one to a barrier."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, I64(1), "seq_cst")

    return types.int64(types.int64), codegen


@intrinsic
def arrived(typing, address):
    """How many have arrived at a barrier."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), codegen


if os.name == "posix":
    _yield = types.ExternalFunction("sched_yield", types.int32())
else:

    @njit(nogil=True)
    def _yield() -> int:
        return 0


@njit(nogil=True)
def wait(barrier, count):
    """Wait for the other threads; one that has lost its core for a while is waited for politely."""
    spins = 0
    while arrived(barrier) < count:
        spins += 1
        if spins > 4000:
            _yield()
