"""Lookups of a quantized table, and how they change a model to first order, straight from fp32 rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowprec.ops.reference.arithmetic import Floats, fma, half
from lowprec.ops.reference.rows import codes_of, row_ranges
from lowprec.plan import RowRange

__all__ = ["pooled_as", "scores"]

_LANES = 16


def pooled_as(
    rows: Floats,
    bits: int,
    ids: NDArray[np.int64],
    offsets: NDArray[np.int64],
    *,
    mean: bool,
    weights: Floats | None = None,
    row_range: RowRange = RowRange.MINMAX,
) -> Floats:
    """float32[B, dim]: the bags of float32[n, dim] quantized to `bits` (16: fp16 values), as FBGEMM adds them up.

    From zero and in the order of the bag, a row-wise row makes of a sum
    fma(scale * weight, code, sum + bias * weight), a row of fp16 values fma(weight, value, sum). A mean multiplies by
    fp32(1 / number of ids). An empty bag is zero.
    """
    weight = np.ones(len(ids), np.float32) if weights is None else weights
    scale, bias, codes = parts_of(rows[ids], bits, row_range)
    out = np.zeros((len(offsets) - 1, rows.shape[1]), np.float32)
    for bag in range(len(out)):
        for i in range(offsets[bag], offsets[bag + 1]):
            out[bag] = fma(scale[i] * weight[i], codes[i], out[bag] + bias[i] * weight[i])
    return mean_of(out, offsets) if mean else out


def scores(
    rows: Floats,
    bits: int,
    ids: NDArray[np.int64],
    offsets: NDArray[np.int64],
    gradients: Floats,
    *,
    mean: bool,
    weights: Floats | None = None,
    row_range: RowRange = RowRange.MINMAX,
) -> Floats:
    """float32[B]: `gradients[b] . (pooled at bits - pooled fp32)`.

    A value changes by scale * code - d with d = x - bias. Both are pooled in the order of the bag, the first by
    fma(scale * weight, code, sum), the second by fma(weight, d, sum), and what they differ by is multiplied by g. At
    fp16 what is pooled is half(x) - x. Products with g are added in sixteen lanes, column i in lane i % 16, in the
    order of i, by fma; then lanes in halves. A mean multiplies by fp32(1 / number of ids).
    """
    weight = np.ones(len(ids), np.float32) if weights is None else weights
    x = rows[ids]
    scale, bias, codes = parts_of(x, bits, row_range)
    d = x - bias
    pooled, centred = np.zeros_like(gradients), np.zeros_like(gradients)
    for bag in range(len(gradients)):
        for i in range(offsets[bag], offsets[bag + 1]):
            if bits == 16:
                pooled[bag] = fma(weight[i], codes[i] - x[i], pooled[bag])
            else:
                pooled[bag] = fma(scale[i] * weight[i], codes[i], pooled[bag])
                centred[bag] = fma(weight[i], d[i], centred[bag])
    out = folded(in_lanes(gradients, pooled - centred))
    return mean_of(out[:, None], offsets)[:, 0] if mean else out


def parts_of(rows: Floats, bits: int, row_range: RowRange) -> tuple[Floats, Floats, Floats]:
    """Scale float32[n, 1], bias float32[n, 1] and codes float32[n, dim] of rows; for 16 bits 1, 0 and the values."""
    if bits == 16:
        one = np.ones((len(rows), 1), np.float32)
        return one, np.float32(0) * one, half(rows)
    scale, bias = row_ranges(rows, bits, row_range)
    return scale[:, None], bias[:, None], codes_of(rows, scale, bias, bits).astype(np.float32)


def mean_of(sums: Floats, offsets: NDArray[np.int64]) -> Floats:
    return sums * (np.float32(1) / np.maximum(np.diff(offsets), 1).astype(np.float32))[:, None]


def in_lanes(a: Floats, b: Floats) -> Floats:
    """Sums of a * b over float32[n, dim] in sixteen lanes, float32[n, 16]."""
    num_rows, dim = a.shape
    surplus = ((0, 0), (0, -dim % _LANES))
    blocks = [np.pad(v, surplus).reshape(num_rows, -1, _LANES) for v in (a, b)]
    lanes = np.zeros((num_rows, _LANES), np.float32)
    for k in range(blocks[0].shape[1]):
        lanes = fma(blocks[0][:, k], blocks[1][:, k], lanes)
    return lanes


def folded(lanes: Floats) -> Floats:
    """float32[n]: lanes i and i + 8 added, then 4, 2 and 1 apart."""
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]
