"""Converts sparse Arrow columns to bags of ids; handles out-of-range ids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
from numpy.typing import NDArray

from lowprec.traffic.batch import Bags
from lowprec.traffic.schema import SparseFeature

__all__ = ["BagProblem", "bags_of", "out_of_range", "without", "zeroed"]


class BagProblem(NamedTuple):
    """Rows whose bag of a feature cannot be used, and why."""

    rows: NDArray[np.int64]
    reason: str


def bags_of(
    feature: SparseFeature, ids: pa.Array, weights: pa.Array | None, one_each: NDArray[np.int64]
) -> tuple[Bags, list[BagProblem]]:
    """The bags of one feature, ids folded by its `modulo` but not yet checked against its table.

    `ids`: int64, uint64 or a list of one of them; `weights`: list of floats; `one_each`: arange(num_rows + 1), shared
    by all features with exactly one id a row. With problems, the bags are not to be used.
    """
    problems: list[BagProblem] = []
    if pt.is_list(ids.type):
        offsets = _offsets(ids)
        flat = ids.flatten()
        if flat.null_count:
            at = np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))
            problems.append(BagProblem(_rows_of(at, offsets), f'null id in the list of feature "{feature.name}"'))
    elif ids.null_count:
        valid = ids.is_valid().to_numpy(zero_copy_only=False)
        offsets = np.zeros(len(ids) + 1, np.int64)
        np.cumsum(valid, out=offsets[1:])
        flat = ids.drop_null()
    else:
        offsets, flat = one_each, ids
    values = _folded(_numbers(flat, 0), feature.modulo)
    if weights is None:
        return Bags(values, offsets), problems
    weight_offsets = _offsets(weights)
    differing = np.flatnonzero(np.diff(weight_offsets) != np.diff(offsets))
    if len(differing):
        problems.append(BagProblem(differing, f'feature "{feature.name}" has another number of weights than ids'))
    id_weights = _numbers(weights.flatten(), float("nan")).astype(np.float32)
    unusable = np.flatnonzero(~np.isfinite(id_weights))
    if len(unusable):
        reason = f'null, NaN or infinite weight of an id of feature "{feature.name}"'
        problems.append(BagProblem(_rows_of(unusable, weight_offsets), reason))
    return Bags(values, offsets, id_weights), problems


def out_of_range(bags: Bags, num_embeddings: int | None) -> NDArray[np.int64]:
    """Where in `bags.values` the ids outside [0, num_embeddings) stand; an unknown size only forbids negative ids."""
    # Seen as unsigned, negative ids are larger than any table: one comparison covers both ends.
    ids = bags.values.view(np.uint64)
    limit = np.uint64(1 << 63 if num_embeddings is None else num_embeddings)
    if len(ids) == 0 or ids.max() < limit:
        return np.empty(0, np.int64)
    return np.flatnonzero(ids >= limit)


def without(bags: Bags, at: NDArray[np.int64]) -> Bags:
    """The bags with the ids at these places, and their weights, taken out."""
    keep = np.ones(len(bags.values), np.bool_)
    keep[at] = False
    kept_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(keep, dtype=np.int64)])
    weights = None if bags.weights is None else bags.weights[keep]
    return Bags(bags.values[keep], kept_before[bags.offsets], weights)


def zeroed(bags: Bags, at: NDArray[np.int64]) -> Bags:
    """The bags with the ids at these places replaced by row 0: FBGEMM's `BoundsCheckMode.WARNING`."""
    values = bags.values.copy()
    values[at] = 0
    return replace(bags, values=values)


def _offsets(lists: pa.Array) -> NDArray[np.int64]:
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    offsets = np.zeros(len(lists) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _rows_of(at: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(offsets, at, side="right") - 1


def _numbers(flat: pa.Array, null: float) -> NDArray[Any]:
    filled = flat.fill_null(null) if flat.null_count else flat
    numbers: NDArray[Any] = filled.to_numpy(zero_copy_only=False)
    return numbers


def _folded(ids: NDArray[Any], modulo: int | None) -> NDArray[np.int64]:
    """int64 ids of their own memory; NumPy's remainder takes the sign of the divisor, so it is never negative."""
    if modulo is not None:
        # Unsigned ids above 2^63 are folded before they become int64.
        folded: NDArray[np.int64] = np.remainder(ids, ids.dtype.type(modulo)).astype(np.int64, copy=False)
        return folded
    return ids.astype(np.int64)
