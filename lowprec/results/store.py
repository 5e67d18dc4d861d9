"""Results on disk: append-only Delta tables under one root, a local folder or an object store."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from itertools import takewhile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from lowprec.core.errors import ResultsError, StorageError
from lowprec.results.schema import SCHEMA_VERSION, TABLES, TableSchema, table_schema, to_arrow
from lowprec.storage import AnyPath, Location
from lowprec.storage.delta import damage_of_log, delta_address, panics_as_errors
from lowprec.storage.object_store import bucket_of, delta_options, filesystem_of, sentence

__all__ = ["ResultsStore"]

# 15, the default, is too few: with 8 processes that append 40 times each, 6 appends of 320 failed.
_MAX_COMMIT_RETRIES = 1000
# Processes that create the same table at once both commit its metadata, and whoever commits at that moment fails with
# a conflict that Delta does not retry. Nothing of the failed commit is there, and the keys are checked again.
_APPEND_ATTEMPTS = 20
_DESCRIPTION = "lowprec results, schema "
# What the system's errors ENOSPC and EDQUOT are called in Delta's.
_FULL = re.compile(r"No space left on device|quota exceeded|os error (28|122)\b")


class ResultsStore:
    """The tables of `lowprec.results.schema` under `root`; one process at a time appends the rows of a run.

    The root is a folder or the URL of an object store. Processes may append to the same root at once: a commit is a
    file that is created only where there is none (on an object store by a conditional put, `If-None-Match: *`).

    What `append` has returned from is on disk, whatever is killed later. A process killed inside `append` may have
    committed: appending the same rows again is right then, because rows whose `row_key` is there are skipped.
    """

    def __init__(self, root: AnyPath) -> None:
        """Touch nothing yet; raises `ResultsError` for a root that Delta's client would take for another one."""
        self.root = str(root)
        self._root = Location.of(root)
        if self._root.is_url and ("?" in self.root or "@" in bucket_of(self.root)):
            raise ResultsError(
                f"results root {self.root}: a URL of results takes no options and no keys; set them in the environment "
                "(AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
            )
        try:
            self._address = delta_address(self._root)
        except StorageError as error:
            raise ResultsError(f"results root {self.root}: {error} for results.root") from None
        # The keys that the last append to each table returned from.
        self._kept: dict[str, pa.Array] = {}

    def append(self, table_name: str, rows: Iterable[Mapping[str, Any]], *, exclusive: str | None = None) -> int:
        """Commit the rows that are not there yet, all at once, and return how many those were.

        A row has every column of the table but `committed_at`, and a `row_key` that a repetition would have too.
        `exclusive` names what several processes may append at the same moment: of equal rows one is kept then, where
        without it both may be in the table's files (and readers see one).
        Raises `ResultsError` when a row does not fit the table, the root cannot be written, or what the last append
        wrote is no longer there (`check_kept`).
        """
        schema = table_schema(table_name)
        new = to_arrow(schema, list(rows), datetime.now(UTC))
        if not new.num_rows:
            return 0
        for attempt in range(_APPEND_ATTEMPTS):
            try:
                num_new = self._append_once(schema, new, exclusive)
                self._kept[table_name] = new["row_key"].combine_chunks()
                return num_new
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

    def check_kept(self) -> None:
        """Raise `ResultsError` where rows that `append` has returned from are not there: somebody else removed them.

        A store that takes a conditional put and overwrites all the same does that, when two processes commit at once.
        """
        for name in self._kept:
            schema = table_schema(name)
            table = self._open(schema)
            keys = pa.chunked_array([self._last_keys(schema)])
            try:
                known = keys.slice(0, 0) if table is None else _known_keys(table, keys)
            except (DeltaError, OSError, pa.ArrowException) as error:
                raise self._error(schema, "cannot be read", error) from None
            self._check_there(schema, known)

    def artifacts(self, run_id: str) -> Location:
        """The folder for a run's files (plans, profile, quarantined rows), below the root; made when one is written."""
        return self._root / "artifacts" / run_id

    def _place(self, schema: TableSchema) -> Location:
        return self._root / schema.name

    def _table(self, schema: TableSchema) -> str:
        return f"{self._address}/{schema.name}"

    def _options(self) -> dict[str, str] | None:
        return delta_options(self._root.text) if self._root.is_url else None

    def _open(self, schema: TableSchema) -> DeltaTable | None:
        place = self._place(schema)
        if place.local is not None:
            self._check_folder(schema)
            if (place / "_delta_log").kind() != "folder":
                return None
        try:
            with panics_as_errors():
                table = DeltaTable(self._table(schema), storage_options=self._options())
                columns = pa.schema(table.schema().to_arrow())
        except TableNotFoundError:
            self._check_folder(schema)
            return None
        except (DeltaError, OSError, ValueError) as error:
            raise self._error(schema, "cannot be read", error) from None
        if (version := _schema_version(table)) != SCHEMA_VERSION:
            raise ResultsError(
                f"results table {schema.name} ({place}): has results schema {version}, this version of lowprec reads "
                f"and writes schema {SCHEMA_VERSION}; choose another results.root, or query it with the version that "
                "wrote it"
            )
        if {field.name: field.type for field in columns} != {field.name: field.type for field in schema.arrow}:
            differing = sorted({f"{f.name} {f.type}" for f in columns} ^ {f"{f.name} {f.type}" for f in schema.arrow})
            raise ResultsError(
                f"results table {schema.name} ({place}): was written by another version of lowprec, which had "
                f"other columns ({', '.join(differing)}); choose another results.root"
            )
        return table

    def _append_once(self, schema: TableSchema, new: pa.Table, exclusive: str | None) -> int:
        table = self._open(schema) or self._create(schema)
        known = _known_keys(table, pa.chunked_array([*new["row_key"].chunks, self._last_keys(schema)]))
        self._check_there(schema, known)
        new = new.filter(pc.invert(pc.is_in(new["row_key"], value_set=known)))
        if new.num_rows:
            # Two commits of one transaction application conflict if neither has seen the other: the second looks for
            # its keys again.
            application = (
                [Transaction(exclusive, (table.transaction_version(exclusive) or 0) + 1)] if exclusive else None
            )
            properties = CommitProperties(max_commit_retries=_MAX_COMMIT_RETRIES, app_transactions=application)
            with panics_as_errors():
                write_deltalake(table, new, mode="append", commit_properties=properties)
        return int(new.num_rows)

    def _last_keys(self, schema: TableSchema) -> pa.Array:
        return self._kept.get(schema.name, pa.array([], pa.string()))

    def _check_there(self, schema: TableSchema, known: pa.ChunkedArray) -> None:
        """Raise where the keys of the last append are not among those that the table knows."""
        last = self._last_keys(schema)
        if lost := len(last) - pc.sum(pc.is_in(last, value_set=known), min_count=0).as_py():
            raise ResultsError(
                f"results table {schema.name} ({self._place(schema)}): {lost} rows that were committed are gone: "
                "somebody removed them, or the store overwrites what a conditional put (If-None-Match: *) must leave "
                "alone; keep results in another store, or start one process at a time, and resume the run"
            )

    def _create(self, schema: TableSchema) -> DeltaTable:
        if (folder := self._root.local) is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ResultsError(
                    f"results root {self.root}: cannot be written: {error.strerror or error}; "
                    "make it writable or choose another results.root"
                ) from None
        with panics_as_errors():
            return DeltaTable.create(
                self._table(schema),
                schema.arrow,
                mode="ignore",
                description=f"{_DESCRIPTION}{SCHEMA_VERSION}",
                storage_options=self._options(),
            )

    def _check_folder(self, schema: TableSchema) -> None:
        """Refuse a folder of something else: Delta would add its log to it."""
        place = self._place(schema)
        try:
            kind = place.kind()
            names = place.names() if kind == "folder" and (place / "_delta_log").kind() is None else []
        except OSError as error:
            raise self._error(schema, "cannot be read", error) from None
        if kind == "file":
            raise ResultsError(f"results table {schema.name} ({place}): is a file; choose another results.root")
        # Another process may have begun to create the table since then.
        if names and "_delta_log" not in names:
            raise ResultsError(
                f"results table {schema.name} ({place}): holds {', '.join(names[:3])}, which is no Delta table; "
                "choose another results.root"
            )

    def _error(self, schema: TableSchema, what: str, error: Exception) -> ResultsError:
        if (damage := damage_of_log(error, self._place(schema))) is not None:
            return ResultsError(
                f"results table {schema.name} ({self._place(schema)}): {what}: {damage}; restore the log from a copy, "
                "or choose another results.root"
            )
        if self._root.is_url:
            return ResultsError(
                f"results table {schema.name} ({self._place(schema)}): {what}: {sentence(error, self._root.text)}"
            )
        reason = _reason(error)
        if _FULL.search(reason):
            advice = "no space is left there; make room, or choose another results.root"
        else:
            advice = f"{reason}; check results.root and its permissions"
        return ResultsError(f"results table {schema.name} ({self._place(schema)}): {what}: {advice}")


def _schema_version(table: DeltaTable) -> int:
    """The results schema of a table; 1 for tables from before schemas had a number."""
    found = re.fullmatch(rf"{_DESCRIPTION}(\d+)", table.metadata().description or "")
    return int(found[1]) if found else 1


def _reason(error: Exception) -> str:
    """What Delta says of a folder, in one line: its causes, which come one below the other, but no stack frames."""
    plain = re.sub("\x1b\\[[0-9;]*m", "", str(error))
    first, *others = [" ".join(line.split()) for line in plain.splitlines() if line.strip()] or [type(error).__name__]
    causes = takewhile(lambda line: line.startswith(("Error:", "↳")), others)
    return first + "".join(f": {line[1:].strip()}" if line[0] == "↳" else f" {line}" for line in causes)


def _arrow_dataset(table: DeltaTable) -> pads.Dataset:
    """The table's files as a dataset, through Arrow's own file system.

    Through Delta's, which is called back in Python from Arrow's threads, processes that read and then ended were
    aborted now and then ("terminate called without an active exception", deltalake 1.6.6 with pyarrow 26.0.1).
    """
    place = Location.of(table.table_uri)
    filesystem, inner = (pafs.LocalFileSystem(), place.text) if not place.is_url else filesystem_of(place.text)
    return table.to_pyarrow_dataset(filesystem=pafs.SubTreeFileSystem(inner, filesystem))


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
