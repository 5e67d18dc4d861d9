"""The rows of a table that hurt most, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec import ops
from lowprec.plan import Precision

__all__ = ["SeenRows", "WorstRow", "seen_rows", "worst_rows"]

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]

# A range so many times the table's median, or that would be so much smaller without its outermost value, is said to
# be the reason.
_WIDE = 3.0
_FOR_MEDIAN = 1000
_SMALLEST_NORMAL_FP16, _LARGEST_FP16 = 2.0**-14, 65504.0


@dataclass(frozen=True)
class SeenRows:
    """The rows of a table that a sample of traffic asked for.

    ids, hits: int64[n]; exact: their fp32 values float32[n, dim]; stored: uint8[n, row_bytes]; error2: float64[n], the
    squared error of each, infinite where a value is not finite.
    """

    table: str
    precision: Precision
    ids: Ids
    hits: Ids
    exact: Floats
    stored: NDArray[np.uint8]
    restored: Floats

    @cached_property
    def error2(self) -> NDArray[np.float64]:
        """The squared error of each row, infinite where it does not restore to finite values."""
        with np.errstate(invalid="ignore", over="ignore"):
            error = self.restored - self.exact
            found = np.einsum("ij,ij->i", error, error).astype(np.float64)
            # Squares may be beyond fp32 where errors are not.
            large = np.flatnonzero(~np.isfinite(found))
            found[large] = np.square(error[large].astype(np.float64)).sum(axis=1)
        return np.where(np.isfinite(found), found, np.inf)

    @property
    def num_saturated(self) -> int:
        """Values beyond the codes of their row (or beyond fp16): restored more than half a step away."""
        if self.precision is Precision.FP32:
            return 0
        if not self.precision.is_rowwise:
            return int((~np.isfinite(self.restored)).sum())
        step = _steps(self.stored)
        with np.errstate(invalid="ignore", over="ignore"):
            # fp16 bias and scale move the ends by up to a thousandth of what they stand for.
            slack = 1e-3 * np.abs(self.exact).max(axis=1, initial=0.0)
            beyond = np.abs(self.restored - self.exact) > (0.501 * step + slack)[:, None]
        return int((beyond | ~np.isfinite(self.restored)).sum())

    @property
    def num_underflowed(self) -> int:
        """Values that are lost: not zero, and restored to zero; in rows whose scale is lost, all of them."""
        if self.precision is Precision.FP32:
            return 0
        if not self.precision.is_rowwise:
            return int(((self.exact != 0) & (self.restored == 0)).sum())
        return int(_lost(self.stored, self.exact, self.restored).sum()) * int(self.exact.shape[1])


@dataclass(frozen=True)
class WorstRow:
    """A row: how often the sample asked for it, its share of the table's squared error over lookups, and why."""

    id: int
    hits: int
    share: float
    max_error: float
    why: str

    def to_dict(self) -> dict[str, Any]:
        """For documents; what is not finite is None."""
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in vars(self).items()}


def seen_rows(table: str, precision: Precision, asked: Sequence[Ids], exact: Floats, stored_of: Any) -> SeenRows:
    """The rows that were asked for.

    asked: ids of each call; exact: the whole table; stored_of: from ids int64[n] to stored rows uint8[n, row_bytes].
    """
    every = np.concatenate(asked)
    if len(exact) <= 4 * len(every):
        counts = np.bincount(every, minlength=len(exact))
        ids = np.flatnonzero(counts)
        hits = counts[ids]
    else:
        ids, hits = np.unique(every, return_counts=True)
    stored = stored_of(ids)
    with np.errstate(invalid="ignore"):  # corrupted rows may hold any NaN
        restored = ops.dequantize(stored, precision, exact.shape[1])
    return SeenRows(table, precision, ids, hits.astype(np.int64), np.ascontiguousarray(exact[ids]), stored, restored)


def worst_rows(rows: SeenRows, count: int) -> list[WorstRow]:
    """Those with the largest squared error over all lookups; none where rows are exact."""
    weighed = rows.hits * rows.error2
    total = weighed[np.isfinite(weighed)].sum()
    candidates = np.argpartition(-weighed, count)[:count] if len(weighed) > count else np.arange(len(weighed))
    order = [int(k) for k in sorted(candidates, key=lambda k: (-weighed[k], k)) if weighed[k] > 0]
    if not order:
        return []
    with np.errstate(invalid="ignore", over="ignore"):
        largest = np.abs(rows.restored[order] - rows.exact[order]).max(axis=1)
    some = rows.exact[:: max(1, len(rows.exact) // _FOR_MEDIAN)]
    median = float(np.median(some.max(axis=1) - some.min(axis=1)))
    return [
        WorstRow(
            id=int(rows.ids[k]),
            hits=int(rows.hits[k]),
            share=float(weighed[k] / total) if np.isfinite(weighed[k]) else 1.0,
            max_error=float(error),
            why=_why(rows, k, median),
        )
        for k, error in zip(order, largest, strict=True)
    ]


def _why(rows: SeenRows, k: int, median_range: float) -> str:
    """Why a row is restored badly, in a few words."""
    values, precision = rows.exact[k], rows.precision
    lowest, highest = float(values.min()), float(values.max())
    if not np.isfinite(rows.restored[k]).all():
        if max(-lowest, highest) <= _LARGEST_FP16:
            return f"what is stored of it is not finite, though it spans only {lowest:g} to {highest:g}"
        return f"spans {lowest:g} to {highest:g}, which overflows the fp16 parts of {precision}"
    if precision is Precision.FP32:
        return "other values are stored"
    if not precision.is_rowwise:
        lost = ((rows.restored[k] == 0) & (values != 0)).any()
        return "values below the smallest fp16 numbers" if lost else f"rounding to {precision}"
    step = float(_steps(rows.stored[k : k + 1])[0])
    span = highest - lowest
    if span == 0:
        return "constant row: what is lost is the rounding of its value to fp16"
    if _lost(rows.stored[k : k + 1], rows.exact[k : k + 1], rows.restored[k : k + 1])[0]:
        return f"spans {span:g}, so little that its fp16 scale underflows to zero"
    if step < _SMALLEST_NORMAL_FP16:
        return f"spans {span:g}, so little that its fp16 scale has few digits left"
    # The value furthest from the median is the first or the last in order.
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    is_low = float(ordered[len(ordered) // 2]) - lowest > highest - float(ordered[(len(ordered) - 1) // 2])
    outlier = int(order[0 if is_low else -1])
    rest = float(ordered[-1] - ordered[1] if is_low else ordered[-2] - ordered[0]) if len(values) > 1 else span
    if rest * _WIDE < span:
        return f"value {outlier} is {values[outlier]:g}; without it the row would span {rest:g} and not {span:g}"
    if median_range * _WIDE < span:
        return f"spans {span:g}, {span / median_range:.1f} times the median row" if median_range else f"spans {span:g}"
    return f"rounding to {precision}: spans {span:g}, as other rows do"


def _steps(stored: NDArray[np.uint8]) -> Floats:
    """Between two codes; a scale may be negative, and then codes fall where values rise."""
    return np.abs(np.ascontiguousarray(stored[:, :2]).view(np.float16)[:, 0].astype(np.float32))


def _lost(stored: NDArray[np.uint8], exact: Floats, restored: Floats) -> NDArray[np.bool_]:
    """Which rows span so little that their fp16 scale became zero: it is stored as 1 then, and every value restores to
    the bias.
    """
    found = np.isin(_steps(stored), (0, 1))
    spans, restores = (v[found].max(axis=1) > v[found].min(axis=1) for v in (exact, restored))
    found[found] = spans & ~restores
    return found
