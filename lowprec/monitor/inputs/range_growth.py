"""What a new snapshot did to the ranges of rows: a row whose range grew is stored in coarser steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.models.checkpoints.checkpoint import read_rows
from lowprec.plan import Plan, Unit

__all__ = ["GROWTH", "RangeGrowth", "grown_ranges"]

# A row counts as grown when its range is at least so many times what it was.
GROWTH = 1.5
_BYTES_AT_ONCE = 64 << 20


@dataclass(frozen=True)
class RangeGrowth:
    """Rows of a table whose range grew since the certified snapshot; `factor` is that of the row that grew most."""

    table: str
    num_rows: int
    num_grown: int
    row: int
    factor: float

    @property
    def share(self) -> float:
        """The share of rows that grew."""
        return self.num_grown / self.num_rows

    def __str__(self) -> str:
        return (
            f"the range of {self.num_grown} of {self.num_rows} rows of {self.table} grew by a factor of {GROWTH} or "
            f"more (row {self.row}: {self.factor:.1f})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return dict(vars(self))


def grown_ranges(
    units: tuple[Unit, ...], tensors: Mapping[str, str], certified: str, now: str, plan: Plan
) -> list[RangeGrowth]:
    """The tables with rows that grew, worst first; both checkpoints are read a stretch of rows at a time.

    tensors: the name of each table's weight in a checkpoint. A range means nothing to tables at fp32 and fp16.
    """
    found = []
    for unit in units:
        if not plan[unit.name].is_rowwise:
            continue
        step = max(1, _BYTES_AT_ONCE // (4 * unit.dim))
        num_grown, worst, row = 0, 0.0, -1
        for first in range(0, unit.num_rows, step):
            last = min(first + step, unit.num_rows)
            before, after = (_ranges(read_rows(path, tensors[unit.name], first, last)) for path in (certified, now))
            with np.errstate(divide="ignore", invalid="ignore"):
                factor = np.where(before > 0, after / before, np.where(after > 0, np.inf, 1.0))
            num_grown += int((factor >= GROWTH).sum())
            largest = int(np.argmax(factor))
            if factor[largest] > worst:
                worst, row = float(factor[largest]), first + largest
        if num_grown:
            found.append(RangeGrowth(unit.name, unit.num_rows, num_grown, row, min(worst, 1e9)))
    return sorted(found, key=lambda growth: -growth.share)


def _ranges(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(rows.max(axis=1).astype(np.float64) - rows.min(axis=1))
