"""Clipping ranges of int8 layers: of weights, and of inputs from a histogram."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowprec.plan.layer_form import ClipRange

__all__ = ["PERCENTILE", "input_bounds", "input_code", "input_error", "weight_bound"]

PERCENTILE = 0.999
"""The share of values within the range `percentile`; of inputs half of the rest lies at each end."""
# Ranges that `mse` tries, as shares of that of all values.
_SHARES = np.linspace(0.25, 1.0, 76, dtype=np.float64)
_WEIGHT_CODES = 127


def weight_bound(values: NDArray[np.float32], clip: ClipRange) -> NDArray[np.float32]:
    """The largest magnitude that codes of each row reach: float32[n, 1] of values float32[n, k]."""
    size = np.abs(values)
    largest: NDArray[np.float32] = size.max(axis=1, keepdims=True)
    if clip is ClipRange.MINMAX:
        return largest
    if clip is ClipRange.PERCENTILE:
        found: NDArray[np.float32] = np.quantile(size, PERCENTILE, axis=1, keepdims=True, method="higher")
        return found.astype(np.float32)
    best, least = largest, np.full(largest.shape, np.inf)
    for share in _SHARES[::-1]:
        bound = (largest * share).astype(np.float32)
        step = np.where(bound > 0, bound / _WEIGHT_CODES, 1)
        restored = np.clip(np.rint(values / step), -_WEIGHT_CODES, _WEIGHT_CODES) * step
        error = np.square(restored - values, dtype=np.float64).sum(axis=1, keepdims=True)
        best, least = np.where(error < least, bound, best), np.minimum(error, least)
    return best


def input_bounds(
    edges: NDArray[np.float64], counts: NDArray[np.int64], clip: ClipRange, bits: int
) -> tuple[float, float]:
    """The range of inputs from a histogram: counts int64[n] between edges float64[n + 1]; it always holds 0.

    The outermost edges are the least and the greatest value.
    """
    lower, upper = float(min(edges[0], 0.0)), float(max(edges[-1], 0.0))
    total = int(counts.sum())
    if clip is ClipRange.MINMAX or total == 0:
        return lower, upper
    if clip is ClipRange.PERCENTILE:
        below = np.concatenate([[0.0], np.cumsum(counts)]) / total
        ends = np.interp([(1 - PERCENTILE) / 2, (1 + PERCENTILE) / 2], below, edges)
        return float(min(ends[0], 0.0)), float(max(ends[1], 0.0))
    centres, best, least = (edges[1:] + edges[:-1]) / 2, (lower, upper), np.inf
    # First both ends together, then each by itself around what was best.
    for shares in (
        [(s, s) for s in _SHARES[::-1]],
        [(s, 1.0) for s in _SHARES[::-1]],
        [(1.0, s) for s in _SHARES[::-1]],
    ):
        low, high = best
        for a, b in shares:
            error = _squared_error(centres, counts, *input_code(low * a, high * b, bits), bits)
            if error < least:
                best, least = (low * a, high * b), error
    return best


def input_code(lower: float, upper: float, bits: int) -> tuple[float, int]:
    """Scale and zero point of codes from 0 to 2^bits - 1 that reach from `lower` to `upper`; 0 has a code of its own.

    As PyTorch's observers choose them.
    """
    top = 2**bits - 1
    scale = np.float32(max((upper - lower) / top, float(np.finfo(np.float32).eps)))
    zero_point = int(np.clip(-np.rint(np.float32(lower) / scale), 0, top))
    return float(scale), zero_point


def input_error(
    edges: NDArray[np.float64], counts: NDArray[np.int64], scale: float, zero_point: int, bits: int
) -> float:
    """The squared error of codes, summed over inputs whose histogram is given as for `input_bounds`."""
    return _squared_error((edges[1:] + edges[:-1]) / 2, counts, scale, zero_point, bits)


def _squared_error(
    centres: NDArray[np.float64], counts: NDArray[np.int64], scale: float, zero_point: int, bits: int
) -> float:
    codes = np.clip(np.rint(centres / scale) + zero_point, 0, 2**bits - 1)
    return float((counts * np.square((codes - zero_point) * scale - centres)).sum())
