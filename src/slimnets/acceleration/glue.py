"""What is not a convolution: borders of the arena, pooling, phases, sums."""

# mypy: ignore-errors
# Numba gives these functions their types

import numpy as np
from numba import njit

from slimnets.acceleration import codes
from slimnets.acceleration.halve import halve_kernel
from slimnets.acceleration.memory import load, store

_halve4, _halve16 = halve_kernel(4), halve_kernel(16)


@njit(nogil=True)
def _transpose(src, dst, first, last, src_step, count, dst_step):
    """``dst[j * dst_step + s] = src[s * src_step + j]`` for j in first..last, s in 0..count."""
    for j0 in range(first, last, 16):
        j1 = min(j0 + 16, last)
        for s in range(count):
            for j in range(j0, j1):
                store(dst, j * dst_step + s, load(src, s * src_step + j))


@njit(nogil=True)
def _untranspose(src, dst, first, last, src_step, count, dst_step):
    """``dst[s * dst_step + j] = src[j * src_step + s]`` for j in first..last, s in 0..count."""
    for j0 in range(first, last, 16):
        j1 = min(j0 + 16, last)
        for s in range(count):
            for j in range(j0, j1):
                store(dst, s * dst_step + j, load(src, j * src_step + s))


@njit(nogil=True)
def border(op, arena, io, thread, threads):
    """Copies a tensor (sample, channel, row, column) into the arena, or out of it."""
    channels, samples = op[codes.CHANNELS], op[codes.SAMPLES]
    height, width = op[codes.HEIGHT], op[codes.WIDTH]
    plane, row, base = op[codes.PLANE], op[codes.ROW], op[codes.BASE]
    whole = channels * height * width
    outside, inside = io[op[codes.NUMBER]], arena + 4 * (op[codes.PLACE] + base)
    if height * width == 1:
        first, last = channels * thread // threads, channels * (thread + 1) // threads
        if op[codes.CODE] == codes.IMPORT:
            _transpose(outside, inside, first, last, whole, samples, plane)
        else:
            _untranspose(inside, outside, first, last, plane, samples, whole)
        return
    for at in range(thread, channels * height, threads):
        out = outside + 4 * at * width
        within = inside + 4 * (at // height * plane + at % height * row)
        if op[codes.CODE] == codes.IMPORT:
            _transpose(out, within, 0, width, whole, samples, samples)
        else:
            _untranspose(within, out, 0, width, samples, samples, whole)


@njit(nogil=True)
def _combine(op, src, dst, at, step, low, high):
    """Takes one tap of a pooling window into the outputs ``low..high`` of one row."""
    samples = op[codes.SAMPLES]
    # all is written out: with a call in these loops, single images take 1.7 times as long
    if samples == 1:
        if op[codes.POOLING] == codes.LARGEST:
            for o in range(low, high):
                value, best = load(src, o * step + at), load(dst, o)
                store(dst, o, value if value > best or value != value else best)
        else:
            for o in range(low, high):
                store(dst, o, load(dst, o) + load(src, o * step + at))
        return
    for o in range(low, high):
        for s in range(samples):
            value = load(src, (o * step + at) * samples + s)
            best = load(dst, o * samples + s)
            if op[codes.POOLING] == codes.LARGEST:
                best = value if value > best or value != value else best
            else:
                best += value
            store(dst, o * samples + s, best)


@njit(nogil=True)
def _largest(a, b):
    return b if b > a or b != b else a  # as PyTorch's, NaN is the largest


@njit(nogil=True)
def _halve(op, lo, hi, arena, thread, threads):
    """Maximum of every 2 x 2 pixels, which is most networks' pooling, in one pass."""
    channels, n = op[codes.CHANNELS], op[codes.SAMPLES]
    out_h, out_w = op[codes.OUT_HEIGHT], op[codes.OUT_WIDTH]
    row, plane = op[codes.ROW], op[codes.PLANE]
    out_row, out_plane = op[codes.OUT_ROW], op[codes.OUT_PLANE]
    for at in range(
        channels * thread // threads * out_h, channels * (thread + 1) // threads * out_h
    ):
        c, o = at // out_h, at % out_h
        upper = arena + 4 * (op[codes.SOURCE] + op[codes.BASE] + c * plane + 2 * o * row)
        lower = upper + 4 * row
        dst = arena + 4 * (op[codes.TARGET] + op[codes.OUT_BASE] + c * out_plane + o * out_row)
        done = 0
        if n == 1:
            while done + 16 <= out_w:
                _halve16(upper + 8 * done, lower + 8 * done, dst + 4 * done, lo, hi)
                done += 16
            while done + 4 <= out_w:
                _halve4(upper + 8 * done, lower + 8 * done, dst + 4 * done, lo, hi)
                done += 4
        for i in range(done, out_w):
            for s in range(n):
                j = 2 * i * n + s
                above = _largest(load(upper, j), load(upper, j + n))
                value = _largest(above, _largest(load(lower, j), load(lower, j + n)))
                value = lo if value < lo else value
                store(dst, i * n + s, hi if value > hi else value)


@njit(nogil=True)
def _whole(op, scale, lo, hi, arena, thread, threads):
    """Maximum or scaled sum of a whole image, which may be too large for a sum of 32 bits."""
    channels, n = op[codes.CHANNELS], op[codes.SAMPLES]
    height, width = op[codes.HEIGHT], op[codes.WIDTH]
    for c in range(channels * thread // threads, channels * (thread + 1) // threads):
        src = arena + 4 * (op[codes.SOURCE] + op[codes.BASE] + c * op[codes.PLANE])
        dst = arena + 4 * (op[codes.TARGET] + op[codes.OUT_BASE] + c * op[codes.OUT_PLANE])
        for s in range(n):
            largest, total = np.float32(-np.inf), 0.0
            for h in range(height):
                for w in range(width):
                    value = load(src, h * op[codes.ROW] + w * n + s)
                    largest = _largest(largest, value)
                    total += np.float64(value)
            value = largest if op[codes.POOLING] == codes.LARGEST else np.float32(total * scale)
            value = lo if value < lo else value
            store(dst, s, hi if value > hi else value)


@njit(nogil=True)
def pool(op, scale, lo, hi, arena, thread, threads):
    """Maximum or scaled sum of windows; what lies outside the image is not looked at."""
    channels, n = op[codes.CHANNELS], op[codes.SAMPLES]
    height, width = op[codes.HEIGHT], op[codes.WIDTH]
    in_row, in_plane = op[codes.ROW], op[codes.PLANE]
    out_h, out_w = op[codes.OUT_HEIGHT], op[codes.OUT_WIDTH]
    out_row, out_plane = op[codes.OUT_ROW], op[codes.OUT_PLANE]
    sh, sw = op[codes.STRIDE_Y], op[codes.STRIDE_X]
    if op[codes.POOLING] == codes.HALVE:
        _halve(op, lo, hi, arena, thread, threads)
        return
    top, left = op[codes.PADDING_Y], op[codes.PADDING_X]
    covers = op[codes.KERNEL_Y] == height and op[codes.KERNEL_X] == width
    if covers and top == 0 and left == 0 and out_h * out_w == 1:
        _whole(op, scale, lo, hi, arena, thread, threads)
        return
    for at in range(thread, channels * out_h, threads):
        c, o = at // out_h, at % out_h
        src = arena + 4 * (op[codes.SOURCE] + op[codes.BASE] + c * in_plane)
        dst = arena + 4 * (op[codes.TARGET] + op[codes.OUT_BASE] + c * out_plane + o * out_row)
        start = np.float32(-np.inf) if op[codes.POOLING] == codes.LARGEST else np.float32(0)
        for i in range(out_w * n):
            store(dst, i, start)
        for ky in range(op[codes.KERNEL_Y]):
            h = o * sh - top + ky * op[codes.DILATION_Y]
            if h < 0 or h >= height:
                continue
            for kx in range(op[codes.KERNEL_X]):
                shift = kx * op[codes.DILATION_X] - left
                low = 0 if shift >= 0 else (-shift + sw - 1) // sw
                high = min(out_w, (width - 1 - shift) // sw + 1)
                _combine(op, src + 4 * h * in_row, dst, shift, sw, low, high)
        for i in range(out_w * n):
            value = load(dst, i) * scale
            value = lo if value < lo else value
            store(dst, i, hi if value > hi else value)


@njit(nogil=True)
def phase(op, arena, thread, threads):
    """Gathers every sh-th row and sw-th column, so that a strided convolution has stride one."""
    channels, n = op[codes.CHANNELS], op[codes.SAMPLES]
    height, width = op[codes.HEIGHT], op[codes.WIDTH]
    in_row, base, in_plane = op[codes.ROW], op[codes.BASE], op[codes.PLANE]
    out_row, out_plane = op[codes.OUT_ROW], op[codes.OUT_PLANE]
    sh, sw = op[codes.STRIDE_Y], op[codes.STRIDE_X]
    top, left = op[codes.FIRST_Y], op[codes.FIRST_X]
    rows, columns = op[codes.OUT_HEIGHT], op[codes.OUT_WIDTH]
    first = 0 if left >= 0 else (-left + sw - 1) // sw
    last = min(columns, (width - 1 - left) // sw + 1)
    for at in range(thread, channels * rows, threads):
        c, i = at // rows, at % rows
        h = i * sh + top
        if h < 0 or h >= height:
            continue
        src = arena + 4 * (op[codes.SOURCE] + base + c * in_plane + h * in_row)
        dst = arena + 4 * (op[codes.TARGET] + c * out_plane + i * out_row)
        if n == 1:
            for j in range(first, last):
                store(dst, j, load(src, j * sw + left))
        else:
            for j in range(first, last):
                for s in range(n):
                    store(dst, j * n + s, load(src, (j * sw + left) * n + s))


@njit(nogil=True)
def elementwise(op, lo, hi, arena, thread, threads):
    """A sum or a copy, clamped; margins stay zero, as zero is within every clamp."""
    count = op[codes.FLOATS]
    first, last = count * thread // threads, count * (thread + 1) // threads
    a, b = arena + 4 * op[codes.SOURCE], arena + 4 * op[codes.OTHER]
    y = arena + 4 * op[codes.TARGET]
    add = op[codes.CODE] == codes.ADD
    for i in range(first, last):
        value = load(a, i)
        if add:
            value += load(b, i)
        value = lo if value < lo else value
        store(y, i, hi if value > hi else value)
