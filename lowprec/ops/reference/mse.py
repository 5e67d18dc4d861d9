"""The row range `mse`: a squared error near the least, never above that of `minmax`.

For a row x it is a pair (scale, bias) of fp16 numbers with a small squared error

    sum_i (x_i - (scale * code_i + bias))**2,    code_i = clip(round_half_even((x_i - bias) * (1 / scale)), 0, top)

where top = 2**bits - 1. The error has many local minima, so the search goes from several starts, and alternates codes
and range as Lloyd's quantizer does ("Least squares quantization in PCM", 1982):

- Given (scale, bias), a step finds the codes, then the least-squares line through (code_i, x_i), rounds its bias to
  fp16, finds the best scale for that rounded bias, and rounds it to fp16. All that follows from three sums over the
  row, and so does the squared error of the new pair at those codes, which bounds its error from above.
- Starts are ranges inset from the row's minimum and maximum by a few steps. Every other start counts down from the top
  (a negative scale): where fp16 steps are coarse beside the row's range, its other end may be the one that is close to
  an fp16 number.

The two best pairs of all starts go on for a few steps; the best pair of all is measured against `minmax`, and taken
where its error is lower. A row whose `minmax` overflows fp16 (an error that is not finite) keeps it.

All arithmetic is fp32, operation by operation as written; `fma` rounds once. Sums run over the columns in their order,
each row by itself: native code has one row in each of sixteen lanes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lowprec.ops.reference.arithmetic import Floats, fma, half, half_down, half_up
from lowprec.ops.reference.ranges import minmax_range

__all__ = ["mse_range"]

_STEPS_PER_START = 2
_STEPS_OF_BEST = 2
_LARGEST_HALF = np.float32(65504)
_SMALLEST_HALF = np.float32(2**-24)
# Below this share of the sum of squared codes their variance is rounding noise: all codes are the same.
_LEAST_VARIANCE = np.float32(2**-21)


class _Insets(NamedTuple):
    """Insets of the starts on either side, in steps of the row's range / top: `first + k * pitch`, k < num."""

    num: int
    first: np.float32
    pitch: np.float32


def _insets(bits: int, dim: int) -> _Insets:
    """Tuned by hand on rows of many distributions; short rows gain from ranges wider than the row."""
    if bits == 8:
        return _Insets(2, np.float32(-0.45), np.float32(0.6))
    if bits == 2:
        return _Insets(4, np.float32(0), np.float32(0.3))
    return _Insets(4, np.float32(-0.45 if dim <= 64 else 0), np.float32(0.4))


class _Row(NamedTuple):
    """Rows moved by their centre, float32[dim, n], with the sums that steps need, float32[n]."""

    moved: Floats
    centre: Floats
    total: Floats
    squares: Floats
    top: np.float32


def mse_range(rows: Floats, bits: int) -> tuple[Floats, Floats]:
    """Scale and bias, float32[n] each and all fp16 numbers, of finite float32[n, dim]."""
    top = np.float32(2**bits - 1)
    # Rows that overflow compute with infinity and NaN, and keep minmax.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scale, bias = minmax_range(rows, bits)
        error = _squared_error(rows, scale, bias, top)
        best_scale, best_bias = _search(rows, bits)
        better = (error < np.inf) & (_squared_error(rows, best_scale, best_bias, top) < error)
    return np.where(better, best_scale, scale), np.where(better, best_bias, bias)


def _search(rows: Floats, bits: int) -> tuple[Floats, Floats]:
    """The pair of least error at its codes that the search meets."""
    insets = _insets(bits, rows.shape[1])
    low, high = rows.min(axis=1), rows.max(axis=1)
    row = _moved(rows, np.float32(0.5) * low + np.float32(0.5) * high, np.float32(2**bits - 1))
    unit = (high - low) / row.top
    starts = [
        _start(
            low,
            high,
            unit,
            insets.first + insets.pitch * np.float32(i),
            insets.first + insets.pitch * np.float32(j),
            row.top,
            from_top=(i + j) % 2 == 1,
        )
        for i in range(insets.num)
        for j in range(insets.num)
    ]
    # float32[starts, n]
    found = _descend(row, np.stack([s for s, _ in starts]), np.stack([b for _, b in starts]), _STEPS_PER_START)
    nothing = np.full(len(rows), np.inf, np.float32), np.ones(len(rows), np.float32), np.zeros(len(rows), np.float32)
    first = second = nothing
    for k in range(len(starts)):
        candidate = found[0][k], found[1][k], found[2][k]
        less = candidate[0] < first[0]
        first, candidate = _choose(less, candidate, first), _choose(less, first, candidate)
        second = _choose(candidate[0] < second[0], candidate, second)
    error, scales, biases = (np.stack([a, b]) for a, b in zip(first, second, strict=True))
    further = _descend(row, scales, biases, _STEPS_OF_BEST)
    error, scales, biases = _choose(further[0] < error, further, (error, scales, biases))
    last = error[1] < error[0]
    return np.where(last, scales[1], scales[0]), np.where(last, biases[1], biases[0])


def _start(
    low: Floats,
    high: Floats,
    unit: Floats,
    inset: np.float32,
    far_inset: np.float32,
    top: np.float32,
    *,
    from_top: bool,
) -> tuple[Floats, Floats]:
    """A range from the bias, inset and rounded outwards to fp16, to the far end, inset by shares of its own steps.

    The scale is rounded away from zero, for else the row's far end would lie outside where fp16 is coarse.
    """
    if from_top:
        bias = np.minimum(half_up(high - unit * inset), _LARGEST_HALF)
        width = low - bias
    else:
        bias = np.maximum(half_down(low + unit * inset), -_LARGEST_HALF)
        width = high - bias
    scale = (width - width * (far_inset / top)) / top
    scale = np.where(scale == 0, np.float32(1), scale)
    return np.copysign(np.minimum(half_up(np.abs(scale)), _LARGEST_HALF), scale), bias


def _descend(row: _Row, scale: Floats, bias: Floats, steps: int) -> tuple[Floats, Floats, Floats]:
    """The first pair of least error at its codes, (error, scale, bias), that `steps` steps lead to."""
    best = error, scale, bias = _step(row, scale, bias)
    for _ in range(steps - 1):
        error, scale, bias = _step(row, scale, bias)
        best = _choose(error < best[0], (error, scale, bias), best)
    return best


def _step(row: _Row, scale: Floats, bias: Floats) -> tuple[Floats, Floats, Floats]:
    """Codes of float32[k, n] pairs, then the fp16 pairs that suit those codes best, and their errors at them."""
    num = np.float32(len(row.moved))
    share = np.float32(1) / num
    inverse = np.float32(1) / scale
    shift = (row.centre - bias) * inverse
    products, codes, squares = (np.zeros_like(scale) for _ in range(3))
    for x in row.moved:
        code = np.rint(np.minimum(np.maximum(fma(x, inverse, shift), np.float32(0)), row.top))
        products = fma(x, code, products)
        codes = codes + code
        squares = squares + code * code  # the product is exact, so fused or not is the same
    mean = codes * share
    variance = squares - codes * mean
    slope = np.where(variance > squares * _LEAST_VARIANCE, (products - row.total * mean) / variance, scale)
    new_bias = half(row.centre + (row.total * share - slope * mean))
    new_bias = np.minimum(np.maximum(new_bias, -_LARGEST_HALF), _LARGEST_HALF)
    offset = new_bias - row.centre
    above = products - offset * codes
    new_scale = half(np.where(squares > 0, above / squares, slope))
    new_scale = np.where(new_scale == 0, np.copysign(_SMALLEST_HALF, scale), new_scale)
    error = row.squares + offset * (num * offset - np.float32(2) * row.total)
    error = error + new_scale * (new_scale * squares - np.float32(2) * above)
    return error, new_scale, new_bias


def _moved(rows: Floats, centre: Floats, top: np.float32) -> _Row:
    moved = np.ascontiguousarray((rows - centre[:, None]).T)
    total, squares = np.zeros_like(centre), np.zeros_like(centre)
    for x in moved:
        total = total + x
        squares = fma(x, x, squares)
    return _Row(moved, centre, total, squares, top)


def _squared_error(rows: Floats, scale: Floats, bias: Floats, top: np.float32) -> Floats:
    """What the stored row restores to against the row itself; the codes are those of `quantize_rows`."""
    inverse = np.float32(1) / scale
    error = np.zeros_like(scale)
    for x in rows.T:
        code = np.rint(np.minimum(np.maximum((x - bias) * inverse, np.float32(0)), top))
        difference = x - (scale * code + bias)
        error = fma(difference, difference, error)
    return error


def _choose(where: NDArray[np.bool_], a: tuple[Floats, ...], b: tuple[Floats, ...]) -> tuple[Floats, Floats, Floats]:
    error, scale, bias = (np.where(where, p, q) for p, q in zip(a, b, strict=True))
    return error, scale, bias
