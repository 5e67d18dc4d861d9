"""Where traffic lies: a path or a URL becomes a list of Parquet files in a fixed order."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from lowprec.core.errors import ConfigError, LowprecError, TrafficError
from lowprec.storage import Location
from lowprec.storage.object_store import check_bucket, filesystem_of, is_of_the_store, sentence
from lowprec.traffic.files.delta_table import LOG_FOLDER, enclosing_table, is_table, read_snapshot

__all__ = ["Source", "SourceFile", "find_files", "locate", "open_parquet", "unreadable"]

PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
# Read-ahead of one column. With it a column chunk is streamed page by page instead of being loaded whole, which is
# what keeps memory constant for any row-group size. An object store wants fewer, larger requests.
LOCAL_BUFFER_BYTES = 1 << 16
REMOTE_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    """One Parquet file. `path` is for the file system, `name` for people.

    partition: values of columns that are the same in all of its rows, from `key=value` folders (then they are text) or
    the log of a Delta table.
    """

    path: str
    name: str
    partition: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """The files of a dataset, sorted by path, and the file system that holds them.

    Of a Delta table, those of a version, in the order in which they were written, and the types of the table's columns:
    one that a file lacks is null in its rows.
    """

    filesystem: pafs.FileSystem
    files: tuple[SourceFile, ...]
    version: int | None = None
    columns: Mapping[str, pa.DataType] = field(default_factory=dict)


def find_files(path: str, version: int | None = None) -> Source:
    """The Parquet files at a file, a folder (at any depth) or a `pyarrow.fs` URL (`s3://`, `gs://`, `file://`).

    Hidden names (beginning with `.` or `_`) are left out. A Delta table has the files of its latest version, or of
    `version`. Raises `TrafficError` when nothing readable is there, or only a part of a table, `ConfigError` for a
    version of something that has none.
    """
    filesystem, root, prefix = locate(path)
    try:
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.NotFound:
            check_bucket(path)
            looked_from = Location.of(path).looked_from
            raise TrafficError(f"traffic {path}: there is no such file or folder{looked_from}; check traffic.path")
        if info.type == pafs.FileType.Directory and is_table(filesystem, root):
            return _of_delta(path, version, filesystem, root, prefix)
        if version is not None:
            raise ConfigError(
                f"traffic.version: version {version} is wanted (by the config, or by the run that is resumed), but "
                f"{path} is not a Delta table: it has no {LOG_FOLDER} folder; leave it out, or check traffic.path"
            )
        if (table := enclosing_table(filesystem, root)) is not None:
            raise TrafficError(
                f"traffic {path}: is a part of the Delta table {prefix}{table}, whose log says which rows are in it; "
                "set traffic.path to the table and choose rows by windows"
            )
        if info.type == pafs.FileType.File:
            return Source(filesystem, (SourceFile(root, prefix + root),))
        found = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    except (ConfigError, TrafficError):
        raise
    except (OSError, pa.ArrowException) as error:
        raise TrafficError(f"traffic {path}: cannot be listed: {sentence(error, path)}") from None
    _check_no_table_below(path, root, prefix, [entry.path for entry in found])
    files = []
    for entry in found:
        inner = posixpath.relpath(entry.path, root)
        hidden = any(part.startswith((".", "_")) for part in inner.split("/"))
        if entry.type == pafs.FileType.File and not hidden and entry.path.endswith(PARQUET_SUFFIXES):
            files.append(SourceFile(entry.path, prefix + entry.path, _partition(inner)))
    if not files:
        raise TrafficError(
            f"traffic {path}: the folder holds no Parquet file (a name ending in {', '.join(PARQUET_SUFFIXES)}) "
            f"among {len(found)} entries; check traffic.path"
        )
    return Source(filesystem, tuple(sorted(files, key=lambda file: file.path)))


def _of_delta(path: str, version: int | None, filesystem: pafs.FileSystem, root: str, prefix: str) -> Source:
    snapshot = read_snapshot(path, version)
    if not snapshot.files:
        raise TrafficError(f"traffic {path}: version {snapshot.version} of the Delta table has no rows")
    files = []
    for file in snapshot.files:
        inner = posixpath.join(root, file.path)
        files.append(SourceFile(inner, prefix + inner, file.partition))
    return Source(filesystem, tuple(files), snapshot.version, snapshot.columns)


def _check_no_table_below(path: str, root: str, prefix: str, entries: Sequence[str]) -> None:
    """Raise `TrafficError` for a folder of tables whose metadata says which of their files count."""
    for entry in sorted(entries):
        folder, name = posixpath.split(entry)
        if name == LOG_FOLDER:
            raise TrafficError(
                f"traffic {path}: the folder holds the Delta table {prefix}{folder}; set traffic.path to the table"
            )
        is_iceberg = name.endswith(".metadata.json") and posixpath.basename(folder) == "metadata"
        if is_iceberg or name == ".hoodie":
            kind = "an Iceberg" if is_iceberg else "a Hudi"
            where = "is" if (posixpath.dirname(folder) if is_iceberg else folder) == root else "holds"
            raise TrafficError(
                f"traffic {path}: {where} {kind} table, which is not supported; export its rows as Parquet files or as "
                "a Delta table"
            )


def locate(path: str) -> tuple[pafs.FileSystem, str, str]:
    """The file system of a path or URL, the path inside it, and what to put before such paths to show them."""
    scheme, separator, _ = path.partition("://")
    if not separator:
        return pafs.LocalFileSystem(), str(Location.of(path).absolute()), ""
    try:
        filesystem, inner = filesystem_of(path)
    except LowprecError:
        raise
    except (OSError, pa.ArrowException, ValueError) as error:
        raise TrafficError(f"traffic {path}: the URL cannot be opened: {sentence(error, path)}") from None
    return filesystem, inner, "" if scheme == "file" else f"{scheme}://"


def open_parquet(source: Source, file: SourceFile) -> pq.ParquetFile:
    """The opened file; raises `TrafficError` with its name when it is no Parquet, damaged, gone or out of reach."""
    is_local = isinstance(source.filesystem, pafs.LocalFileSystem)
    try:
        return pq.ParquetFile(
            file.path,
            filesystem=source.filesystem,
            pre_buffer=False,
            buffer_size=LOCAL_BUFFER_BYTES if is_local else REMOTE_BUFFER_BYTES,
            page_checksum_verification=True,
        )
    except FileNotFoundError as error:
        if source.version is None:
            raise unreadable(file, error) from None
        raise TrafficError(
            f"traffic file {file.name}: belongs to version {source.version} of the Delta table, but is gone (removed "
            "by VACUUM?); restore it, or read another version (traffic.version, in a new run)"
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise unreadable(file, error, what="cannot be read as Parquet") from None


def unreadable(file: SourceFile, error: Exception, *, part: str = "", what: str = "cannot be read") -> TrafficError:
    """The error for a file, or a part of it: as damaged, unless the system or the store says why it gave nothing."""
    where = f"traffic file {file.name}{part}"
    if isinstance(error, OSError) and error.errno is not None:
        return TrafficError(f"{where}: cannot be read: {os.strerror(error.errno)}; check the file and its permissions")
    reason = sentence(error, file.name)
    if is_of_the_store(error, file.name):
        return TrafficError(f"{where}: cannot be read: {reason}")
    return TrafficError(
        f"{where}: {what} (truncated or corrupt?): {reason}; write or copy it again, or take it out of traffic.path"
    )


def _partition(inner: str) -> dict[str, str | None]:
    values: dict[str, Any] = {}
    for part in inner.split("/")[:-1]:
        key, separator, value = part.partition("=")
        if separator and key:
            values[unquote(key)] = None if value == NULL_PARTITION else unquote(value)
    return values
