"""Opens traffic, selects windows and streams their batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from lowprec.core.byte_lru import ByteLru
from lowprec.core.errors import ConfigError, TrafficError
from lowprec.traffic.batch import Batch
from lowprec.traffic.decode import Decoder
from lowprec.traffic.files.dataset import Dataset, Rows, open_dataset
from lowprec.traffic.schema import Schema, TimeUnit
from lowprec.traffic.selection import Selection, Span, group_times, rows_in_window, select
from lowprec.traffic.window import Window, days_of, format_time, format_window

__all__ = ["TrafficReader", "TrafficWindow", "open_traffic"]

# Rows decoded at once where batches are smaller: below this the cost per read dominates.
_READ_ROWS = 4096
# What random access may keep decoded; row groups above half of it are streamed instead of kept.
CACHE_BYTES = 64 << 20


def open_traffic(path: str, schema: Schema, *, batch_size: int, version: int | None = None) -> TrafficReader:
    """Open the traffic at a file, a folder, a `key=value` partitioned folder, a Delta table or a `pyarrow.fs` URL.

    version: of a Delta table, the latest where it is None. Whatever happens to the table meanwhile, the reader, its
    windows and their copies in other processes read that version.

    Reads the footers of all files, no rows. Raises `TrafficError` when nothing is there, a file is truncated, or a
    column is missing or has an unusable type, naming file and column.
    """
    if batch_size <= 0:
        raise ConfigError(f"traffic.batch_size: must be positive; got {batch_size}")
    return TrafficReader(path, schema, open_dataset(path, schema, version), batch_size)


class TrafficReader:
    """Opened traffic; `path` and `schema` as given."""

    def __init__(self, path: str, schema: Schema, dataset: Dataset, batch_size: int) -> None:
        self.path = path
        self.schema = schema
        self.batch_size = batch_size
        self._dataset = dataset
        self._known: dict[int, tuple[int, int] | None] = {}

    def with_schema(self, schema: Schema) -> TrafficReader:
        """The same opened traffic with other table sizes; the columns must be the same."""
        return TrafficReader(self.path, schema, self._dataset, self.batch_size)

    @property
    def num_rows(self) -> int:
        """Rows of the whole traffic, whatever their time."""
        return self._dataset.num_rows

    @property
    def version(self) -> int | None:
        """The version of the Delta table that is read; None of traffic that is none."""
        return self._dataset.source.version

    @property
    def time_unit(self) -> TimeUnit | None:
        """The unit of windows and of `Batch.times`, None where windows are row positions.

        That of the column where it is a timestamp, seconds for dates, the schema's for integers.
        """
        return self._dataset.layout.time_unit

    @property
    def time_range(self) -> tuple[int, int] | None:
        """The earliest and the latest time of the traffic, both inclusive; None when no row has one.

        Reads the time column where the files have no statistics of it.
        """
        groups = range(len(self._dataset.groups))
        found = [t for i in groups if (t := group_times(self._dataset, self.schema.time, i, self._known)) is not None]
        return (min(t[0] for t in found), max(t[1] for t in found)) if found else None

    def window(self, window: Window) -> TrafficWindow:
        """The rows of a window; raises `TrafficError` when it has none, telling where the data lies instead."""
        selection = select(self._dataset, self.schema.time, window, self._known)
        if not selection.spans:
            raise TrafficError(self._empty(window, selection))
        return self._of(window, selection)

    def find(self, window: Window) -> TrafficWindow | None:
        """The rows of a window; None where it has none."""
        selection = select(self._dataset, self.schema.time, window, self._known)
        return self._of(window, selection) if selection.spans else None

    def _of(self, window: Window, selection: Selection) -> TrafficWindow:
        return TrafficWindow(self._dataset, self.schema, window, selection, self.batch_size)

    def _empty(self, window: Window, selection: Selection) -> str:
        unit = self.time_unit
        data = self.time_range
        if data is None:
            return f"traffic {self.path}: no row has a time"
        if selection.before is None:
            where = "the window lies before the data"
        elif selection.after is None:
            where = "the window lies beyond the data"
        else:
            ends = (format_time(t, unit) for t in (selection.before, selection.after))
            where = f"the window lies in a gap of the data, between {' and '.join(ends)}"
        return (
            f"traffic {self.path}: no row lies in window {format_window(window, unit)}: {where}, which spans "
            f"{format_time(data[0], unit)} to {format_time(data[1], unit)}; choose a window inside"
        )


class TrafficWindow:
    """The rows of a window, as batches in a fixed order: files by path, row groups and rows as they stand.

    Batch k holds the rows [k * batch_size, (k + 1) * batch_size) of the window, counted before bad rows are taken
    out, so it is the same whoever reads it and in whichever order. Cheap to pickle: send it to workers, give each its
    own range of batches. Not thread-safe.
    """

    def __init__(self, dataset: Dataset, schema: Schema, window: Window, selection: Selection, batch_size: int) -> None:
        self.window = window
        self.schema = schema
        self.batch_size = batch_size
        self.time_range = selection.times
        self._dataset = dataset
        self._rows = _RowsInWindow(dataset, schema, window, max(batch_size, _READ_ROWS))
        self._spans = selection.spans
        self._starts = np.concatenate([[0], np.cumsum([span.num_rows for span in selection.spans])]).astype(np.int64)
        self._parked: _Cursor | None = None

    @property
    def num_rows(self) -> int:
        """Rows of the window, bad ones included."""
        return int(self._starts[-1])

    @property
    def num_days(self) -> float | None:
        """Days from the first to the last of its rows; None where times are no clock's, or rows have none."""
        return days_of(*self.time_range, self._dataset.layout.time_unit) if self.time_range else None

    @property
    def fingerprint(self) -> str:
        """16 hex digits for which rows of which files these are; changed content of the same shape goes unseen.

        Of a Delta table its version counts as well.
        """
        files, version = self._dataset.source.files, self._dataset.source.version
        rows = [(files[s.group.file].path.rpartition("/")[2], *s.group[1:], s.num_rows) for s in self._spans]
        of_delta = () if version is None else (version,)
        return hashlib.sha256(repr((rows, self.batch_size, *of_delta)).encode()).hexdigest()[:16]

    def count_labels(self) -> int:
        """Rows that have a label; reads the label column alone (and the time of row groups that are cut)."""
        wanted = [self.schema.label, *([self.schema.time] if self.schema.time is not None else [])]
        count = 0
        for span in self._spans:
            for rows in self._dataset.stream(span.group, list(dict.fromkeys(wanted)), 1 << 16):
                inside = rows if span.is_whole else rows_in_window(rows, self.schema.time, self.window)
                labels = inside.columns.column(self.schema.label)
                count += len(labels) - labels.null_count
        return count

    @property
    def num_batches(self) -> int:
        """Batches of the window; the last one may be short."""
        return -(-self.num_rows // self.batch_size)

    def batches(self, first: int = 0, last: int | None = None) -> Iterator[Batch]:
        """The batches [first, last) in order, streamed: memory depends on the batch size only.

        A start inside a row group decodes that row group up to there, unless an earlier call on this object left off
        between its beginning and the start: then it goes on from there.
        """
        stop = self.num_batches if last is None else last
        if not 0 <= first <= stop <= self.num_batches:
            raise IndexError(f"batches [{first}, {stop}) of a window with {self.num_batches} batches")
        return self._stream(first, stop)

    def batch(self, k: int) -> Batch:
        """Batch k alone; cheap when asked for in rising order, else up to one row group is decoded for it."""
        return next(self.batches(k, k + 1))

    def batches_in_random_order(self, seed: int) -> Iterator[Batch]:
        """All batches, each once, in a uniformly random order that depends on the seed only.

        So the first n of them are a simple random sample. It costs about one decoded row group a batch, less where
        row groups are small and still cached; row groups of several million values are decoded up to the batch.
        """
        order = np.random.default_rng(seed).permutation(self.num_batches).tolist()
        decoder = Decoder(self.schema, self._dataset.place)
        cache = ByteLru(CACHE_BYTES, keep=1)
        for k in order:
            rows = self._cached_rows(k, cache)
            yield self.batch(k) if rows is None else decoder.batch(k, rows.columns, rows.positions)

    def _stream(self, first: int, stop: int) -> Iterator[Batch]:
        decoder = Decoder(self.schema, self._dataset.place)
        cursor = self._cursor_at(first * self.batch_size) if first < stop else None
        for k in range(first, stop):
            assert cursor is not None
            rows = cursor.take(k * self.batch_size, min((k + 1) * self.batch_size, self.num_rows))
            if k + 1 == stop:
                self._parked = cursor
            yield decoder.batch(k, rows.columns, rows.positions)

    def _cursor_at(self, row: int) -> _Cursor:
        span = self._span_of(row)
        parked, self._parked = self._parked, None
        if parked is not None and self._starts[span] <= parked.row <= row:
            return parked
        return _Cursor(self._rows.of_all(self._spans[span:]), int(self._starts[span]))

    def _span_of(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _cached_rows(self, k: int, cache: ByteLru) -> Rows | None:
        """The rows of batch k by way of whole decoded row groups; None when one of them is too large for that."""
        start, stop = k * self.batch_size, min((k + 1) * self.batch_size, self.num_rows)
        spans = range(self._span_of(start), self._span_of(stop - 1) + 1)
        # 8 bytes a value: what every id and time takes, and more than a dense value does.
        if any(self._spans[span].group.num_values * 8 > CACHE_BYTES // 2 for span in spans):
            return None
        parts = []
        for span in spans:
            rows = cache.get(span, partial(self._decoded, span), _size_bytes)
            begin = int(self._starts[span])
            parts.append(rows.part(max(start - begin, 0), min(stop - begin, self._spans[span].num_rows)))
        return _joined(parts)

    def _decoded(self, span: int) -> Rows:
        return _joined(list(self._rows.of(self._spans[span])))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parked": None}


@dataclass(frozen=True)
class _RowsInWindow:
    """Streams the rows of row groups that lie in a window.

    Apart from the window, whose parked cursor holds the stream: one that knew the window would keep both, with all that
    is decoded, until the garbage collector comes by.
    """

    dataset: Dataset
    schema: Schema
    window: Window
    piece_rows: int

    def of_all(self, spans: Sequence[Span]) -> Iterator[Rows]:
        for span in spans:
            yield from self.of(span)

    def of(self, span: Span) -> Iterator[Rows]:
        found = 0
        for rows in self.dataset.stream(span.group, tuple(self.dataset.layout.types), self.piece_rows):
            inside = rows if span.is_whole else rows_in_window(rows, self.schema.time, self.window)
            found += len(inside.positions)
            yield inside
        if found != span.num_rows:
            file, _ = self.dataset.place(span.group.position)
            raise TrafficError(f"traffic file {file}: was replaced while it was read; start again")


class _Cursor:
    """Takes rising ranges of rows out of a stream of pieces; `row` is the next row of the window."""

    def __init__(self, pieces: Iterator[Rows], row: int) -> None:
        self.row = row
        self._pieces = pieces
        self._left: Rows | None = None

    def take(self, start: int, stop: int) -> Rows:
        """The rows [start, stop) of the window; start must not lie before `row`."""
        parts: list[Rows] = []
        while self.row < stop:
            piece = self._left if self._left is not None else next(self._pieces)
            count = len(piece.positions)
            used = min(count, stop - self.row)
            skipped = min(max(start - self.row, 0), used)
            if skipped < used:
                parts.append(piece.part(skipped, used))
            self._left = piece.part(used, count) if used < count else None
            self.row += used
        return _joined(parts)


def _size_bytes(rows: Rows) -> int:
    return int(rows.columns.nbytes) + rows.positions.nbytes


def _joined(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    return Rows(pa.concat_batches([part.columns for part in parts]), np.concatenate([p.positions for p in parts]))
