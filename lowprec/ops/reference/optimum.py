"""The least squared error of a row over all ranges: a lower bound for the range `mse`.

Branch and bound over all pairs (scale, bias) of fp16 numbers. In a box around (s, b) that reaches hs and hb to either
side, x is at least

    |x - (b + s * code)| - hb - hs * (code + 1)

away from every level of every pair, where `code` is the nearest one at the centre: the code beside it is no nearer, and
further ones move away by s a step and come back by hs only. Slow: for tests and benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["least_squared_error"]

Doubles = NDArray[np.float64]
# Pairs by their places among all finite fp16 numbers: int32[n, 4] with the first and last scale, first and last bias.
Boxes = NDArray[np.int32]

_MAGNITUDES = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
_HALVES = np.concatenate([-_MAGNITUDES[:0:-1], _MAGNITUDES])
_ZERO = len(_MAGNITUDES) - 1
_CHUNK = 4096


def least_squared_error(row: NDArray[np.float32], bits: int, *, reached: float, tolerance: float = 0.01) -> float:
    """A proven lower bound of the row's squared error at `bits`, whatever its fp16 scale (not zero) and bias.

    row: finite float32[dim]. `reached` is the error of some range. The bound is (1 - `tolerance`) times the least error
    that the search met, `reached` included.
    """
    x, top = row.astype(np.float64), 2**bits - 1
    last = len(_HALVES) - 1
    boxes = np.array([[0, _ZERO - 1, 0, last], [_ZERO + 1, last, 0, last]], np.int32)
    while len(boxes):
        reached = min(reached, _each(_error_at_centre, boxes, x, top).min())
        boxes = boxes[(boxes[:, 0] < boxes[:, 1]) | (boxes[:, 2] < boxes[:, 3])]
        halves = _halved(boxes, top)
        boxes = halves[_each(_bound, halves, x, top) < reached * (1 - tolerance)]
    return float(reached * (1 - tolerance))


def _each(of: Callable[[Boxes, Doubles, int], Doubles], boxes: Boxes, x: Doubles, top: int) -> Doubles:
    """float64[n], some boxes at a time."""
    parts = [of(boxes[i : i + _CHUNK], x, top) for i in range(0, len(boxes), _CHUNK)]
    return np.concatenate([np.empty(0), *parts])


def _error_at_centre(boxes: Boxes, x: Doubles, top: int) -> Doubles:
    scale, bias = (_HALVES[(boxes[:, i] + boxes[:, i + 1]) // 2][:, None] for i in (0, 2))
    error: Doubles = np.square(x - bias - scale * _nearest(x, scale, bias, top)).sum(axis=1)
    return error


def _bound(boxes: Boxes, x: Doubles, top: int) -> Doubles:
    """No pair of a box has a squared error below."""
    ends = _HALVES[boxes]
    scale, bias = ((ends[:, i] + ends[:, i + 1])[:, None] / 2 for i in (0, 2))
    scale_reach, bias_reach = ((ends[:, i + 1] - ends[:, i])[:, None] / 2 for i in (0, 2))
    code = _nearest(x, scale, bias, top)
    apart = np.abs(x - bias - scale * code) - bias_reach - scale_reach * (code + 1)
    bound: Doubles = np.square(np.maximum(apart, 0)).sum(axis=1)
    return bound


def _nearest(x: Doubles, scale: Doubles, bias: Doubles, top: int) -> Doubles:
    return np.rint(np.clip((x - bias) / scale, 0, top))


def _halved(boxes: Boxes, top: int) -> Boxes:
    """Both halves of each box, cut where its levels reach further."""
    ends = _HALVES[boxes]
    scale_reach, bias_reach = (ends[:, 1] - ends[:, 0]) * top / 2, ends[:, 3] - ends[:, 2]
    is_flat = boxes[:, 2] == boxes[:, 3]
    cut_scale = (boxes[:, 0] < boxes[:, 1]) & ((scale_reach > bias_reach) | is_flat)
    lower, upper = boxes.copy(), boxes.copy()
    for cut, first in ((cut_scale, 0), (~cut_scale, 2)):
        middle = (boxes[cut, first] + boxes[cut, first + 1]) // 2
        lower[cut, first + 1], upper[cut, first] = middle, middle + 1
    return np.concatenate([lower, upper])
