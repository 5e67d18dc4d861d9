"""The row range `minmax`: from the smallest to the largest value, as FBGEMM finds them.

For a row x of `dim` floats and `bits` of 8, 4 or 2, with half(v) = v rounded to fp16, nearest even:

    bias  = half(min x)
    scale = half((max x - bias) / (2**bits - 1)),   1 where max x == bias, and 1 where that rounds to zero

all in fp32. The source is `FloatToFusedNBitRowwiseQuantizedSBHalf` of FBGEMM 1.8. What follows:

- A constant row whose value is an fp16 number, and so a zero row, has scale 1 and codes 0: it is exact.
- Any other constant row has a non-zero distance to its rounded bias, which becomes the top code. Where the bias was
  rounded up beyond the maximum, that distance and the scale are negative; the formula holds all the same.
- A value below a bias that was rounded up, in a row that reaches above it, gets code 0.
- Rows whose scale rounds to zero (a range up to 2**-25 * (2**bits - 1)) get scale 1: every value becomes the bias.
- Scales in the subnormal range of fp16 (below 6.1e-5) carry fewer bits, so codes saturate: such rows lose accuracy.
- fp16 overflow: where the minimum is below -65520 or above 65520, or the range exceeds 65520 * (2**bits - 1), bias or
  scale becomes infinite, all codes are 0, and the row restores as NaN or infinity. `first_overflow` finds such rows.
- The sign of a zero bias is the one that FBGEMM's scan in eight lanes leaves; it never shows in a restored value.
"""

from __future__ import annotations

import numpy as np

from lowprec.ops.reference.arithmetic import Floats, half

__all__ = ["minmax_range"]

_LANES = 8


def minmax_range(rows: Floats, bits: int) -> tuple[Floats, Floats]:
    """Scale and bias, float32[n] each and all fp16 numbers, of finite float32[n, dim]."""
    # Overflow to infinity is part of the definition.
    with np.errstate(over="ignore"):
        bias = half(_row_min(rows))
        width = rows.max(axis=1) - bias
        scale = half(np.where(width == 0, np.float32(1), width / np.float32(2**bits - 1)))
    return np.where(scale == 0, np.float32(1), scale), bias


def _row_min(rows: Floats) -> Floats:
    """Row minima with the zero that FBGEMM finds: the newest of a lane, then the first lane, then the tail."""
    largest = np.finfo(np.float32).max
    num_rows, dim = rows.shape
    whole = dim // _LANES * _LANES
    lanes = np.full((num_rows, _LANES), largest, np.float32)
    for start in range(0, whole, _LANES):
        block = rows[:, start : start + _LANES]
        lanes = np.where(lanes < block, lanes, block)
    smallest = np.full(num_rows, largest, np.float32)
    for column in [*lanes.T, *rows[:, whole:].T]:
        smallest = np.where(column < smallest, column, smallest)
    return smallest
