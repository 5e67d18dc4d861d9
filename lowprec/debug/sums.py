"""Errors of outputs relative to the reference: sums over rows, per channel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["MAX_ROWS", "ErrorSums"]

Float = NDArray[np.float64]
Values = NDArray[np.float32] | NDArray[np.float64]

# Of a batch; its rows are examples like any other.
MAX_ROWS = 512


@dataclass(frozen=True)
class ErrorSums:
    """With y the reference's output and e the error of another one, float64[C] by output channel (or value of a row).

    num_rows: of which the first `num_summed` are summed. reference2, error2, product: sums of y^2, e^2 and y e; error,
    magnitude: sums of e and |e|; largest: of |e|. Values that are not finite are counted, and left out of all these.
    """

    num_rows: int
    num_summed: int
    num_not_finite: int
    reference2: Float
    error2: Float
    product: Float
    error: Float
    magnitude: Float
    largest: Float

    @classmethod
    def of(cls, reference: Tensor, found: Tensor) -> ErrorSums:
        """Of the first `MAX_ROWS` rows of outputs float32[n, C]; one that is not finite counts wherever it is.

        reference: at least these rows.
        """
        whole = found.numpy()
        with np.errstate(invalid="ignore", over="ignore"):
            num_wrong = 0 if math.isfinite(float(whole.sum())) else int((~np.isfinite(whole)).sum())
            y, x = reference[:MAX_ROWS].numpy(), whole[:MAX_ROWS]
            sums = cls._of(y, x, len(whole), num_wrong)
            if not np.isfinite(sums.reference2 + sums.error2).all():  # squares beyond fp32
                sums = cls._of(y.astype(np.float64), x.astype(np.float64), len(whole), num_wrong)
        return sums

    @classmethod
    def _of(cls, y: Values, x: Values, num_rows: int, num_wrong: int) -> ErrorSums:
        if np.shares_memory(x, y):
            return cls(num_rows, len(y), 0, _summed(y * y), *(np.zeros(y.shape[1]) for _ in range(5)))
        e = x - y
        if num_wrong:
            y = y.copy()
            y[~np.isfinite(x)] = e[~np.isfinite(e)] = 0
        size = np.abs(e)
        return cls(
            num_rows=num_rows,
            num_summed=len(e),
            num_not_finite=num_wrong,
            reference2=_summed(y * y),
            error2=_summed(e * e),
            product=_summed(y * e),
            error=_summed(e),
            magnitude=_summed(size),
            largest=size.max(axis=0, initial=0.0).astype(np.float64),
        )

    def __add__(self, other: ErrorSums) -> ErrorSums:
        names = ("num_rows", "num_summed", "num_not_finite", "reference2", "error2", "product", "error", "magnitude")
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return ErrorSums(**sums, largest=np.maximum(self.largest, other.largest))

    @property
    def num_values(self) -> int:
        """Rows times channels."""
        return self.num_rows * len(self.error2)

    @property
    def sqnr_db(self) -> float:
        """Signal over error in decibels; infinite where there is no error."""
        return _decibels(float(self.reference2.sum()), float(self.error2.sum()))

    @property
    def sqnr_db_by_channel(self) -> Float:
        """The same of each channel."""
        pairs = zip(self.reference2, self.error2, strict=True)
        return np.array([_decibels(float(y), float(e)) for y, e in pairs])

    @property
    def cosine(self) -> float:
        """Of the angle between both outputs; 1 where they are equal."""
        y2, e2, ye = (float(v.sum()) for v in (self.reference2, self.error2, self.product))
        found2 = y2 + 2 * ye + e2
        if e2 == 0:
            return 1.0
        return (y2 + ye) / math.sqrt(y2 * found2) if y2 > 0 and found2 > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For documents; SQNR is None where there is no error, the cosine where nothing is left to compare."""
        n = max(self.num_summed * len(self.error2), 1)
        sqnr, is_lost = self.sqnr_db, self.num_not_finite > 0 and not self.error2.any()
        return {
            "sqnr_db": sqnr if math.isfinite(sqnr) else None,
            "cosine": None if is_lost else self.cosine,
            "max_error": float(self.largest.max(initial=0.0)),
            "mean_error": float(self.magnitude.sum()) / n,
            "bias": float(self.error.sum()) / n,
            "num_not_finite": self.num_not_finite,
        }


def _summed(values: Values) -> Float:
    """The sum of each column: as a product with ones it takes half the time of a reduction (tried by hand)."""
    return np.asarray((np.ones(len(values), np.float32) @ values).astype(np.float64))


def _decibels(signal: float, error: float) -> float:
    if error == 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal > 0 else -math.inf
