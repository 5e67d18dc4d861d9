"""Counts of what the model was given, by feature: what worker and driver exchange, and what a window is compared by.

A worker sends the distinct ids of a batch with their counts, and a histogram of every dense feature. The driver keeps,
of whole windows, counts in a fixed number of buckets, so its memory depends neither on the window nor on the tables.
Counts are integers: sums are the same in any order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.core.sums import add_fields
from lowprec.evaluation.stats.second_moment import mixed
from lowprec.traffic import Schema
from lowprec.traffic.batch import Bags, Batch

__all__ = [
    "COARSE_BUCKETS",
    "FINE_BUCKETS",
    "DenseCounts",
    "IdCounts",
    "InputCounts",
    "Inputs",
    "Touched",
    "counts_of",
    "dense_quantile",
]

Int = NDArray[np.int64]

# Buckets of the ids of a feature: of a whole window, and of each of its time blocks. Tables with fewer rows have a
# bucket for each row.
FINE_BUCKETS, COARSE_BUCKETS = 1 << 16, 1 << 10
# Bits of the set of ids that were looked up; exact for tables with fewer rows.
TOUCHED_BITS = 1 << 22
# Histograms of dense values: so many bins for each factor of two, from 2^-20 to 2^20 on both sides of zero. A quantile
# is read from them to within 4.5 percent of itself.
BINS_PER_OCTAVE, MAX_OCTAVE = 8, 20
_BINS_A_SIDE = 2 * MAX_OCTAVE * BINS_PER_OCTAVE
DENSE_BINS = 2 * _BINS_A_SIDE + 1


@dataclass(frozen=True)
class Buckets:
    """Where ids lie: each at a place of its own in tables of at most so many rows, else scattered over as many."""

    num_rows: int | None
    at_most: int

    @property
    def is_exact(self) -> bool:
        """Whether each id has a place of its own."""
        return self.num_rows is not None and self.num_rows <= self.at_most

    def __len__(self) -> int:
        return min(self.num_rows or self.at_most, self.at_most)

    def of(self, ids: Int) -> Int:
        """The bucket of each id, int64."""
        if self.is_exact:
            return ids
        return (mixed(ids.astype(np.uint64)) % np.uint64(self.at_most)).astype(np.int64)


@dataclass(frozen=True)
class IdCounts:
    """Distinct ids of a feature, int64[N] and rising, how often each was looked up, and how bags were filled."""

    ids: Int
    counts: Int
    num_bags: int = 0
    num_empty: int = 0

    def __add__(self, other: IdCounts) -> IdCounts:
        ids, where = np.unique(np.concatenate([self.ids, other.ids]), return_inverse=True)
        counts = np.bincount(where, np.concatenate([self.counts, other.counts]), minlength=len(ids)).astype(np.int64)
        return IdCounts(ids, counts, self.num_bags + other.num_bags, self.num_empty + other.num_empty)

    @property
    def num_lookups(self) -> int:
        """How many ids were looked up."""
        return int(self.counts.sum())


@dataclass(frozen=True)
class DenseCounts:
    """The histogram of a dense feature: int64[DENSE_BINS], from the largest negative value to the largest positive."""

    counts: Int

    def __add__(self, other: DenseCounts) -> DenseCounts:
        return add_fields(self, other)


@dataclass(frozen=True)
class InputCounts:
    """The counts of some rows, by feature."""

    sparse: Mapping[str, IdCounts]
    dense: Mapping[str, DenseCounts]

    def __add__(self, other: InputCounts) -> InputCounts:
        return InputCounts(
            {name: counts + other.sparse[name] for name, counts in self.sparse.items()},
            {name: counts + other.dense[name] for name, counts in self.dense.items()},
        )


def counts_of(batch: Batch, dense_names: Sequence[str]) -> InputCounts:
    """The counts of a batch; `dense_names` are those of its dense columns, in order."""
    return InputCounts(
        {name: _ids(bags) for name, bags in batch.sparse.items()},
        {name: DenseCounts(_histogram(batch.dense[:, k])) for k, name in enumerate(dense_names)},
    )


class Inputs:
    """The counts of a window: for each feature in `FINE_BUCKETS` over all of it, in coarse ones by time block.

    fine: int64[buckets] by sparse feature. coarse: int64[num_blocks, buckets] by sparse feature. histograms:
    int64[num_blocks, DENSE_BINS] by dense feature. num_bags, num_empty: by sparse feature.
    """

    def __init__(self, schema: Schema, num_blocks: int) -> None:
        """Nothing is counted yet."""
        self.num_blocks = num_blocks
        rows = {feature.name: feature.num_embeddings for feature in schema.sparse}
        self._fine = {name: Buckets(n, FINE_BUCKETS) for name, n in rows.items()}
        self._coarse = {name: Buckets(n, COARSE_BUCKETS) for name, n in rows.items()}
        self.sparse = rows
        self.dense = tuple(schema.dense)
        self.fine = {name: np.zeros(len(buckets), np.int64) for name, buckets in self._fine.items()}
        self.coarse = {name: np.zeros((num_blocks, len(buckets)), np.int64) for name, buckets in self._coarse.items()}
        self.histograms = {name: np.zeros((num_blocks, DENSE_BINS), np.int64) for name in self.dense}
        self.num_bags = dict.fromkeys(self.sparse, 0)
        self.num_empty = dict.fromkeys(self.sparse, 0)

    def add(self, block: int, counts: InputCounts) -> None:
        """Add some rows of a time block."""
        for name, ids in counts.sparse.items():
            np.add.at(self.fine[name], self._fine[name].of(ids.ids), ids.counts)
            np.add.at(self.coarse[name][block], self._coarse[name].of(ids.ids), ids.counts)
            self.num_bags[name] += ids.num_bags
            self.num_empty[name] += ids.num_empty
        for name, histogram in counts.dense.items():
            self.histograms[name][block] += histogram.counts

    def fine_counts(self, feature: str, ids: Int) -> Int:
        """How often ids of a sparse feature were looked up, or more where they share their bucket with others."""
        return self.fine[feature][self._fine[feature].of(ids)]

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as arrays, for a file."""
        found: dict[str, NDArray[Any]] = {f"fine/{name}": counts for name, counts in self.fine.items()}
        found |= {f"coarse/{name}": counts for name, counts in self.coarse.items()}
        found |= {f"dense/{name}": counts for name, counts in self.histograms.items()}
        found |= {f"bags/{name}": np.array([self.num_bags[name], self.num_empty[name]]) for name in self.sparse}
        return found

    def fill(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take what `to_arrays` gave; raises `KeyError` or `ValueError` where it is of other features."""
        for name in self.sparse:
            self.fine[name] = _like(arrays[f"fine/{name}"], self.fine[name])
            self.num_bags[name], self.num_empty[name] = (int(n) for n in arrays[f"bags/{name}"])
            self.coarse[name] = _like(arrays[f"coarse/{name}"], self.coarse[name])
        for name in self.dense:
            self.histograms[name] = _like(arrays[f"dense/{name}"], self.histograms[name])


class Touched:
    """The set of ids of a feature that were looked up, in a fixed number of bits."""

    def __init__(self, num_rows: int | None) -> None:
        """None of them yet; num_rows: rows of the table, None where that is not known."""
        self._buckets = Buckets(num_rows, TOUCHED_BITS)
        self.bits = np.zeros(len(self._buckets) // 8 + 1, np.uint8)

    def add(self, ids: Int) -> None:
        """Ids that were looked up."""
        buckets = self._buckets.of(ids)
        np.bitwise_or.at(self.bits, buckets >> 3, (1 << (buckets & 7)).astype(np.uint8))

    def holds(self, ids: Int) -> NDArray[np.bool_]:
        """Whether each id was looked up; an id that was not is taken for one that was with chance `fill`."""
        buckets = self._buckets.of(ids)
        return np.asarray((self.bits[buckets >> 3] >> (buckets & 7).astype(np.uint8)) & 1, np.bool_)

    @property
    def fill(self) -> float:
        """The share of bits that are set, where ids share bits; 0 where each has its own."""
        return 0.0 if self._buckets.is_exact else float(np.bitwise_count(self.bits).sum()) / len(self._buckets)


def dense_quantile(counts: Int, q: float) -> float:
    """The q-quantile of a dense feature from its histogram; NaN where it is empty."""
    total = counts.sum()
    if total == 0:
        return float("nan")
    k = int(np.searchsorted(np.cumsum(counts), q * total, side="left"))
    return float(_middles()[min(k, DENSE_BINS - 1)])


def _ids(bags: Bags) -> IdCounts:
    lengths = np.diff(bags.offsets)
    num_empty = int((lengths == 0).sum())
    values = bags.values
    if len(values) and 0 <= values.min() and values.max() < FINE_BUCKETS:
        # Few rows: counting is faster than sorting.
        counts = np.bincount(values)
        ids = np.flatnonzero(counts)
        return IdCounts(ids, counts[ids].astype(np.int64), len(lengths), num_empty)
    ids, found = np.unique(values, return_counts=True)
    return IdCounts(ids, found.astype(np.int64), len(lengths), num_empty)


def _histogram(values: NDArray[np.float32]) -> Int:
    size = np.abs(values.astype(np.float64))
    with np.errstate(divide="ignore"):
        octave = np.log2(size)
    bins = np.clip(np.floor((octave + MAX_OCTAVE) * BINS_PER_OCTAVE), 0, _BINS_A_SIDE - 1)
    side = np.where(values > 0, 1, -1)
    index = np.where(size > 0, _BINS_A_SIDE + side * (bins + 1), _BINS_A_SIDE).astype(np.int64)
    return np.bincount(index, minlength=DENSE_BINS).astype(np.int64)


def _middles() -> NDArray[np.float64]:
    positive = 2.0 ** ((np.arange(_BINS_A_SIDE) + 0.5) / BINS_PER_OCTAVE - MAX_OCTAVE)
    return np.concatenate([-positive[::-1], [0.0], positive])


def _like(found: NDArray[Any], expected: Int) -> Int:
    if found.shape != expected.shape:
        raise ValueError(f"counts of shape {found.shape}, expected {expected.shape}")
    return found.astype(np.int64)
