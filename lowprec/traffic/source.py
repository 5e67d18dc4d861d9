"""Where traffic lies: a path or a URL becomes a sorted list of Parquet files."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from lowprec.errors import LowprecError, TrafficError
from lowprec.storage import Location
from lowprec.storage.object_store import check_bucket, filesystem_of, is_of_the_store, sentence

__all__ = ["Source", "SourceFile", "find_files", "locate", "open_parquet", "unreadable"]

PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
# Read-ahead of one column. With it a column chunk is streamed page by page instead of being loaded whole, which is
# what keeps memory constant for any row-group size. An object store wants fewer, larger requests.
LOCAL_BUFFER_BYTES = 1 << 16
REMOTE_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    """One Parquet file. `path` is for the file system, `name` for people, `partition` from `key=value` folders."""

    path: str
    name: str
    partition: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """The files of a dataset, sorted by path, and the file system that holds them."""

    filesystem: pafs.FileSystem
    files: tuple[SourceFile, ...]


def find_files(path: str) -> Source:
    """The Parquet files at a file, a folder (at any depth) or a `pyarrow.fs` URL (`s3://`, `gs://`, `file://`).

    Hidden names (beginning with `.` or `_`) are left out. Raises `TrafficError` when nothing readable is there.
    """
    filesystem, root, prefix = locate(path)
    try:
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.NotFound:
            check_bucket(path)
            looked_from = Location.of(path).looked_from
            raise TrafficError(f"traffic {path}: there is no such file or folder{looked_from}; check traffic.path")
        if info.type == pafs.FileType.File:
            return Source(filesystem, (SourceFile(root, prefix + root),))
        found = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    except TrafficError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise TrafficError(f"traffic {path}: cannot be listed: {sentence(error, path)}") from None
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
