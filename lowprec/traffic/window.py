"""Windows: half-open ranges of time, and how they are written and read."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from lowprec.core.errors import ConfigError
from lowprec.traffic.schema import TimeUnit

__all__ = ["Window", "days_of", "format_time", "format_window", "overlap", "parse_time", "parse_window", "time_text"]

UNITS_PER_SECOND: dict[TimeUnit, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Integers whose date falls outside these years are counters more likely than clocks, and are shown bare.
_CLOCK_YEARS = range(1990, 2100)


@dataclass(frozen=True)
class Window:
    """The times t with start <= t < end, as integers in the unit of the traffic's time; None leaves an end open.

    Traffic without a time column counts rows instead, from 0, in the order of its files.
    """

    start: int | None = None
    end: int | None = None

    def __post_init__(self) -> None:
        if self.start is not None and self.end is not None and self.start >= self.end:
            raise ConfigError(f"window: start must be before end; got [{self.start}, {self.end})")


def parse_window(start: int | str | None, end: int | str | None, *, unit: TimeUnit | None, key: str) -> Window:
    """Read a window from a config section named `key`; texts are ISO 8601, UTC unless they say otherwise.

    `unit` is `TrafficReader.time_unit`: None where windows are row positions, which cannot be given as dates.
    A date alone is its midnight. Times finer than the unit round up, which keeps the window half-open as written.
    Raises `ConfigError` naming the key when a text is no date, or when start is not before end.
    """
    window_start = parse_time(start, unit, key=f"{key}.start")
    window_end = parse_time(end, unit, key=f"{key}.end")
    if window_start is not None and window_end is not None and window_start >= window_end:
        raise ConfigError(
            f"{key}: start must be before end (the window is half-open); got start {start!r} and end {end!r}"
        )
    return Window(window_start, window_end)


def format_time(time: int, unit: TimeUnit | None) -> str:
    """The time as a reader wants it: `1537799250 (2018-09-24T14:27:30Z)`, or `row 17` where unit is None."""
    if unit is None:
        return f"row {time}"
    moment = _moment(time, unit)
    return f"{time} ({moment})" if moment else str(time)


def time_text(time: int, unit: TimeUnit | None) -> str:
    """The time as a config takes it: a date where it is one, else the integer."""
    return (_moment(time, unit) if unit is not None else None) or str(time)


def format_window(window: Window, unit: TimeUnit | None) -> str:
    """The window as a reader wants it: `[START, END)` in ISO 8601 where times are a clock's, open ends as `..`."""
    bounds = (window.start, window.end)
    start, end = (".." if t is None else (unit and _moment(t, unit)) or str(t) for t in bounds)
    return f"[{start}, {end})"


def overlap(one: str, other: str) -> bool:
    """Whether two windows, as `format_window` writes them, may share rows; windows of other clocks share none."""
    (start, end), (other_start, other_end) = _bounds(one), _bounds(other)
    try:
        return (start is None or other_end is None or start < other_end) and (
            other_start is None or end is None or other_start < end
        )
    except TypeError:  # an integer beside a date
        return False


def days_of(first: int, last: int, unit: TimeUnit | None) -> float | None:
    """The days from one time to another; None where times are counters and no clock."""
    if unit is None or _moment(first, unit) is None or _moment(last, unit) is None:
        return None
    return (last - first) / UNITS_PER_SECOND[unit] / 86_400


def _bounds(window: str) -> list[Any]:
    """The two bounds of a window as it is written: dates, integers, or None where an end is open."""
    found: list[Any] = []
    for text in window.strip("[)").split(", "):
        is_count = text.lstrip("-").isdigit()
        found.append(None if text == ".." else int(text) if is_count else datetime.fromisoformat(text))
    return found


def _moment(time: int, unit: TimeUnit) -> str | None:
    """A time in ISO 8601, None where it is a counter and no clock."""
    seconds, fraction = divmod(time, UNITS_PER_SECOND[unit])
    try:
        moment = _EPOCH + timedelta(seconds=seconds)
    except OverflowError:
        return None
    if moment.year not in _CLOCK_YEARS:
        return None
    digits = f".{fraction:0{len(str(UNITS_PER_SECOND[unit])) - 1}d}" if fraction else ""
    return f"{moment:%Y-%m-%dT%H:%M:%S}{digits}Z"


def parse_time(bound: int | str | None, unit: TimeUnit | None, *, key: str) -> int | None:
    """Read one bound of a window, of a config's or a command's `key`; otherwise as `parse_window`."""
    if bound is None or (isinstance(bound, int) and not isinstance(bound, bool)):
        return bound
    if not isinstance(bound, str):
        raise ConfigError(f"{key}: must be an ISO 8601 date or time, an integer or null; got {bound!r}")
    if unit is None:
        raise ConfigError(f"{key}: this traffic has no time column, so windows are row positions; got {bound!r}")
    try:
        moment = datetime.fromisoformat(bound.strip())
    except ValueError:
        raise ConfigError(
            f"{key}: must be an ISO 8601 date or time such as 2026-01-31 or 2026-01-31T12:00:00Z, "
            f"or an integer in {unit} since 1970; got {bound!r}"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    microseconds = (moment - _EPOCH) // timedelta(microseconds=1)
    return -(-microseconds * UNITS_PER_SECOND[unit] // 10**6)
