"""`Tables`, the interface of all tables of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lowprec.ops.bags import BagCall
from lowprec.plan import Precision, RowRange
from lowprec.shards.table import TableShard, hot_tables

__all__ = ["LocalTables", "Tables"]

Floats = NDArray[np.float32]


class Tables(Protocol):
    """Every table of a model, by name.

    are_remote: the model has no rows of its own, so fp32 vectors come from here too.
    """

    are_remote: bool

    @property
    def names(self) -> Collection[str]:
        """The tables."""

    def pooled(
        self, calls: Sequence[BagCall], precisions: Sequence[Collection[Precision]]
    ) -> list[dict[Precision, Tensor]]:
        """What each call returns, float32[B, dim], when its table has each of its precisions.

        Raises `WeightError` for a touched row that has no form at a precision.
        """

    def scores(
        self, calls: Sequence[BagCall], precisions: Sequence[Sequence[Precision]], gradients: Sequence[Tensor]
    ) -> list[dict[Precision, Floats]]:
        """`gradient[b] . (pooled[b] - fp32[b])` of each call, float32[B], at each of its precisions, none of them fp32.

        gradients: float32[B, dim]. Raises `WeightError` as `pooled` does.
        """

    def check_finite(self, calls: Sequence[BagCall]) -> None:
        """Raise `WeightError` naming the first row of the calls that holds NaN or Inf."""


class LocalTables:
    """Tables whose rows this process can read: a loaded model, often a mapped file."""

    are_remote = False

    def __init__(self, weights: Mapping[str, Tensor], row_ranges: Mapping[str, RowRange]) -> None:
        """Take weights float32[num_rows, dim] without a copy; the ranges of rows are minmax for one left out."""
        hot = hot_tables({name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()})
        self._shards = {
            name: TableShard(name, weight, row_range=row_ranges.get(name, RowRange.MINMAX), is_hot=name in hot)
            for name, weight in weights.items()
        }

    @property
    def names(self) -> Collection[str]:
        """The tables."""
        return self._shards.keys()

    def pooled(
        self, calls: Sequence[BagCall], precisions: Sequence[Collection[Precision]]
    ) -> list[dict[Precision, Tensor]]:
        """As `Tables` says; fp32 is what the call did return."""
        return [
            self._shards[call.table].pooled(call, sorted(wanted))
            for call, wanted in zip(calls, precisions, strict=True)
        ]

    def scores(
        self, calls: Sequence[BagCall], precisions: Sequence[Sequence[Precision]], gradients: Sequence[Tensor]
    ) -> list[dict[Precision, Floats]]:
        """As `Tables` says."""
        return [
            self._shards[call.table].scores(call, wanted, gradient)
            for call, wanted, gradient in zip(calls, precisions, gradients, strict=True)
        ]

    def check_finite(self, calls: Sequence[BagCall]) -> None:
        """As `Tables` says."""
        for call in calls:
            self._shards[call.table].check_finite(call)
