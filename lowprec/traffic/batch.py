"""A batch of examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

__all__ = ["BadRow", "Bags", "Batch"]


@dataclass(frozen=True)
class Bags:
    """The ids of one sparse feature: bag i is `values[offsets[i]:offsets[i + 1]]`.

    values: int64[num_ids]; offsets: int64[num_rows + 1], offsets[0] == 0; weights: float32[num_ids] or None.
    """

    values: NDArray[np.int64]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.values.nbytes + self.offsets.nbytes + (0 if self.weights is None else self.weights.nbytes)

    def rows(self, first: int, last: int) -> Bags:
        """The bags of rows [first, last)."""
        start, stop = int(self.offsets[first]), int(self.offsets[last])
        weights = None if self.weights is None else self.weights[start:stop]
        return Bags(self.values[start:stop], self.offsets[first : last + 1] - start, weights)


@dataclass(frozen=True)
class BadRow:
    """A row that could not be used: where it stands, why, and its columns as text."""

    file: str
    row: int
    reason: str
    values: str


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of a window. `index` counts batches within the window, bad rows are already taken out.

    labels: float32[n], 0 or 1 (NaN where the label is null); dense: float32[n, num_dense]; weights: float64[n] or None;
    groups: int64[n] or None; times: int64[n], in the schema's time unit (row positions where the schema has no time).
    out_of_range: how many ids of each feature were outside the table, features without any left out.
    """

    index: int
    labels: NDArray[np.float32]
    dense: NDArray[np.float32]
    sparse: Mapping[str, Bags]
    times: NDArray[np.int64]
    weights: NDArray[np.float64] | None = None
    groups: NDArray[np.int64] | None = None
    bad_rows: tuple[BadRow, ...] = ()
    out_of_range: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows that can be used."""
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, about."""
        return self.dense.nbytes + 4 * self.labels.nbytes + sum(bags.nbytes for bags in self.sparse.values())

    def part(self, k: int, num_parts: int) -> Batch:
        """Part k of the batch cut into `num_parts` stretches of rows; what is said of bad rows stays with part 0."""
        found = self.rows(k * self.num_rows // num_parts, (k + 1) * self.num_rows // num_parts)
        return replace(found, bad_rows=self.bad_rows, out_of_range=self.out_of_range) if k == 0 else found

    def rows(self, first: int, last: int) -> Batch:
        """Rows [first, last), without what is said of bad ones."""
        return Batch(
            index=self.index,
            labels=self.labels[first:last],
            dense=self.dense[first:last],
            sparse={name: bags.rows(first, last) for name, bags in self.sparse.items()},
            times=self.times[first:last],
            weights=None if self.weights is None else self.weights[first:last],
            groups=None if self.groups is None else self.groups[first:last],
        )
