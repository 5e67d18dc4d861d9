"""Bad rows: their file, and the limit on their share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from lowprec.core.errors import TrafficError
from lowprec.storage import AnyPath, Location
from lowprec.traffic.batch import BadRow

__all__ = ["check_bad_rows", "read_quarantine", "said_of_bad_rows", "write_quarantine"]

_SCHEMA = pa.schema({"file": pa.string(), "row": pa.int64(), "reason": pa.string(), "values": pa.string()})
_ROWS_AT_ONCE = 10_000


def write_quarantine(bad_rows: Iterable[BadRow], path: AnyPath) -> int:
    """Write bad rows to a Parquet file (columns file, row, reason, values), whole or not at all; returns how many.

    Rows are taken as they come, so an iterator over many is fine. Raises `TrafficError` where it cannot be written.
    """
    target = Location.of(path)
    count = 0
    rows = iter(bad_rows)
    try:
        with target.whole_file() as partial, pq.ParquetWriter(partial, _SCHEMA) as writer:
            while some := list(islice(rows, _ROWS_AT_ONCE)):
                writer.write_table(pa.Table.from_pylist([vars(row) for row in some], schema=_SCHEMA))
                count += len(some)
    except OSError as error:
        raise TrafficError(
            f"quarantine {target}: bad rows cannot be kept there: {error.strerror or error}; "
            "make the folder writable or choose another results.root"
        ) from None
    return count


def read_quarantine(path: AnyPath) -> tuple[BadRow, ...]:
    """The bad rows that `write_quarantine` kept; raises `TrafficError` when the file is not such a file."""
    try:
        rows = pq.ParquetFile(pa.BufferReader(Location.of(path).read_bytes())).read(columns=_SCHEMA.names).to_pylist()
        return tuple(BadRow(**row) for row in rows)
    except (OSError, pa.ArrowException, TypeError) as error:
        raise TrafficError(f"quarantine {path}: cannot be read: {' '.join(str(error).split())}") from None


def check_bad_rows(
    num_bad: int, num_rows: int, max_fraction: float, *, first: BadRow | None, quarantine_path: AnyPath
) -> None:
    """Raise `TrafficError` when more than `max_fraction` of `num_rows` rows (bad ones included) are bad.

    Asked after every batch with the rows of the whole window, it stops a hopeless run as early as that is certain.
    """
    if num_bad <= max_fraction * num_rows:
        return
    example = f"; the first is {first.file}, row {first.row}: {first.reason}" if first is not None else ""
    raise TrafficError(
        f"traffic: {num_bad} of {num_rows} rows are bad ({num_bad / num_rows:.3%}, at most {max_fraction:.3%} allowed)"
        f"{example}; all are kept in {quarantine_path}; mend the traffic, or raise traffic.max_bad_fraction to go on "
        "without them"
    )


def said_of_bad_rows(bad_rows: Sequence[BadRow]) -> list[str]:
    """A sentence about the rows of a sample that were left out; none where there were none."""
    if not bad_rows:
        return []
    first = bad_rows[0]
    return [
        f"{len(bad_rows)} bad rows of the sample were left out; the first is {first.file}, row {first.row}: "
        f"{first.reason}; mend the traffic (lowprec verify keeps all bad rows of a window in a file)"
    ]
