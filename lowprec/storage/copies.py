"""Local copies of remote files, shared by the processes of a machine."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from lowprec.core.errors import StorageError
from lowprec.storage.location import FileState, Location
from lowprec.storage.scratch import check_room, is_full, no_room, scratch_folder
from lowprec.storage.whole_file import whole_file

__all__ = ["existing_copy", "local_copy"]


def local_copy(location: Location, state: FileState | None = None) -> Path:
    """The path of a file with the content of a location: itself where it is local, else a copy in the scratch folder.

    A copy is named for URL, size and version of the file, so it is made once, by whichever process comes first, while
    the others wait; copies of older versions go. state: raise `StorageError` where it is no longer that one. Raises
    `StorageError` naming the scratch folder where that has no room.
    """
    if (path := location.local) is not None:
        return path
    with location.open() as file:
        if state is not None and file.state != state:
            raise StorageError("it was changed while it was read; start again")
        folder, target = _place(location, file.state)
        with _alone(folder):
            if _is_there(target, file.state):
                return target
            # Nobody else writes here: what is there was left by a process that was killed, or is of an older version.
            for left in folder.iterdir():
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
            check_room(folder, str(location), file.state.size)
            try:
                with whole_file(target) as partial, partial.open("wb") as out:
                    for _, piece in file.pieces():
                        out.write(piece)
                    if location.state() != file.state:
                        raise StorageError("it was changed while it was copied; start again")
            except OSError as error:
                raise no_room(folder, str(location), file.state.size) if is_full(error) else error from None
    return target


def existing_copy(location: Location, state: FileState) -> Location:
    """A local file with that content where there is one, else the location itself."""
    if location.is_url:
        _, target = _place(location, state)
        if _is_there(target, state):
            return Location(str(target))
    return location


_LOCK = "lock"


def _place(location: Location, state: FileState) -> tuple[Path, Path]:
    """The folder of all copies of a location, and the path of this one in it."""
    folder = scratch_folder() / "copies" / _digest(location.text)
    return folder, folder / _digest(f"{state.size} {state.version}") / location.name


def _is_there(target: Path, state: FileState) -> bool:
    with contextlib.suppress(OSError):
        return target.stat().st_size == state.size
    return False


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other process of this machine writes to the folder; a lock goes with the process that holds it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
