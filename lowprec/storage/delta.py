"""Delta's client: table addresses, and panics as errors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote

from lowprec.core.errors import StorageError, is_panic
from lowprec.storage.location import Location
from lowprec.storage.object_store import bucket_of, is_of_the_store, sentence

__all__ = ["LOG_FOLDER", "damage_of_log", "delta_address", "panics_as_errors"]

LOG_FOLDER = "_delta_log"

# Delta's client (1.6.6) takes a path for a URL: it panics at brackets, carets and bars, decodes %25 twice, turns a
# backslash into a slash and refuses control characters. With the path encoded it goes wrong elsewhere.
_UNUSABLE = re.compile(r"%[0-9A-Fa-f]{2}|[\[\]{}|^`\\\x00-\x1f\x7f\ud800-\udfff]")
# It ends a URL at these, and writes to another folder than the one that was named.
_UNUSABLE_IN_URL = re.compile(rf"{_UNUSABLE.pattern}|[#?]")

# What Delta's client (1.6.6) says of a log that is cut short, edited, or that misses a file.
_DAMAGED = re.compile(r"Kernel error: (Json|Arrow|Parquet) error|contiguous commit files|No table metadata or protocol")


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


def damage_of_log(error: BaseException, table: Location) -> str | None:
    """A clause on a table's log that is damaged; None where the error is about something else."""
    reason = sentence(error, table.text)
    if not _DAMAGED.search(reason) or is_of_the_store(error, table.text):
        return None
    log = table / LOG_FOLDER
    where = f"its log {log} is damaged"
    if (broken := _broken_commit(log)) is not None:
        where += f": {broken} is not a commit of Delta"
    return f"{where} ({reason.removeprefix('Kernel error: ')})"


def _broken_commit(log: Location) -> str | None:
    """The first commit of a local log that is not lines of JSON objects."""
    if log.is_url:
        return None
    for name in log.names():
        if not name.endswith(".json"):
            continue
        try:
            actions = [json.loads(line) for line in (log / name).read_bytes().splitlines() if line.strip()]
        except (OSError, ValueError):
            return name
        if not all(
            isinstance(action, dict) and all(isinstance(v, dict) for v in action.values()) for action in actions
        ):
            return name
    return None


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise a panic of a Rust library as `StorageError`: it is no `Exception`, and would pass all handlers."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise StorageError(f"the library panicked: {' '.join(str(error).split())}") from error
