"""What low precision changes in the rows of a small table, in 16 bits a value, and scores from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowprec.ops.reference.arithmetic import Floats, fma
from lowprec.ops.reference.pooled import folded, in_lanes, mean_of, parts_of
from lowprec.plan import RowRange

__all__ = ["RowChanges", "row_changes", "scores_of_changes"]

_HALF_WORD, _MIDDLE, _LARGEST = np.float32(65536), np.float32(32768), np.float32(32767)
_SMALLEST = np.float32(2.0**-90)


@dataclass(frozen=True)
class RowChanges:
    """words: int32[n, dim] that hold two changes each; steps: float32[n], of the change in the upper and lower half."""

    words: NDArray[np.int32]
    upper_step: Floats
    lower_step: Floats


def row_changes(rows: Floats, upper_bits: int, lower_bits: int, *, row_range: RowRange = RowRange.MINMAX) -> RowChanges:
    """Changes of float32[n, dim] at two precisions (16: fp16 values).

    A change is fma(scale, code, -(x - bias)), half(x) - x for fp16. Its step is the largest change of the row / 32767,
    or zero below 2**-90. The lower half is the change in steps, rounded, plus 32768. The upper one is the change in
    steps less lower / 65536, rounded; with the lower half behind it, the word stands for it, in steps of step / 65536.
    """
    upper, lower = changes_of(rows, upper_bits, row_range), changes_of(rows, lower_bits, row_range)
    upper_step, lower_step = (_step(changes) for changes in (upper, lower))
    low = np.rint(_in_steps(lower, lower_step)) + _MIDDLE
    high = np.rint(_in_steps(upper, upper_step) - low / _HALF_WORD)
    words = (high.astype(np.int64) << 16 | low.astype(np.int64)).astype(np.int32)
    return RowChanges(words, upper_step / _HALF_WORD, lower_step)


def scores_of_changes(
    changes: RowChanges,
    ids: NDArray[np.int64],
    offsets: NDArray[np.int64],
    gradients: Floats,
    *,
    mean: bool,
    weights: Floats | None = None,
) -> tuple[Floats, Floats]:
    """float32[B] each, of the upper and of the lower half.

    Words and lower halves become floats and are pooled in the order of the bag by fma(step * weight, value, sum); from
    the pooled lower halves 32768 times the sum of step * weight is taken, by fma. The rest is as in `scores`.
    """
    weight = np.ones(len(ids), np.float32) if weights is None else weights
    words = changes.words[ids]
    found = []
    for values, steps, middle in (
        (words.astype(np.float32), changes.upper_step, np.float32(0)),
        ((words & 0xFFFF).astype(np.float32), changes.lower_step, _MIDDLE),
    ):
        step = steps[ids] * weight
        pooled = np.zeros_like(gradients)
        for bag in range(len(gradients)):
            all_steps = np.float32(0)
            for i in range(offsets[bag], offsets[bag + 1]):
                pooled[bag] = fma(step[i], values[i], pooled[bag])
                all_steps += step[i]
            if middle:
                pooled[bag] = fma(all_steps, -middle * np.ones_like(pooled[bag]), pooled[bag])
        score = folded(in_lanes(gradients, pooled))
        found.append(mean_of(score[:, None], offsets)[:, 0] if mean else score)
    return found[0], found[1]


def changes_of(rows: Floats, bits: int, row_range: RowRange) -> Floats:
    """Restored less fp32, float32[n, dim]."""
    scale, bias, codes = parts_of(rows, bits, row_range)
    with np.errstate(invalid="ignore"):
        return codes - rows if bits == 16 else fma(scale, codes, -(rows - bias))


def _step(changes: Floats) -> Floats:
    largest = np.abs(changes).max(axis=1)
    return np.where(largest < _SMALLEST, np.float32(0), largest / _LARGEST)


def _in_steps(changes: Floats, step: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(step[:, None] > 0, changes / step[:, None], np.float32(0))
