"""Delta's client: the address by which it finds a table, and its panics as errors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote

from lowprec.errors import StorageError, is_panic
from lowprec.storage.location import Location
from lowprec.storage.object_store import bucket_of

__all__ = ["delta_address", "panics_as_errors"]

# Delta's client (1.6.6) takes a path for a URL: it panics at brackets, carets and bars, decodes %25 twice, turns a
# backslash into a slash and refuses control characters. With the path encoded it goes wrong elsewhere.
_UNUSABLE = re.compile(r"%[0-9A-Fa-f]{2}|[\[\]{}|^`\\\x00-\x1f\x7f\ud800-\udfff]")
# It ends a URL at these, and writes to another folder than the one that was named.
_UNUSABLE_IN_URL = re.compile(rf"{_UNUSABLE.pattern}|[#?]")


def delta_address(where: Location) -> str:
    """What names the Delta table at a location to Delta's client: an absolute path, or the URL.

    Raises `StorageError`, whose reason is one clause, for a path that the client would take for another one.
    """
    if where.is_url:
        found = _all_of(_UNUSABLE_IN_URL, unquote(where.text)) or _all_of(re.compile("[#?]"), where.text)
        if not found and "@" in bucket_of(where.text):
            raise StorageError(
                "the URL of a Delta table takes no keys; set them in the environment (AWS_ENDPOINT_URL, AWS_REGION, "
                "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
            )
        shown = where.text
    else:
        # Links are followed before the path becomes a URL.
        shown = os.path.realpath(where.text)
        found = _all_of(_UNUSABLE, shown)
    if found:
        raise StorageError(
            f"Delta's client cannot use a path with {' and '.join(map(repr, found))} in it ({shown!r}); choose another "
            "path"
        )
    return shown


def _all_of(pattern: re.Pattern[str], text: str) -> list[str]:
    """What a pattern finds in a text, each once: one message names all that has to change."""
    return list(dict.fromkeys(pattern.findall(text)))


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise a panic of a Rust library as `StorageError`: it is no `Exception`, and would pass all handlers."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise StorageError(f"the library panicked: {' '.join(str(error).split())}") from error
