"""An opened dataset: its files, their row groups, and how a row group is streamed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lowprec.core.errors import TrafficError
from lowprec.traffic.files.columns import Layout, check_columns, needed_columns, read_as
from lowprec.traffic.files.source import Source, SourceFile, find_files, open_parquet, unreadable
from lowprec.traffic.schema import Schema

__all__ = ["Dataset", "RowGroup", "Rows", "open_dataset"]

_PARQUET_UNITS = {"seconds": 10**9, "milliseconds": 10**6, "microseconds": 10**3, "nanoseconds": 1}
_NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


class RowGroup(NamedTuple):
    """One row group: which, how large, and its times where the file's statistics tell them.

    `position` is the position of its first row in the whole dataset; `num_values` counts the values of all needed
    columns; `times` is (earliest, latest) in the dataset's unit or None.
    """

    file: int
    group: int
    num_rows: int
    position: int
    num_values: int
    times: tuple[int, int] | None


class Rows(NamedTuple):
    """Some rows: their needed columns, in the types of the layout, and their positions in the whole dataset."""

    columns: pa.RecordBatch
    positions: NDArray[np.int64]

    def part(self, start: int, stop: int) -> Rows:
        """The rows [start, stop) of these."""
        return Rows(self.columns.slice(start, stop - start), self.positions[start:stop])


class Dataset:
    """The files of some traffic, checked against a schema. Picklable; keeps the file last read open."""

    def __init__(
        self, source: Source, layout: Layout, groups: tuple[RowGroup, ...], partition_types: Mapping[str, pa.DataType]
    ) -> None:
        self.source = source
        self.layout = layout
        self.groups = groups
        self._partition_types = dict(partition_types)
        first_rows = np.zeros(len(source.files) + 1, np.int64)
        for group in groups:
            first_rows[group.file + 1] += group.num_rows
        self._first_rows = np.cumsum(first_rows)
        self._open: tuple[int, pq.ParquetFile] | None = None

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return int(self._first_rows[-1])

    def place(self, position: int) -> tuple[str, int]:
        """The file that holds a row of the dataset, and the row's position in it."""
        file = int(np.searchsorted(self._first_rows, position, side="right")) - 1
        return self.source.files[file].name, int(position - self._first_rows[file])

    def stream(self, group: RowGroup, columns: Sequence[str], batch_size: int) -> Iterator[Rows]:
        """The rows of a row group in pieces of at most `batch_size`; memory does not depend on its size."""
        file = self.source.files[group.file]
        position = group.position
        try:
            opened = self._opened(group.file)
            if opened.metadata.num_row_groups <= group.group:
                raise TrafficError(f"traffic file {file.name}: was replaced while it was read; start again")
            stored = [name for name in columns if name in opened.schema_arrow.names]
            pieces = opened.iter_batches(batch_size, row_groups=[group.group], columns=stored, use_threads=False)
            for piece in pieces:
                yield Rows(self._typed(piece, columns, file), np.arange(position, position + piece.num_rows))
                position += piece.num_rows
        except (OSError, pa.ArrowException) as error:
            raise unreadable(file, error, part=f", row group {group.group}") from None
        if position != group.position + group.num_rows:
            raise TrafficError(
                f"traffic file {file.name}, row group {group.group}: expected {group.num_rows} rows, "
                f"read {position - group.position}; the file was replaced while it was read, start again"
            )

    def _opened(self, file: int) -> pq.ParquetFile:
        if self._open is None or self._open[0] != file:
            self._open = (file, open_parquet(self.source, self.source.files[file]))
        return self._open[1]

    def _typed(self, piece: pa.RecordBatch, columns: Sequence[str], file: SourceFile) -> pa.RecordBatch:
        arrays = []
        for name in columns:
            target = self.layout.types[name]
            if name in piece.schema.names:
                arrays.append(read_as(piece.column(name), target))
            else:
                # A column of a Delta table that was added after this file was written is null in it.
                constant = pa.scalar(file.partition.get(name)).cast(self._partition_types[name])
                arrays.append(read_as(pa.repeat(constant, piece.num_rows), target))
        return pa.RecordBatch.from_arrays(arrays, names=list(columns))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}


def open_dataset(path: str, schema: Schema, version: int | None = None) -> Dataset:
    """Read the footers of all files at `path` and check their columns; raises `TrafficError`.

    version: of a Delta table; the latest where it is None.
    """
    source = find_files(path, version)
    partition_types = source.columns or _partition_types(source.files)
    contents = []
    from_folders: list[set[str]] = []
    footers = []
    for file in source.files:
        opened = open_parquet(source, file)
        content = opened.schema_arrow
        # A column that a file has is read from the file, whatever its folders are called.
        from_folders.append({name for name in (*file.partition, *source.columns) if name not in content.names})
        for name in sorted(from_folders[-1]):
            content = content.append(pa.field(name, partition_types[name]))
        contents.append((file, content))
        # The first file is checked before the others are opened: a wrong config is told at once.
        if len(contents) == 1:
            check_columns(schema, contents)
        footers.append(_footer(opened, schema))
    layout = check_columns(schema, contents)
    groups: list[RowGroup] = []
    position = 0
    for index, footer in enumerate(footers):
        for number, (num_rows, num_values, times) in enumerate(footer):
            if schema.time is None:
                span = (position, position + num_rows - 1) if num_rows else None
            elif schema.time in from_folders[index]:
                span = _partition_times(source.files[index], schema.time, partition_types, layout)
            else:
                span = _in_unit(times, layout.time_unit)
            groups.append(RowGroup(index, number, num_rows, position, num_values, span))
            position += num_rows
    if position == 0:
        raise TrafficError(f"traffic {path}: holds no rows ({len(source.files)} Parquet files); check traffic.path")
    return Dataset(source, layout, tuple(groups), partition_types)


_Times = tuple[int, int, int]  # earliest, latest, nanoseconds of their unit (0: whatever the schema says)


def _footer(opened: pq.ParquetFile, schema: Schema) -> list[tuple[int, int, _Times | None]]:
    """Of each row group: rows, values of the needed columns, and its times."""
    metadata = opened.metadata
    needed = set(needed_columns(schema))
    paths = {path: i for i in range(metadata.num_columns) if _top(path := metadata.schema.column(i).path, needed)}
    time = None if schema.time is None else paths.get(schema.time)
    rows = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        num_values = sum(group.column(i).num_values for i in paths.values())
        rows.append((group.num_rows, num_values, None if time is None else _times(group.column(time), metadata, time)))
    return rows


def _top(path: str, needed: set[str]) -> bool:
    """Whether a leaf of the Parquet schema belongs to a needed column (a list's leaf is `name.list.element`)."""
    return path in needed or path.partition(".")[0] in needed


def _times(column: Any, metadata: Any, index: int) -> _Times | None:
    statistics = column.statistics
    if statistics is None or not statistics.has_min_max or column.physical_type not in ("INT32", "INT64"):
        return None
    logical = json.loads(metadata.schema.column(index).logical_type.to_json())
    if logical["Type"] == "Timestamp":
        return statistics.min_raw, statistics.max_raw, _PARQUET_UNITS[logical["timeUnit"]]
    if logical["Type"] == "Date":
        return statistics.min_raw, statistics.max_raw, 86400 * 10**9
    if logical["Type"] == "None" or (logical["Type"] == "Int" and logical["isSigned"]):
        return statistics.min_raw, statistics.max_raw, 0
    return None


def _in_unit(times: _Times | None, unit: str | None) -> tuple[int, int] | None:
    if times is None or unit is None:
        return None
    earliest, latest, nanoseconds = times
    if nanoseconds == 0:
        return earliest, latest
    # Arrow reads seconds as milliseconds and keeps the others, and the layout takes the finest, so this is exact.
    factor, remainder = divmod(nanoseconds, _NANOSECONDS[unit])
    return None if remainder else (earliest * factor, latest * factor)


def _partition_times(
    file: SourceFile, time: str, partition_types: Mapping[str, pa.DataType], layout: Layout
) -> tuple[int, int] | None:
    """The one time of a file whose time is a partition column; None where it is null."""
    try:
        value = pa.array([file.partition.get(time)]).cast(partition_types[time])
    except pa.ArrowInvalid:
        raise TrafficError(f"traffic file {file.name}: {time}={file.partition[time]} is not a date") from None
    moment = read_as(value, layout.types[time]).cast(pa.int64())[0].as_py()
    return None if moment is None else (moment, moment)


def _partition_types(files: Sequence[SourceFile]) -> dict[str, pa.DataType]:
    """Of each partition key: integers, dates (YYYY-MM-DD) or strings, whichever all of its values are."""
    values: dict[str, set[str]] = {}
    for file in files:
        for key, value in file.partition.items():
            values.setdefault(key, set()).update(() if value is None else (value,))
    types = {}
    for key, found in values.items():
        if all(re.fullmatch(r"[+-]?\d{1,18}", value) for value in found):
            types[key] = pa.int64()
        elif all(re.fullmatch(r"\d{4}-\d{2}-\d{2}", value) for value in found):
            types[key] = pa.date32()
        else:
            types[key] = pa.string()
    return types
