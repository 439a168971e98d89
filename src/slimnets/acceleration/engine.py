"""The compiled interpreter: runs a table of steps over one arena, in one call from Python.

Between its steps no Python runs, so a network of twenty sparse layers costs one call, and threads
meet at a barrier instead of at a queue. Activations lie as (channel, row, column, sample), the
samples innermost; addresses are bytes, everything else counts floats.
"""

# mypy: ignore-errors
# Numba gives these functions their types

from pathlib import Path
from typing import Any
from zlib import crc32

from numba import njit

from slimnets.acceleration import accumulate, codes, dense_tile, glue, halve, memory, tile
from slimnets.acceleration.accumulate import FIRST, LAST
from slimnets.acceleration.dense_tile import dense_kernel
from slimnets.acceleration.glue import border, elementwise, phase, pool
from slimnets.acceleration.memory import arrive, load, load_int, wait
from slimnets.acceleration.tile import tile_kernel


@njit(nogil=True)
def first_row(rows, share, shares):
    """Where a share of the rows of a block begins, as :func:`layout.block` has sorted them."""
    return (rows * share + shares - 1) // shares


def _convolution(rows: int, width: int) -> Any:
    size = rows * width
    add_up = tile_kernel(rows, width, unroll=4 if size <= 8 else 2 if size <= 16 else 1)

    @njit(nogil=True)
    def convolve(op, lo, hi, arena, scratch, tile0, tile1, share, shares):
        vals, offs = op[codes.VALUES], op[codes.OFFSETS]
        pointers, order = op[codes.POINTERS], op[codes.ROWS]
        blocks, channels = op[codes.BLOCKS], op[codes.OUTPUTS]
        xs, ys, tiles = op[codes.X_STEP], op[codes.Y_STEP], op[codes.STARTS]
        bias, residual = op[codes.BIAS], op[codes.RESIDUAL]
        mask, plane = op[codes.MASK], op[codes.OUT_PLANE]
        row0, row1 = first_row(channels, share, shares), first_row(channels, share + 1, shares)
        for t in range(tile0, tile1):
            x_at = arena + 4 * (op[codes.SOURCE] + load_int(tiles, 2 * t))
            start = load_int(tiles, 2 * t + 1)
            y_at = arena + 4 * (op[codes.TARGET] + start)
            r_at = arena + 4 * (residual + start)
            m_at = 0 if mask == 0 else mask + 4 * start
            for block in range(blocks):
                flags = (FIRST if block == 0 else 0) | (LAST if block == blocks - 1 else 0)
                for at in range(block * channels + row0, block * channels + row1):
                    channel = load_int(order, at)
                    add_up(
                        vals,
                        offs,
                        load_int(pointers, at),
                        load_int(pointers, at + 1),
                        x_at,
                        xs,
                        flags,
                        load(bias, channel),
                        0 if residual < 0 else r_at + 4 * channel * plane,
                        scratch + 4 * channel * size,
                        y_at + 4 * channel * plane,
                        ys,
                        m_at,
                        lo,
                        hi,
                    )

    return convolve


def _one_of(convolutions: Any) -> Any:
    """A function that calls the convolution of this number; there are at most ten."""
    last = convolutions[-1]
    c0, c1, c2, c3, c4, c5, c6, c7, c8, _ = [*convolutions, *[last] * (10 - len(convolutions))]

    # not nested: what is inlined into each other is compiled again at each level
    @njit(nogil=True)
    def convolve(kind, op, lo, hi, arena, scratch, tile0, tile1, share, shares):
        if kind == 0:
            c0(op, lo, hi, arena, scratch, tile0, tile1, share, shares)
        elif kind == 1:
            c1(op, lo, hi, arena, scratch, tile0, tile1, share, shares)
        elif kind == 2:
            c2(op, lo, hi, arena, scratch, tile0, tile1, share, shares)
        elif kind == 3:
            c3(op, lo, hi, arena, scratch, tile0, tile1, share, shares)
        elif kind == 4:
            c4(op, lo, hi, arena, scratch, tile0, tile1, share, shares)
        elif kind == 5:
            c5(op, lo, hi, arena, scratch, tile0, tile1, share, shares)
        elif kind == 6:
            c6(op, lo, hi, arena, scratch, tile0, tile1, share, shares)
        elif kind == 7:
            c7(op, lo, hi, arena, scratch, tile0, tile1, share, shares)
        elif kind == 8:
            c8(op, lo, hi, arena, scratch, tile0, tile1, share, shares)
        else:
            last(op, lo, hi, arena, scratch, tile0, tile1, share, shares)

    return convolve


def _dense_convolution(together: int, rows: int, width: int) -> Any:
    size = together * rows * width
    add_up = dense_kernel(together, rows, width)

    @njit(nogil=True)
    def convolve(op, lo, hi, arena, scratch, tile0, tile1, share, shares):
        vals, offs = op[codes.VALUES], op[codes.OFFSETS]
        pointers, firsts = op[codes.POINTERS], op[codes.FIRSTS]
        blocks, groups = op[codes.BLOCKS], op[codes.GROUPS]
        xs, ys, tiles = op[codes.X_STEP], op[codes.Y_STEP], op[codes.STARTS]
        bias, residual = op[codes.BIAS], op[codes.RESIDUAL]
        plane, at_once = op[codes.OUT_PLANE], op[codes.AT_ONCE]
        last, columns = groups * (share + 1) // shares, load_int(pointers, blocks)
        for g0 in range(groups * share // shares, last, at_once):
            for block in range(blocks):
                flags = (FIRST if block == 0 else 0) | (LAST if block == blocks - 1 else 0)
                k, end = load_int(pointers, block), load_int(pointers, block + 1)
                for t in range(tile0, tile1):
                    start = load_int(tiles, 2 * t + 1)
                    for g in range(g0, min(g0 + at_once, last)):
                        channel = load_int(firsts, g)
                        y = 4 * (start + channel * plane)
                        add_up(
                            vals + 4 * together * (g * columns + k),
                            offs + 4 * k,
                            end - k,
                            arena + 4 * (op[codes.SOURCE] + load_int(tiles, 2 * t)),
                            xs,
                            flags,
                            bias + 4 * channel,
                            0 if residual < 0 else arena + 4 * residual + y,
                            scratch + 4 * size * (t * at_once + g - g0),
                            arena + 4 * op[codes.TARGET] + y,
                            ys,
                            plane,
                            lo,
                            hi,
                        )

    return convolve


_sparse = _one_of([_convolution(*kind) for kind in codes.KINDS])
_dense = _one_of([_dense_convolution(*kind) for kind in codes.DENSE_KINDS])


@njit(nogil=True)
def conv(op, lo, hi, arena, scratch, thread, threads):
    """A convolution; threads share its tiles, or its output channels if tiles are few."""
    tiles, kind = op[codes.TILES], op[codes.TILE]
    tile0, tile1, share, shares = 0, tiles, thread, threads
    if tiles % threads == 0 or tiles >= 8 * threads:
        tile0, tile1 = tiles * thread // threads, tiles * (thread + 1) // threads
        share, shares = 0, 1
    if op[codes.CODE] == codes.CONV:
        _sparse(kind, op, lo, hi, arena, scratch, tile0, tile1, share, shares)
    else:
        _dense(kind, op, lo, hi, arena, scratch, tile0, tile1, share, shares)


def _compiled(kernel_version: int) -> Any:
    def interpret(ops, floats, arena, scratch, io, barrier, thread, threads):
        # Numba's cache looks only at this file's time stamp: a captured number ties it to others
        if kernel_version < 0:
            return
        for i in range(ops.shape[0]):
            op = ops[i]
            scale, lo, hi = floats[i, 0], floats[i, 1], floats[i, 2]
            code = op[codes.CODE]
            if code == codes.CONV or code == codes.DENSE:
                conv(op, lo, hi, arena, scratch, thread, threads)
            elif code == codes.IMPORT or code == codes.EXPORT:
                border(op, arena, io, thread, threads)
            elif code == codes.POOL:
                pool(op, scale, lo, hi, arena, thread, threads)
            elif code == codes.PHASE:
                phase(op, arena, thread, threads)
            else:
                elementwise(op, lo, hi, arena, thread, threads)
            if threads > 1:
                arrive(barrier)
                wait(barrier, (i + 1) * threads)

    try:
        return njit(nogil=True, cache=True)(interpret)
    except RuntimeError:  # no directory that Numba may write its cache to
        return njit(nogil=True)(interpret)


_OTHERS = (accumulate, codes, dense_tile, glue, halve, memory, tile)
_SOURCES = b"".join(Path(module.__file__).read_bytes() for module in _OTHERS)

interpret = _compiled(crc32(_SOURCES + repr((codes.KINDS, codes.DENSE_KINDS, codes.WIDE)).encode()))
"""Run all steps as thread number ``thread`` of ``threads``, which share arena and barrier.

``threads`` is that of the table, or one.
"""
