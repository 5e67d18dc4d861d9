"""Results on disk: append-only Delta tables under one root, a local folder or an object store."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from lowprec.errors import ResultsError
from lowprec.results.schema import TABLES, TableSchema, table_schema, to_arrow

__all__ = ["ResultsStore"]

# 15, the default, is too few: with 8 processes that append 40 times each, 6 appends of 320 failed.
_MAX_COMMIT_RETRIES = 1000
# Processes that create the same table at once both commit its metadata, and whoever commits at that moment fails with
# a conflict that Delta does not retry. Nothing of the failed commit is there, and the keys are checked again.
_APPEND_ATTEMPTS = 20


class ResultsStore:
    """The tables of `lowprec.results.schema` under `root`; one process at a time appends the rows of a run.

    What `append` has returned from is on disk, whatever is killed later. A process killed inside `append` may have
    committed: appending the same rows again is right then, because rows whose `row_key` is there are skipped.
    """

    def __init__(self, root: str | Path, storage_options: Mapping[str, str] | None = None) -> None:
        """Touch nothing yet. `storage_options` go to the object store's client."""
        self.root = str(root)
        self._storage_options = dict(storage_options or {}) or None

    def append(self, table_name: str, rows: Iterable[Mapping[str, Any]]) -> int:
        """Commit the rows that are not there yet, all at once, and return how many those were.

        A row has every column of the table but `committed_at`, and a `row_key` that a repetition would have too.
        Raises `ResultsError` when a row does not fit the table, or the root cannot be written.
        """
        schema = table_schema(table_name)
        new = to_arrow(schema, list(rows), datetime.now(UTC))
        if not new.num_rows:
            return 0
        for attempt in range(_APPEND_ATTEMPTS):
            try:
                return self._append_once(schema, new)
            except CommitFailedError as error:
                if attempt + 1 == _APPEND_ATTEMPTS:
                    raise self._error(schema, "cannot be written", error) from None
                time.sleep(random.uniform(0.01, 0.05))
            except ResultsError:
                raise
            except (DeltaError, OSError, pa.ArrowException) as error:
                raise self._error(schema, "cannot be written", error) from None
        raise AssertionError("unreachable")

    def read(self, table_name: str, **equals: str | int) -> pa.Table:
        """The rows whose columns have the given values, in the order of their commits, one for each `row_key`.

        Of `runs`, only the latest version of each run. A table that was never written has no rows.
        """
        schema = table_schema(table_name)
        dataset = self.dataset(table_name)
        condition = None
        for column, value in equals.items():
            equal = pads.field(column) == value
            condition = equal if condition is None else condition & equal
        try:
            found = dataset.to_table(filter=condition)
        except (DeltaError, OSError, pa.ArrowException) as error:
            raise self._error(schema, "cannot be read", error) from None
        return _visible(found, schema)

    def dataset(self, table_name: str) -> pads.Dataset:
        """The whole table as it was written, repetitions and old versions included; empty where it does not exist."""
        schema = table_schema(table_name)
        table = self._open(schema)
        if table is None:
            return pads.dataset(schema.arrow.empty_table())
        try:
            return _arrow_dataset(table)
        except (DeltaError, OSError, pa.ArrowException) as error:
            raise self._error(schema, "cannot be read", error) from None

    def check_not_empty(self) -> None:
        """Raise `ResultsError` when no table was ever written."""
        if all(self._open(schema) is None for schema in TABLES.values()):
            raise ResultsError(
                f"results root {self.root}: holds no results yet; run lowprec search CONFIG first, or name another root"
            )

    def artifact_dir(self, run_id: str) -> Path:
        """The folder for a run's files (plans, quarantined rows); the caller creates it.

        Below the root where that is local. An object store takes tables only: the files are then under `runs/` in the
        current folder of the process that writes them.
        """
        return (_local_path(self.root) or Path("runs")) / "artifacts" / run_id

    def _uri(self, schema: TableSchema) -> str:
        local = _local_path(self.root)
        return str(local / schema.name) if local is not None else f"{self.root.rstrip('/')}/{schema.name}"

    def _open(self, schema: TableSchema) -> DeltaTable | None:
        local = _local_path(self.root)
        if local is not None:
            self._check_local(local / schema.name, schema)
            if not (local / schema.name / "_delta_log").is_dir():
                return None
        try:
            table = DeltaTable(self._uri(schema), storage_options=self._storage_options)
            columns = pa.schema(table.schema().to_arrow())
        except TableNotFoundError:
            return None
        except (DeltaError, OSError, ValueError) as error:
            raise self._error(schema, "cannot be read", error) from None
        if {field.name: field.type for field in columns} != {field.name: field.type for field in schema.arrow}:
            differing = sorted({f"{f.name} {f.type}" for f in columns} ^ {f"{f.name} {f.type}" for f in schema.arrow})
            raise ResultsError(
                f"results table {schema.name} ({self._uri(schema)}): was written by another version of lowprec, which "
                f"had other columns ({', '.join(differing)}); choose another results.root"
            )
        return table

    def _append_once(self, schema: TableSchema, new: pa.Table) -> int:
        table = self._open(schema) or self._create(schema)
        new = new.filter(pc.invert(pc.is_in(new["row_key"], value_set=_known_keys(table, new["row_key"]))))
        if new.num_rows:
            properties = CommitProperties(max_commit_retries=_MAX_COMMIT_RETRIES)
            write_deltalake(table, new, mode="append", commit_properties=properties)
        return int(new.num_rows)

    def _create(self, schema: TableSchema) -> DeltaTable:
        local = _local_path(self.root)
        if local is not None:
            try:
                local.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ResultsError(
                    f"results root {self.root}: cannot be written: {error.strerror or error}; "
                    "make it writable or choose another results.root"
                ) from None
        return DeltaTable.create(self._uri(schema), schema.arrow, mode="ignore", storage_options=self._storage_options)

    def _check_local(self, folder: Path, schema: TableSchema) -> None:
        """Refuse a folder of something else: Delta would add its log to it."""
        try:
            strangers = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        except OSError as error:
            raise self._error(schema, "cannot be read", error) from None
        if folder.exists() and not folder.is_dir():
            raise ResultsError(f"results table {schema.name} ({folder}): is a file; choose another results.root")
        if strangers and "_delta_log" not in strangers:
            raise ResultsError(
                f"results table {schema.name} ({folder}): holds {', '.join(sorted(strangers)[:3])}, which is no Delta "
                "table; choose another results.root"
            )

    def _error(self, schema: TableSchema, what: str, error: Exception) -> ResultsError:
        lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
        # Delta puts the operating system's reason on a line of its own, before a list of stack frames.
        reason = " ".join(lines[: 2 if len(lines) > 1 and lines[1].startswith("Error:") else 1])
        return ResultsError(
            f"results table {schema.name} ({self._uri(schema)}): {what}: {reason or type(error).__name__}; "
            "check results.root and its permissions"
        )


def _arrow_dataset(table: DeltaTable) -> pads.Dataset:
    """The table's files as a dataset; local ones through Arrow's own file system.

    Through Delta's, which is called back in Python from Arrow's threads, processes that read and then ended were
    aborted now and then ("terminate called without an active exception", deltalake 1.6.6 with pyarrow 26.0.1).
    """
    local = _local_path(table.table_uri)
    if local is None:
        return table.to_pyarrow_dataset()
    return table.to_pyarrow_dataset(filesystem=pafs.SubTreeFileSystem(str(local), pafs.LocalFileSystem()))


def _known_keys(table: DeltaTable, keys: pa.ChunkedArray) -> pa.ChunkedArray:
    condition = pads.field("row_key").isin(keys.combine_chunks())
    return _arrow_dataset(table).to_table(columns=["row_key"], filter=condition)["row_key"]


def _visible(found: pa.Table, schema: TableSchema) -> pa.Table:
    """The rows that readers see, in the order of their commits."""
    found = found.select(schema.arrow.names).sort_by("committed_at")
    found = found.take(_last_of_each(found["row_key"]))
    if schema.entity is not None and schema.order is not None:
        order = pc.sort_indices(found, sort_keys=[(schema.order, "ascending")])
        entities = found[schema.entity].take(order)
        found = found.take(np.sort(order.to_numpy()[_last_of_each(entities)]))
    return found.combine_chunks()


def _last_of_each(keys: pa.ChunkedArray) -> np.ndarray[Any, np.dtype[np.int64]]:
    last = {key: index for index, key in enumerate(keys.to_pylist())}
    return np.array(sorted(last.values()), dtype=np.int64)


def _local_path(root: str) -> Path | None:
    """The folder that a root means, None for an object store."""
    if root.startswith("file://"):
        return Path(unquote(urlsplit(root).path))
    return None if "://" in root else Path(root)
