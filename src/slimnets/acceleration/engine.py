"""The compiled interpreter: runs a table of steps over one arena, in one call from Python.

Between its steps no Python runs, so a network of twenty sparse layers costs one call, and threads
meet at a barrier instead of at a queue. Activations lie as (channel, row, column, sample), the
samples innermost; addresses are bytes, everything else counts floats.
"""

import os
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from slimnets.acceleration import tile as tile_module
from slimnets.acceleration.tile import FIRST, LAST, tile_kernel

IMPORT, EXPORT, CONV, POOL, ADD, PHASE, COPY = range(7)

KINDS = ((1, 1), (1, 4), (1, 8), (1, 16), (1, 32), (1, 64), (2, 32), (4, 16), (8, 8), (4, 4))
"""The register tiles there are, as (rows, width): width floats in each of some rows."""


@intrinsic
def _load(typing, address, index):  # type: ignore[no-untyped-def]
    return types.float32(types.int64, types.int64), _memory(ir.FloatType(), store=False)


@intrinsic
def _store(typing, address, index, value):  # type: ignore[no-untyped-def]
    return types.void(types.int64, types.int64, types.float32), _memory(ir.FloatType(), store=True)


@intrinsic
def _load_int(typing, address, index):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(args[0], ir.IntType(32).as_pointer())
        return builder.sext(builder.load(builder.gep(pointer, [args[1]])), ir.IntType(64))

    return types.int64(types.int64, types.int64), codegen


def _memory(kind: ir.Type, store: bool) -> Any:
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = builder.gep(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])
        if not store:
            return builder.load(pointer)
        builder.store(args[2], pointer)
        return context.get_dummy_value()

    return codegen


@intrinsic
def _arrive(typing, address):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        i64 = ir.IntType(64)
        pointer = builder.inttoptr(args[0], i64.as_pointer())
        return builder.atomic_rmw("add", pointer, i64(1), "seq_cst")

    return types.int64(types.int64), codegen


@intrinsic
def _arrived(typing, address):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), codegen


if os.name == "posix":
    _yield = types.ExternalFunction("sched_yield", types.int32())
else:

    @njit(nogil=True)
    def _yield() -> int:  # type: ignore[misc]
        return 0


@njit(nogil=True)
def _wait(barrier, count):  # type: ignore[no-untyped-def]
    """Wait for the other threads; one that has lost its core for a while is waited for politely."""
    spins = 0
    while _arrived(barrier) < count:
        spins += 1
        if spins > 4000:
            _yield()


def _convolution(rows: int, width: int) -> Any:
    size = rows * width
    tile = tile_kernel(rows, width, unroll=4 if size <= 8 else 2 if size <= 16 else 1)

    @njit(nogil=True)
    def convolve(op, lo, hi, arena, scratch, tile0, tile1, row0, row_step):  # type: ignore[no-untyped-def]
        vals, offs, pointers, order = op[3], op[4], op[5], op[6]
        blocks, channels, xs, ys, tiles = op[7], op[8], op[9], op[10], op[11]
        bias, residual, mask, plane = op[14], op[15], op[16], op[17]
        share, mine = 0, 1
        if blocks > 1:  # rows come in another order in every block: a thread keeps its channels
            share, mine, row0, row_step = row0, row_step, 0, 1
        for t in range(tile0, tile1):
            x_at = arena + 4 * (op[1] + _load_int(tiles, 2 * t))
            start = _load_int(tiles, 2 * t + 1)
            y_at = arena + 4 * (op[2] + start)
            r_at = arena + 4 * (residual + start)
            m_at = 0 if mask == 0 else mask + 4 * start
            for block in range(blocks):
                flags = (FIRST if block == 0 else 0) | (LAST if block == blocks - 1 else 0)
                for at in range(block * channels + row0, (block + 1) * channels, row_step):
                    channel = _load_int(order, at)
                    if channel % mine != share:
                        continue
                    tile(
                        vals,
                        offs,
                        _load_int(pointers, at),
                        _load_int(pointers, at + 1),
                        x_at,
                        xs,
                        flags,
                        _load(bias, channel),
                        0 if residual < 0 else r_at + 4 * channel * plane,
                        scratch + 4 * channel * size,
                        y_at + 4 * channel * plane,
                        ys,
                        m_at,
                        lo,
                        hi,
                    )

    return convolve


_c0, _c1, _c2, _c3, _c4, _c5, _c6, _c7, _c8, _c9 = (_convolution(*kind) for kind in KINDS)


@njit(nogil=True)
def _conv(op, lo, hi, arena, scratch, thread, threads):  # type: ignore[no-untyped-def]
    tiles, kind = op[12], op[13]
    tile0, tile1, row0, step = 0, tiles, thread, threads
    if tiles % threads == 0 or tiles >= 8 * threads:
        tile0, tile1 = tiles * thread // threads, tiles * (thread + 1) // threads
        row0, step = 0, 1
    if kind == 0:
        _c0(op, lo, hi, arena, scratch, tile0, tile1, row0, step)
    elif kind == 1:
        _c1(op, lo, hi, arena, scratch, tile0, tile1, row0, step)
    elif kind == 2:
        _c2(op, lo, hi, arena, scratch, tile0, tile1, row0, step)
    elif kind == 3:
        _c3(op, lo, hi, arena, scratch, tile0, tile1, row0, step)
    elif kind == 4:
        _c4(op, lo, hi, arena, scratch, tile0, tile1, row0, step)
    elif kind == 5:
        _c5(op, lo, hi, arena, scratch, tile0, tile1, row0, step)
    elif kind == 6:
        _c6(op, lo, hi, arena, scratch, tile0, tile1, row0, step)
    elif kind == 7:
        _c7(op, lo, hi, arena, scratch, tile0, tile1, row0, step)
    elif kind == 8:
        _c8(op, lo, hi, arena, scratch, tile0, tile1, row0, step)
    else:
        _c9(op, lo, hi, arena, scratch, tile0, tile1, row0, step)


@njit(nogil=True)
def _transpose(src, dst, first, last, src_step, count, dst_step):  # type: ignore[no-untyped-def]
    """``dst[j * dst_step + s] = src[s * src_step + j]`` for j in first..last, s in 0..count."""
    for j0 in range(first, last, 16):
        j1 = min(j0 + 16, last)
        for s in range(count):
            for j in range(j0, j1):
                _store(dst, j * dst_step + s, _load(src, s * src_step + j))


@njit(nogil=True)
def _untranspose(src, dst, first, last, src_step, count, dst_step):  # type: ignore[no-untyped-def]
    """``dst[s * dst_step + j] = src[j * src_step + s]`` for j in first..last, s in 0..count."""
    for j0 in range(first, last, 16):
        j1 = min(j0 + 16, last)
        for s in range(count):
            for j in range(j0, j1):
                _store(dst, s * dst_step + j, _load(src, j * src_step + s))


@njit(nogil=True)
def _border(op, arena, io, thread, threads):  # type: ignore[no-untyped-def]
    """Copies a tensor (sample, channel, row, column) into the arena, or out of it."""
    channels, height, width, samples = op[3], op[4], op[5], op[6]
    plane, row, base = op[7], op[8], op[9]
    whole = channels * height * width
    outside, inside = io[op[1]], arena + 4 * (op[2] + base)
    if height * width == 1:
        first, last = channels * thread // threads, channels * (thread + 1) // threads
        if op[0] == IMPORT:
            _transpose(outside, inside, first, last, whole, samples, plane)
        else:
            _untranspose(inside, outside, first, last, plane, samples, whole)
        return
    for at in range(thread, channels * height, threads):
        out = outside + 4 * at * width
        within = inside + 4 * (at // height * plane + at % height * row)
        if op[0] == IMPORT:
            _transpose(out, within, 0, width, whole, samples, samples)
        else:
            _untranspose(within, out, 0, width, samples, samples, whole)


@njit(nogil=True)
def _combine(op, src, dst, at, step, low, high):  # type: ignore[no-untyped-def]
    """Takes one tap of a pooling window into the outputs ``low..high`` of one row."""
    samples = op[4]
    if samples == 1:
        if op[23] == 1:
            for o in range(low, high):
                value, best = _load(src, o * step + at), _load(dst, o)
                _store(dst, o, value if value > best or value != value else best)
        else:
            for o in range(low, high):
                _store(dst, o, _load(dst, o) + _load(src, o * step + at))
        return
    for o in range(low, high):
        for s in range(samples):
            value = _load(src, (o * step + at) * samples + s)
            best = _load(dst, o * samples + s)
            if op[23] == 1:
                best = value if value > best or value != value else best
            else:
                best += value
            _store(dst, o * samples + s, best)


@njit(nogil=True)
def _pool(op, scale, lo, hi, arena, thread, threads):  # type: ignore[no-untyped-def]
    channels, n, height, width = op[3], op[4], op[5], op[6]
    in_row, in_plane, out_h, out_w = op[7], op[9], op[10], op[11]
    out_row, out_plane = op[12], op[14]
    sh, sw = op[17], op[18]
    for at in range(thread, channels * out_h, threads):
        c, o = at // out_h, at % out_h
        src = arena + 4 * (op[1] + op[8] + c * in_plane)
        dst = arena + 4 * (op[2] + op[13] + c * out_plane + o * out_row)
        start = np.float32(-np.inf) if op[23] == 1 else np.float32(0)
        for i in range(out_w * n):
            _store(dst, i, start)
        for ky in range(op[15]):
            h = o * sh - op[19] + ky * op[21]
            if h < 0 or h >= height:
                continue
            for kx in range(op[16]):
                shift = kx * op[22] - op[20]
                low = 0 if shift >= 0 else (-shift + sw - 1) // sw
                high = min(out_w, (width - 1 - shift) // sw + 1)
                _combine(op, src + 4 * h * in_row, dst, shift, sw, low, high)
        for i in range(out_w * n):
            value = _load(dst, i) * scale
            value = lo if value < lo else value
            _store(dst, i, hi if value > hi else value)


@njit(nogil=True)
def _phase(op, arena, thread, threads):  # type: ignore[no-untyped-def]
    """Gathers every sh-th row and sw-th column, so that a strided convolution has stride one."""
    channels, n, height, width = op[3], op[4], op[5], op[6]
    in_row, base, in_plane, out_row, out_plane = op[7], op[8], op[9], op[10], op[11]
    sh, sw, top, left, rows, columns = op[12], op[13], op[14], op[15], op[16], op[17]
    first = 0 if left >= 0 else (-left + sw - 1) // sw
    last = min(columns, (width - 1 - left) // sw + 1)
    for at in range(thread, channels * rows, threads):
        c, i = at // rows, at % rows
        h = i * sh + top
        if h < 0 or h >= height:
            continue
        src = arena + 4 * (op[1] + base + c * in_plane + h * in_row)
        dst = arena + 4 * (op[2] + c * out_plane + i * out_row)
        if n == 1:
            for j in range(first, last):
                _store(dst, j, _load(src, j * sw + left))
        else:
            for j in range(first, last):
                for s in range(n):
                    _store(dst, j * n + s, _load(src, (j * sw + left) * n + s))


@njit(nogil=True)
def _elementwise(op, lo, hi, arena, thread, threads):  # type: ignore[no-untyped-def]
    count = op[4]
    first, last = count * thread // threads, count * (thread + 1) // threads
    a, b, y = arena + 4 * op[1], arena + 4 * op[3], arena + 4 * op[2]
    add = op[0] == ADD
    for i in range(first, last):
        value = _load(a, i)
        if add:
            value += _load(b, i)
        value = lo if value < lo else value
        _store(y, i, hi if value > hi else value)


def _compiled(kernel_version: int) -> Any:
    def interpret(ops, floats, arena, scratch, io, barrier, thread, threads):  # type: ignore[no-untyped-def]
        # Numba's cache looks only at this file's time stamp: a captured number ties it to tile.py
        if kernel_version < 0:
            return
        for i in range(ops.shape[0]):
            op = ops[i]
            scale, lo, hi = floats[i, 0], floats[i, 1], floats[i, 2]
            if op[0] == CONV:
                _conv(op, lo, hi, arena, scratch, thread, threads)
            elif op[0] == IMPORT or op[0] == EXPORT:
                _border(op, arena, io, thread, threads)
            elif op[0] == POOL:
                _pool(op, scale, lo, hi, arena, thread, threads)
            elif op[0] == PHASE:
                _phase(op, arena, thread, threads)
            else:
                _elementwise(op, lo, hi, arena, thread, threads)
            if threads > 1:
                _arrive(barrier)
                _wait(barrier, (i + 1) * threads)

    try:
        return njit(nogil=True, cache=True)(interpret)
    except RuntimeError:  # no directory that Numba may write its cache to
        return njit(nogil=True)(interpret)


interpret = _compiled(crc32(Path(tile_module.__file__).read_bytes()))
"""Run all steps as thread number ``thread`` of ``threads``, which share arena and barrier."""
