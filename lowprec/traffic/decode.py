"""Decodes Arrow rows to batches: types, missing values, bad rows, out-of-range ids."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pt
from numpy.typing import NDArray

from lowprec.core.errors import TrafficError
from lowprec.traffic.bags import bags_of, out_of_range, without, zeroed
from lowprec.traffic.batch import BadRow, Bags, Batch
from lowprec.traffic.schema import Schema, SparseFeature

__all__ = ["NO_LABEL", "Decoder", "Place", "hash_text"]

# Reasons of bad rows.
NO_LABEL = "label is not 0 or 1"
_IF_MISSING = "traffic.missing_dense: zero takes it for 0"

Place = Callable[[int], tuple[str, int]]


class Decoder:
    """Turns rows of a dataset into batches by the rules of a schema."""

    def __init__(self, schema: Schema, place: Place) -> None:
        """`place` tells the file of a dataset position and the row in it, for messages and bad rows."""
        self._schema = schema
        self._place = place
        self._log1p = np.array([column in schema.log1p for column in schema.dense], np.bool_)

    def batch(self, index: int, rows: pa.RecordBatch, positions: NDArray[np.int64]) -> Batch:
        """The batch of these rows, bad ones taken out; raises `TrafficError` on ids where `bounds_check` is error."""
        problems = _Problems()
        batch = self._decoded(index, rows, positions, (), problems)
        if problems.reasons:
            bad_rows = self._bad_rows(rows, positions, problems)
            keep = np.ones(len(positions), np.bool_)
            keep[list(problems.reasons)] = False
            rows, positions = rows.filter(pa.array(keep)), positions[keep]
            batch = self._decoded(index, rows, positions, bad_rows, _Problems())
        return self._in_bounds(batch, rows, positions)

    def _decoded(
        self,
        index: int,
        rows: pa.RecordBatch,
        positions: NDArray[np.int64],
        bad_rows: tuple[BadRow, ...],
        problems: _Problems,
    ) -> Batch:
        schema = self._schema
        times = positions.copy()
        if schema.time is not None:
            times = _whole(rows.column(schema.time).cast(pa.int64()), "null time", problems)
        labels = self._labels(rows.column(schema.label), problems)
        dense = self._dense(rows, problems)
        one_each = np.arange(rows.num_rows + 1)
        sparse: dict[str, Bags] = {}
        for feature in schema.sparse:
            weights = None if feature.weights is None else rows.column(feature.weights)
            sparse[feature.name], found = bags_of(feature, rows.column(feature.column), weights, one_each)
            for problem in found:
                problems.add(problem.rows, problem.reason)
        return Batch(
            index=index,
            labels=labels,
            dense=dense,
            sparse=sparse,
            times=times,
            weights=self._weights(rows, problems),
            groups=self._groups(rows, problems),
            bad_rows=bad_rows,
        )

    def _labels(self, column: pa.Array, problems: _Problems) -> NDArray[np.float32]:
        labels = _floats(column, 0.0)
        problems.add(np.flatnonzero((labels != 0) & (labels != 1)), NO_LABEL)
        labels = labels.astype(np.float32)
        if column.null_count:
            labels[_nulls(column)] = np.nan
        return labels

    def _dense(self, rows: pa.RecordBatch, problems: _Problems) -> NDArray[np.float32]:
        schema = self._schema
        # One row of memory per column while filling, which is several times faster than striding; transposed below.
        by_column = np.empty((len(schema.dense), rows.num_rows), np.float32)
        for at, name in enumerate(schema.dense):
            column = rows.column(name)
            with np.errstate(over="ignore"):  # beyond float32 becomes infinite, and a bad row below
                by_column[at] = _floats(column, 0.0)
            if column.null_count and schema.missing_dense == "error":
                problems.add(np.flatnonzero(_nulls(column)), f'missing dense value in column "{name}" ({_IF_MISSING})')
        finite = np.isfinite(by_column)
        if not finite.all():
            for at, name in enumerate(schema.dense):
                problems.add(np.flatnonzero(~finite[at]), f'NaN or infinite dense value in column "{name}"')
        for at in np.flatnonzero(self._log1p).tolist():
            np.log1p(np.maximum(by_column[at], 0), out=by_column[at])
        return np.ascontiguousarray(by_column.T)

    def _weights(self, rows: pa.RecordBatch, problems: _Problems) -> NDArray[np.float64] | None:
        if self._schema.weight is None:
            return None
        weights = _floats(rows.column(self._schema.weight), math.nan).astype(np.float64)
        unusable = np.flatnonzero(~((weights >= 0) & np.isfinite(weights)))
        problems.add(unusable, "example weight is null, NaN, infinite or negative")
        return weights

    def _groups(self, rows: pa.RecordBatch, problems: _Problems) -> NDArray[np.int64] | None:
        if self._schema.group is None:
            return None
        column = rows.column(self._schema.group)
        if pt.is_integer(column.type):
            return _whole(column, "null group", problems).view(np.int64)
        problems.add(np.flatnonzero(_nulls(column)), "null group")
        encoded = column.fill_null("").dictionary_encode()
        hashes = np.array([hash_text(text) for text in encoded.dictionary.to_pylist()], np.int64)
        groups: NDArray[np.int64] = hashes[encoded.indices.to_numpy()]
        return groups

    def _in_bounds(self, batch: Batch, rows: pa.RecordBatch, positions: NDArray[np.int64]) -> Batch:
        counts: dict[str, int] = {}
        sparse = dict(batch.sparse)
        for feature in self._schema.sparse:
            bags = sparse[feature.name]
            at = out_of_range(bags, feature.num_embeddings)
            if len(at) == 0:
                continue
            if self._schema.bounds_check == "error":
                raise TrafficError(self._out_of_range(feature, bags, int(at[0]), rows, positions))
            counts[feature.name] = len(at)
            sparse[feature.name] = without(bags, at) if self._schema.bounds_check == "drop" else zeroed(bags, at)
        if not counts:
            return batch
        return Batch(**{**batch.__dict__, "sparse": sparse, "out_of_range": counts})

    def _out_of_range(
        self, feature: SparseFeature, bags: Bags, at: int, rows: pa.RecordBatch, positions: NDArray[np.int64]
    ) -> str:
        row = int(np.searchsorted(bags.offsets, at, side="right")) - 1
        file, row_in_file = self._place(int(positions[row]))
        # As stored: an unsigned id above 2^63 would read as a negative one here.
        stored = rows.column(feature.column)[row].as_py()
        found = (
            bags.values[at]
            if feature.modulo
            else (stored[at - int(bags.offsets[row])] if isinstance(stored, list) else stored)
        )
        size = feature.num_embeddings
        table = "negative ids fit no table" if size is None else f"the table has {size} rows, so ids 0 to {size - 1}"
        return (
            f'traffic file {file}, row {row_in_file}: feature "{feature.name}" has id {found}; {table}; '
            "set modulo for raw (hashed) ids, bounds_check: drop or zero to go on without such ids, "
            "or the right num_embeddings"
        )

    def _bad_rows(self, rows: pa.RecordBatch, positions: NDArray[np.int64], problems: _Problems) -> tuple[BadRow, ...]:
        places = sorted(problems.reasons)
        bad_rows = []
        for place, row in zip(places, rows.take(pa.array(places)).to_pylist(), strict=True):
            file, row_in_file = self._place(int(positions[place]))
            values = json.dumps(_json(row), default=str)
            bad_rows.append(BadRow(file, row_in_file, problems.reasons[place], values))
        return tuple(bad_rows)


class _Problems:
    """The first reason of each bad row."""

    def __init__(self) -> None:
        self.reasons: dict[int, str] = {}

    def add(self, rows: NDArray[np.int64], reason: str) -> None:
        for row in rows.tolist():
            self.reasons.setdefault(row, reason)


def hash_text(text: str) -> int:
    """A 64-bit hash (BLAKE2b, signed) of a text that is the same in every process and release."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _floats(column: pa.Array, null: float) -> NDArray[np.floating[Any]]:
    """The column as floats, nulls replaced; float32 columns stay float32."""
    if not pt.is_floating(column.type):
        column = column.cast(pa.float64(), safe=False)
    numbers: NDArray[np.floating[Any]] = (column.fill_null(null) if column.null_count else column).to_numpy()
    return numbers


def _whole(column: pa.Array, reason: str, problems: _Problems) -> NDArray[np.int64]:
    if column.null_count:
        problems.add(np.flatnonzero(_nulls(column)), reason)
        column = column.fill_null(0)
    numbers: NDArray[np.int64] = column.to_numpy().copy()
    return numbers


def _nulls(column: pa.Array) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = column.is_null().to_numpy(zero_copy_only=False)
    return mask


def _json(value: Any) -> Any:
    """The value with NaN and infinities as text: JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _json(inner) for key, inner in value.items()}
    return [_json(inner) for inner in value] if isinstance(value, list) else value
