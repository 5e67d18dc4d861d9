"""Traffic that is a Delta table: the files of one version, read from the table's log.

The folder of a table also holds the files of earlier versions: after a compaction every row would count twice, and
deleted rows would still be there.
"""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from lowprec.core.errors import ConfigError, StorageError, TrafficError
from lowprec.storage import Location
from lowprec.storage.delta import LOG_FOLDER, damage_of_log, delta_address, panics_as_errors
from lowprec.storage.object_store import delta_options, sentence

__all__ = ["LOG_FOLDER", "DeltaFile", "DeltaSnapshot", "enclosing_table", "is_table", "read_snapshot"]

# With these a table is its Parquet files, one column for each of the schema's by the same name. (What widens types is
# undone where columns of several files become one type.)
_READABLE_FEATURES = {
    "timestampNtz",
    "typeWidening",
    "typeWidening-preview",
    "v2Checkpoint",
    "vacuumProtocolCheck",
    "variantType",
    "variantType-preview",
}
_DELETION_VECTORS = "deletionVectors"


@dataclass(frozen=True)
class DeltaFile:
    """A data file: its path below the table's root, and the values of the partition columns."""

    path: str
    partition: Mapping[str, Any]


@dataclass(frozen=True)
class DeltaSnapshot:
    """One version of a table: its files in the order in which they were written, and its columns."""

    version: int
    files: tuple[DeltaFile, ...]
    columns: Mapping[str, pa.DataType]


def is_table(filesystem: pafs.FileSystem, root: str) -> bool:
    """Whether a folder has a Delta log."""
    log = filesystem.get_file_info(posixpath.join(root, LOG_FOLDER))
    return bool(log.type == pafs.FileType.Directory)


def enclosing_table(filesystem: pafs.FileSystem, root: str) -> str | None:
    """The folder above `root` that is a Delta table, None where there is none or it cannot be looked at."""
    folder = posixpath.dirname(root)
    while folder not in ("", "/"):
        with contextlib.suppress(OSError, pa.ArrowException):
            if is_table(filesystem, folder):
                return folder
        folder = posixpath.dirname(folder)
    return None


def read_snapshot(path: str, version: int | None) -> DeltaSnapshot:
    """The version of the Delta table at a path or URL, the latest where `version` is None.

    Raises `ConfigError` where the table has no such version, `TrafficError` where its log cannot be read, or where its
    Parquet files are not its rows (deletion vectors, renamed columns, features that are not known).
    """
    where = Location.of(path)
    try:
        with panics_as_errors():
            table = _open(where, version)
            _check_features(table, path)
            # Both come as tables of another Arrow library.
            columns: pa.Schema = pa.schema(table.schema().to_arrow())
            actions = pa.table(table.get_add_actions(flatten=True)).to_pylist()
            return DeltaSnapshot(
                version=table.version(),
                files=_files(actions, table.metadata().partition_columns, path),
                columns={field.name: field.type for field in columns},
            )
    except TableNotFoundError:
        raise TrafficError(
            f"traffic {path}: has a {LOG_FOLDER} folder without a commit, so the Delta table is not written yet; wait "
            "for its first commit, or check traffic.path"
        ) from None
    except StorageError as error:
        raise TrafficError(f"traffic {path}: cannot be read as a Delta table: {error}") from None
    except (DeltaError, OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, ConfigError | TrafficError):
            raise
        which = "" if version is None else f" at version {version}"
        if (damage := damage_of_log(error, where)) is not None:
            raise TrafficError(
                f"traffic {path}: cannot be read as a Delta table{which}: {damage}; restore the log from a copy, or "
                "write the rows to a new table"
            ) from None
        reason = sentence(error, path)
        raise TrafficError(f"traffic {path}: cannot be read as a Delta table{which}: {reason}") from None


def _open(where: Location, version: int | None) -> DeltaTable:
    address = delta_address(where)
    options = delta_options(address) if where.is_url else None
    try:
        return DeltaTable(address, version=version, storage_options=options)
    except DeltaError:
        if version is not None and version > (latest := DeltaTable(address, storage_options=options).version()):
            raise ConfigError(
                f"traffic.version: the Delta table {where} has no version {version}: its latest is {latest}"
            ) from None
        raise


def _check_features(table: DeltaTable, path: str) -> None:
    """Raise `TrafficError` where rows of the table are not the rows of its files as they stand."""
    features = set(table.protocol().reader_features or ())
    mapping = table.metadata().configuration.get("delta.columnMapping.mode", "none")
    if mapping != "none":
        raise TrafficError(
            f"traffic {path}: the Delta table maps columns by {mapping} (delta.columnMapping.mode), which is not "
            "supported; write the rows to a table without column mapping"
        )
    if _DELETION_VECTORS in features and _has_deleted_rows(table):
        raise TrafficError(
            f"traffic {path}: version {table.version()} of the Delta table marks rows as deleted by deletion vectors, "
            "which is not supported; rewrite its files (REORG TABLE ... APPLY (PURGE)), and set "
            "delta.enableDeletionVectors to false"
        )
    # Column mapping that is off changes nothing.
    unknown = features - _READABLE_FEATURES - {_DELETION_VECTORS, "columnMapping"}
    if unknown:
        raise TrafficError(
            f"traffic {path}: the Delta table needs reader features that are not supported: "
            f"{', '.join(sorted(unknown))}; write the rows to a table without them"
        )


def _has_deleted_rows(table: DeltaTable) -> bool:
    try:
        return any(pa.record_batch(batch).num_rows for batch in table.deletion_vectors())
    except DeltaError:  # there is one that the client cannot read, or features that it needs for that
        return True


def _files(actions: list[dict[str, Any]], partition_columns: list[str], path: str) -> tuple[DeltaFile, ...]:
    # Rows that are appended come after those that are there, as windows by row positions need it.
    ordered = sorted(actions, key=lambda action: (action["modification_time"], action["path"]))
    files = []
    for action in ordered:
        if "://" in action["path"] or action["path"].startswith("/"):
            raise TrafficError(
                f"traffic {path}: the Delta table refers to a file of another table, {action['path']} (a shallow "
                "clone?), which is not supported; write the rows to a table of their own"
            )
        values = {name: action[f"partition.{name}"] for name in partition_columns}
        files.append(DeltaFile(unquote(action["path"]), values))
    return tuple(files)
