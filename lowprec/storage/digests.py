"""SHA-256 of files, cached for object stores."""

from __future__ import annotations

import contextlib
import hashlib

from lowprec.core.errors import StorageError
from lowprec.storage.copies import existing_copy
from lowprec.storage.location import FileState, Location
from lowprec.storage.scratch import scratch_folder
from lowprec.storage.whole_file import whole_file

__all__ = ["file_sha256"]

_HEX_DIGITS = 64


def file_sha256(location: Location, state: FileState) -> str:
    """Of a file in that state, in hex; raises `StorageError` where it is in another one.

    A file of an object store is read once: what was found is kept in the scratch folder by URL, size and version.
    """
    if not location.is_url:
        return _read(location, state)
    name = hashlib.sha256(f"{location} {state.size} {state.version}".encode()).hexdigest()
    kept = scratch_folder() / "sha256" / name
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if len(known := kept.read_text()) == _HEX_DIGITS and location.state() == state:
            return known
    found = _read(location, state)
    with contextlib.suppress(OSError), whole_file(kept) as partial:  # without it the file is read again
        partial.write_text(found)
    return found


def _read(location: Location, state: FileState) -> str:
    digest = hashlib.sha256()
    # A copy is what a model that was loaded here has been made of, and costs no second download.
    with existing_copy(location, state).open() as file:
        for _, piece in file.pieces():
            digest.update(piece)
    if location.state() != state:
        raise StorageError("it was changed while it was read; start again")
    return digest.hexdigest()
