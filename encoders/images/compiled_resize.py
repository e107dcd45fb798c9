"""This resize gives the same bits as Pillow's and is several times as fast. It needs numba.

Pillow weighs the pixels under a filter with integers of 22 bits, first along the first axis and then along the second, and rounds to
0..255 after each axis. This module does the same for many rows or columns at a time, but never makes the padding and the cut-off parts.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

# Shapes: H, W = rows and columns of the source, h, w = rows and columns of the result, N, n = length of an axis before and after,
# K = largest number of pixels under a filter, L = bytes (lanes) that have the same weights. A pixel is a uint32: Pillow's four bytes
# for RGB.

BITS = 22
BLOCK = 64  # number of rows that are turned into columns at a time, so that the bytes of a lane are neighbours in memory
FILTERS = {"bilinear": (0, 1.0), "bicubic": (1, 2.0), "lanczos": (2, 3.0)}  # code, reach in pixels

# Functions are compiled for these types when this module is imported, once per machine. Sources may be read-only.
PIXELS = types.Array(types.uint32, 2, "C", readonly=True)
LANES = types.Array(types.uint8, 2, "C", readonly=True)
VECTOR, TABLE = types.int32[::1], types.int32[:, ::1]
WEIGHTS = types.Tuple([VECTOR, VECTOR, TABLE, VECTOR])
compiled: Any = partial(njit, cache=True, nogil=True)


@compiled(types.float64(types.float64))
def _sinc(x: float) -> float:
    return 1.0 if x == 0 else math.sin(math.pi * x) / (math.pi * x)


@compiled(types.float64(types.int64, types.float64))
def _filter(code: int, x: float) -> float:
    x = abs(x)
    if code == 0:
        return max(1 - x, 0.0)
    if code == 2:
        return _sinc(x) * _sinc(x / 3) if x < 3 else 0.0
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


@compiled(WEIGHTS(*[types.int64] * 7, types.float64))
def weigh(length: int, before: int, padded: int, scaled: int, start: int, count: int, code: int, reach: float) -> Any:
    """Return the weights of `count` outputs from `start` on, for an axis of `padded` pixels that is resized to `scaled`.

    Only the `length` pixels after the first `before` pixels exist; all others have the background colour.

    Returns:
        first [n]: the first source pixel of each output. taps [n]: the number of its source pixels. weights [n, K]: their weights.
        background [n]: the weight of the background.
    """
    scale = padded / scaled
    stretch = max(scale, 1.0)
    reach *= stretch
    most = 2 * math.ceil(reach) + 1
    exact = np.empty(most)
    first, taps = np.empty(count, np.int32), np.empty(count, np.int32)  # [n]
    weights, background = np.zeros((count, min(most, length)), np.int32), np.zeros(count, np.int32)  # [n, K], [n]
    for i in range(count):
        centre = (start + i + 0.5) * scale
        low, high = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), padded)
        for k in range(high - low):
            exact[k] = _filter(code, (low + k - centre + 0.5) * (1.0 / stretch))
        total = 0.0
        for k in range(high - low):
            total += exact[k]
        first[i] = min(max(low - before, 0), length)
        taps[i] = max(min(high - before, length) - first[i], 0)
        for k in range(high - low):
            value = exact[k] / total * (1 << BITS)
            whole = int(value - 0.5) if value < 0 else int(value + 0.5)
            place = low + k - before - first[i]
            if 0 <= place < taps[i]:
                weights[i, place] = whole
            else:
                background[i] += whole
    return first, taps, weights, background


@compiled(types.void(LANES, types.int64, WEIGHTS, VECTOR, VECTOR, types.uint8[::1]), forceinline=True)
def _gather(lanes: Any, i: int, weights: Any, colour: Any, sums: Any, out: Any) -> None:
    """Compute output `i` of every lane: lanes [N, L] -> out [L]. `sums` [L] is working memory, and `colour` [4] is the background."""
    first, taps, factors, background = weights
    for lane in range(sums.shape[0]):
        sums[lane] = 1 << (BITS - 1)
    if background[i]:
        for lane in range(sums.shape[0]):
            sums[lane] += background[i] * colour[lane & 3]
    for k in range(0, taps[i] - 1, 2):  # two at a time halves the memory traffic of the sums
        factor, next_factor, row, next_row = factors[i, k], factors[i, k + 1], lanes[first[i] + k], lanes[first[i] + k + 1]
        for lane in range(sums.shape[0]):
            sums[lane] = np.int32(sums[lane] + np.int32(np.int32(row[lane]) * factor) + np.int32(np.int32(next_row[lane]) * next_factor))
    if taps[i] % 2:
        factor, row = factors[i, taps[i] - 1], lanes[first[i] + taps[i] - 1]
        for lane in range(sums.shape[0]):
            sums[lane] = np.int32(sums[lane] + np.int32(np.int32(row[lane]) * factor))
    for lane in range(sums.shape[0]):
        out[lane] = np.uint8(min(max(sums[lane] >> BITS, np.int32(0)), np.int32(255)))


@compiled(types.void(PIXELS, types.uint32[:, ::1]))
def _turn(source: Any, out: Any) -> None:
    """Set out[x, y] = source[y, x] where both exist. The loop takes 16 rows at a time, so that writes go to neighbouring places."""
    height, width = min(source.shape[0], out.shape[1]), min(source.shape[1], out.shape[0])
    whole = height // 16 * 16
    for top in range(0, whole, 16):
        for x in range(width):
            for y in range(16):
                out[x, top + y] = source[top + y, x]
    for x in range(width):
        for y in range(whole, height):
            out[x, y] = source[y, x]


@compiled(types.void(PIXELS, WEIGHTS, VECTOR, types.uint32[:, ::1]))
def resize_columns(source: Any, weights: Any, colour: Any, out: Any) -> None:
    """Resize the height: [H, W] -> [h, W]."""
    lanes, out_lanes = source.view(np.uint8), out.view(np.uint8)  # [H, L], [h, L]
    sums = np.empty(lanes.shape[1], np.int32)  # [L]
    for i in range(out.shape[0]):
        _gather(lanes, i, weights, colour, sums, out_lanes[i])


@compiled(types.void(PIXELS, WEIGHTS, VECTOR, types.uint32[:, ::1]))
def resize_rows(source: Any, weights: Any, colour: Any, out: Any) -> None:
    """Resize the width: [H, W] -> [H, w]."""
    turned, turned_out = np.zeros((source.shape[1], BLOCK), np.uint32), np.empty((out.shape[1], BLOCK), np.uint32)
    lanes, out_lanes = turned.view(np.uint8), turned_out.view(np.uint8)  # [W, L], [w, L]
    sums = np.empty(4 * BLOCK, np.int32)  # [L]
    for top in range(0, source.shape[0], BLOCK):
        _turn(source[top : top + BLOCK], turned)
        for i in range(out.shape[1]):
            _gather(lanes, i, weights, colour, sums, out_lanes[i])
        _turn(turned_out, out[top : top + BLOCK])


@compiled(types.uint8[:, :, ::1](PIXELS))
def planes(pixels: Any) -> NDArray[np.uint8]:
    """Return the red, green and blue bytes of the pixels: [h, w] -> [3, h, w]."""
    height, width = pixels.shape
    lanes, out = pixels.view(np.uint8), np.empty((3, height, width), np.uint8)  # [h, L]
    for channel in range(3):
        for y in range(height):
            for x in range(width):
                out[channel, y, x] = lanes[y, 4 * x + channel]
    return out
