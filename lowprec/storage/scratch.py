"""The scratch folder for local copies of remote files."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lowprec.core.errors import StorageError

__all__ = ["SCRATCH_VARIABLE", "check_room", "is_full", "no_room", "scratch_file", "scratch_folder"]

SCRATCH_VARIABLE = "LOWPREC_SCRATCH"


def scratch_folder() -> Path:
    """The folder that LOWPREC_SCRATCH names, else one of this user below the system's temporary folder; made if needed.

    Raises `StorageError` where it cannot be made, or belongs to somebody else, who could change what is read from it.
    """
    given = os.environ.get(SCRATCH_VARIABLE)
    folder = Path(given) if given else Path(tempfile.gettempdir()) / f"lowprec-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise StorageError(
            f"scratch folder {folder}: cannot be made: {error.strerror or error}; set {SCRATCH_VARIABLE} to another"
        ) from None
    if not given and owner != os.getuid():
        raise StorageError(
            f"scratch folder {folder}: belongs to another user; set {SCRATCH_VARIABLE} to a folder of yours"
        )
    return folder


@contextlib.contextmanager
def scratch_file(name: str) -> Iterator[Path]:
    """A path to write a file to, which is gone afterwards; a full disk becomes a `StorageError`."""
    folder = scratch_folder()
    try:
        with tempfile.TemporaryDirectory(prefix="upload-", dir=folder) as own:
            yield Path(own) / name
    except OSError as error:
        raise no_room(folder, name) if is_full(error) else error from None


def check_room(folder: Path, name: str, size: int) -> None:
    """Raise `StorageError` where a file of `size` bytes does not fit into the folder."""
    if shutil.disk_usage(folder).free < size:
        raise no_room(folder, name, size)


def no_room(folder: Path, name: str, size: int | None = None) -> StorageError:
    """The error of a scratch folder whose disk is full."""
    needed = f" of {size / 1e9:,.3g} GB" if size is not None else ""
    return StorageError(
        f"scratch folder {folder}: has no room for {name}{needed} ({shutil.disk_usage(folder).free / 1e9:,.3g} GB are "
        f"free); make room, or set {SCRATCH_VARIABLE} to a folder on a larger disk"
    )


def is_full(error: OSError) -> bool:
    """Whether that is what an error says of a disk."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
