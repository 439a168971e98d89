"""Memory and barriers for compiled code: addresses are bytes, indices count elements."""

# mypy: ignore-errors
# Numba gives these functions their types

import os
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic


@intrinsic
def load(typing, address, index):
    """The float number ``index`` at ``address``."""
    return types.float32(types.int64, types.int64), _memory(ir.FloatType(), store=False)


@intrinsic
def store(typing, address, index, value):
    """Write the float number ``index`` at ``address``."""
    return types.void(types.int64, types.int64, types.float32), _memory(ir.FloatType(), store=True)


@intrinsic
def load_int(typing, address, index):
    """The 32-bit integer number ``index`` at ``address``."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(32).as_pointer())
        return builder.sext(builder.load(builder.gep(pointer, [args[1]])), ir.IntType(64))

    return types.int64(types.int64, types.int64), codegen


def _memory(kind: ir.Type, store: bool) -> Any:
    def codegen(context, builder, signature, args):
        pointer = builder.gep(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])
        if not store:
            return builder.load(pointer)
        builder.store(args[2], pointer)
        return context.get_dummy_value()

    return codegen


@intrinsic
def arrive(typing, address):
    """Add one to a barrier."""

    def codegen(context, builder, signature, args):
        i64 = ir.IntType(64)
        pointer = builder.inttoptr(args[0], i64.as_pointer())
        return builder.atomic_rmw("add", pointer, i64(1), "seq_cst")

    return types.int64(types.int64), codegen


@intrinsic
def arrived(typing, address):
    """How many have arrived at a barrier."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
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
