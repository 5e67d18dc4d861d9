"""A file or folder by path or URL."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, unquote

import numpy as np

from lowprec.core.errors import ConfigError, LowprecError, StorageError
from lowprec.storage.scratch import scratch_file
from lowprec.storage.whole_file import whole_file

if TYPE_CHECKING:
    import pyarrow.fs as pafs
    from numpy.typing import NDArray

__all__ = ["AnyPath", "FileState", "Location", "OpenFile"]

# A request of an object store has its price, and memory is what the pieces in flight take.
PIECE_BYTES = 8 << 20
PIECES_IN_FLIGHT = 4


@dataclass(frozen=True)
class FileState:
    """How large a file is, and a word that is another one when it was replaced."""

    size: int
    version: str


@dataclass(frozen=True)
class Location:
    """A path of this machine, or the URL of an object store (`s3://`, `gs://`, whatever `pyarrow.fs` knows).

    Nothing is opened before it is asked for. Methods raise `OSError`, whose reason is one clause without the name of
    the file: `FileNotFoundError` where there is none, `StorageError` for what an object store says.
    """

    text: str

    @classmethod
    def of(cls, where: AnyPath) -> Location:
        """The location that a path, a URL or a location means; `~` is the user's home folder.

        Raises `ConfigError` for a URL that became a path.
        """
        if isinstance(where, Location):
            return where
        text = str(where)
        if text.startswith("file://"):
            # Not by `urlsplit`, which ends a path at "#" and "?".
            return cls("/" + unquote(text.removeprefix("file://").partition("/")[2]))
        if "://" in text:
            return cls(text.rstrip("/"))
        if isinstance(where, Path) and re.match(r"[a-z][a-z0-9+]+:/", text):
            raise ConfigError(f'"{text}": give a URL as text, because a Path takes a slash out of it')
        return cls(str(Path(os.path.expanduser(text))))

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> Location:
        """What has that name in a folder, as `names` gives it, or a path of several names with slashes between them."""
        return Location(f"{self.text}/{quote(name)}" if self.is_url else str(Path(self.text) / name))

    @property
    def is_url(self) -> bool:
        """Whether it is on an object store."""
        return "://" in self.text

    @property
    def local(self) -> Path | None:
        """The path, None of a URL."""
        return None if self.is_url else Path(self.text)

    @property
    def name(self) -> str:
        """The last part of it, as `names` gives it."""
        name = PurePosixPath(self.text).name
        return unquote(name) if self.is_url else name

    @property
    def parent(self) -> Location:
        """The folder that it is in."""
        return Location(self.text.rpartition("/")[0] if self.is_url else str(Path(self.text).parent))

    @property
    def looked_from(self) -> str:
        """For a message that nothing is there: the folder that a relative path was looked up from, in brackets."""
        return "" if self.is_url or Path(self.text).is_absolute() else f" (looked up from {os.getcwd()})"

    def absolute(self) -> Location:
        """The same wherever the current folder is."""
        return self if self.is_url else Location(os.path.abspath(self.text))

    def kind(self) -> Literal["file", "folder"] | None:
        """What is there; None where nothing is. Raises `StorageError` where a bucket is not there either."""
        if (path := self.local) is not None:
            return _local_kind(path)
        with self._clear():
            import pyarrow.fs as pafs

            from lowprec.storage.object_store import check_bucket

            filesystem, inner = self._filesystem()
            found = filesystem.get_file_info(inner).type
            if found == pafs.FileType.NotFound:
                check_bucket(self.text)
                return None
            return "folder" if found == pafs.FileType.Directory else "file"

    def names(self) -> list[str]:
        """The names of the files and folders in a folder, sorted; none where there is no folder."""
        if (path := self.local) is not None:
            return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        with self._clear():
            import pyarrow.fs as pafs

            filesystem, inner = self._filesystem()
            entries = filesystem.get_file_info(pafs.FileSelector(inner, allow_not_found=True))
            return sorted(entry.base_name for entry in entries)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Which of these files, named from the folder, are not there, sorted; each folder is listed once."""
        wanted = {name: (self / name).parent for name in names}
        there = {folder: set(folder.names()) for folder in set(wanted.values())}
        return sorted(name for name, folder in wanted.items() if PurePosixPath(name).name not in there[folder])

    @contextlib.contextmanager
    def open(self) -> Iterator[OpenFile]:
        """The file opened for reading."""
        if (path := self.local) is not None:
            with path.open("rb", buffering=0) as file:
                number = file.fileno()
                status = os.fstat(number)
                state = FileState(status.st_size, f"{status.st_ino} {status.st_mtime_ns}")
                yield OpenFile(self, state, lambda size, offset: os.pread(number, size, offset))
            return
        with self._clear():
            filesystem, inner = self._filesystem()
            opened = filesystem.open_input_file(inner)
        with opened:
            yield OpenFile(self, _remote_state(opened, filesystem, inner), self._reading(opened.read_at))

    def state(self) -> FileState:
        """Its size and version now."""
        with self.open() as file:
            return file.state

    def read_bytes(self) -> bytes:
        """All of a small file."""
        with self.open() as file:
            return file.read()

    @contextlib.contextmanager
    def whole_file(self) -> Iterator[Path]:
        """A path of this machine to write to: what is there when the block ends well becomes the file, whole.

        A local file is renamed, as `lowprec.storage.whole_file` says; to an object store it goes by one upload, which
        nobody sees before it is complete.
        """
        if (path := self.local) is not None:
            with whole_file(path) as partial:
                yield partial
            return
        with scratch_file(self.name) as partial:
            yield partial
            with self._clear():
                import pyarrow.fs as pafs

                filesystem, inner = self._filesystem()
                # Arrow's own stream would complete the upload when an exception closes it.
                pafs.copy_files(
                    str(partial),
                    inner,
                    source_filesystem=pafs.LocalFileSystem(),
                    destination_filesystem=filesystem,
                    chunk_size=PIECE_BYTES,
                )

    def _filesystem(self) -> tuple[pafs.FileSystem, str]:
        from lowprec.storage.object_store import filesystem_of

        return filesystem_of(self.text)

    def _reading(self, read_at: Callable[[int, int], bytes]) -> Callable[[int, int], bytes]:
        def read(size: int, offset: int) -> bytes:
            with self._clear():
                return read_at(size, offset)

        return read

    @contextlib.contextmanager
    def _clear(self) -> Iterator[None]:
        """Errors of Arrow in words."""
        import pyarrow as pa

        from lowprec.storage.object_store import check_bucket, sentence

        try:
            yield
        except LowprecError:
            raise
        except FileNotFoundError:
            check_bucket(self.text)
            raise FileNotFoundError(errno.ENOENT, "there is no such file") from None
        except (OSError, pa.ArrowException, ValueError) as error:
            raise StorageError(sentence(error, self.text)) from None


# What `Location.of` takes.
AnyPath = str | Path | Location


class OpenFile:
    """A file that is read by position, also by several threads at once. `state` is that of when it was opened."""

    def __init__(self, location: Location, state: FileState, read_at: Callable[[int, int], bytes]) -> None:
        self.location, self.state = location, state
        self._read_at = read_at

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes [start, stop); raises `StorageError` where the file ends before."""
        pieces = [piece for _, piece in self.pieces(start, stop)]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_into(self, out: NDArray[np.uint8], start: int) -> None:
        """Fill `out` with the bytes from `start` on; raises `StorageError` where the file ends before."""
        for begin, piece in self.pieces(start, start + len(out)):
            out[begin - start : begin - start + len(piece)] = np.frombuffer(piece, np.uint8)

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
        """The bytes [start, stop) in order, as pieces of bounded size, each with where in the file it begins.

        Of an object store the next pieces are asked for while one is used.
        """
        stop = self.state.size if stop is None else stop
        starts = range(start, stop, PIECE_BYTES)
        if not self.location.is_url or len(starts) < 2:
            yield from ((k, self._piece(k, min(k + PIECE_BYTES, stop))) for k in starts)
            return
        with ThreadPoolExecutor(PIECES_IN_FLIGHT) as pool:
            asked: deque[tuple[int, Future[bytes]]] = deque()
            for k in starts:
                asked.append((k, pool.submit(self._piece, k, min(k + PIECE_BYTES, stop))))
                if len(asked) == PIECES_IN_FLIGHT:
                    begin, piece = asked.popleft()
                    yield begin, piece.result()
            while asked:
                begin, piece = asked.popleft()
                yield begin, piece.result()

    def _piece(self, start: int, stop: int) -> bytes:
        found = self._read_at(stop - start, start)
        if len(found) < stop - start:
            raise StorageError(f"it is cut short: bytes {start} to {stop} are wanted, it ends at {start + len(found)}")
        return found


def _remote_state(opened: Any, filesystem: pafs.FileSystem, inner: str) -> FileState:
    told = opened.metadata() or {}
    for name in ("ETag", "etag", "generation", "Last-Modified"):
        if name in told:
            word = told[name]
            return FileState(opened.size(), word.decode() if isinstance(word, bytes) else str(word))
    return FileState(opened.size(), str(filesystem.get_file_info(inner).mtime_ns))


def _local_kind(path: Path) -> Literal["file", "folder"] | None:
    """What is at a path, from one call: between two of them another process may make the folder."""
    try:
        mode = path.stat().st_mode
    except ValueError:  # a name with a null byte
        return None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
    return "folder" if stat.S_ISDIR(mode) else "file"
