"""Per-channel and per-row statistics of each unit, written as Parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lowprec.core.errors import ExportError
from lowprec.debug.causes.rows import SeenRows
from lowprec.debug.sums import ErrorSums
from lowprec.storage.whole_file import whole_file

__all__ = ["write_arrays"]


def write_arrays(
    folder: Path,
    alone: Mapping[str, ErrorSums],
    accumulated: Mapping[str, ErrorSums],
    rows: Sequence[SeenRows],
) -> dict[str, str]:
    """Write `channels.parquet` and `rows.parquet` to a folder; returns their paths.

    channels: a row for each unit and output channel (value of a table's row), with mean squares of the reference and of
    the error, alone and accumulated, its mean, and its largest size. rows: one for each row of a table that the sample
    asked for, with hits, squared error and largest error. Raises `ExportError` where they cannot be written.
    """
    tables = {"channels": _channels(alone, accumulated), "rows": _rows(rows)}
    paths = {name: folder / f"{name}.parquet" for name in tables}
    try:
        for name, table in tables.items():
            with whole_file(paths[name]) as partial:
                pq.write_table(table, partial)
    except OSError as error:
        raise ExportError(f"debug {folder}: cannot be written: {error.strerror or error}") from None
    return {name: str(path) for name, path in paths.items()}


def _channels(alone: Mapping[str, ErrorSums], accumulated: Mapping[str, ErrorSums]) -> pa.Table:
    parts = []
    for unit, sums in alone.items():
        width, n = len(sums.error2), max(sums.num_summed, 1)
        parts.append(
            {
                "unit": [unit] * width,
                "channel": np.arange(width),
                "num_rows": np.full(width, sums.num_summed),
                "reference_mean_square": sums.reference2 / n,
                "error_mean_square": sums.error2 / n,
                "error_mean": sums.error / n,
                "error_max": sums.largest,
                "accumulated_error_mean_square": accumulated[unit].error2 / n,
                "accumulated_error_max": accumulated[unit].largest,
            }
        )
    return pa.concat_tables([pa.table(part) for part in parts])


def _rows(rows: Sequence[SeenRows]) -> pa.Table:
    empty = {"unit": pa.string(), "id": pa.int64(), "hits": pa.int64(), "error_square": pa.float64()}
    schema = pa.schema(empty | {"error_max": pa.float32()})
    parts = [schema.empty_table()]
    for seen in rows:
        with np.errstate(invalid="ignore", over="ignore"):
            largest = np.abs(seen.restored - seen.exact).max(axis=1)
        columns = [[seen.table] * len(seen.ids), seen.ids, seen.hits, seen.error2, largest]
        parts.append(pa.table(columns, schema=schema))
    return pa.concat_tables(parts)
