"""Lengths of windows, and the clock that they are aligned to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from lowprec.traffic.schema import TimeUnit
from lowprec.traffic.window import UNITS_PER_SECOND

__all__ = ["WindowLength"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# 1970 began on a Thursday: weeks begin on the Monday before.
_FIRST_MONDAY = datetime(1969, 12, 29, tzinfo=UTC)
_FIXED = {
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
    "w": timedelta(weeks=1),
}
_MONTHS = {"month": 1, "quarter": 3, "year": 12}


@dataclass(frozen=True)
class WindowLength:
    """So many of a unit: s, m, h, d, w, month, quarter, year, or "" for a count of whatever times count.

    Windows follow each other without gaps. Those of a clock begin at midnight of 1970-01-01 UTC and every length after
    it (weeks on Mondays), those of a count at 0.
    """

    count: int
    unit: str

    @classmethod
    def parse(cls, text: int | str) -> WindowLength:
        """The length of 200000, "15m", "1h", "1d", "1w", "1 month", "1 quarter" or "1 year"."""
        if isinstance(text, int):
            if text <= 0:
                raise ValueError("a window must be longer than nothing")
            return cls(text, "")
        match = re.fullmatch(r"(\d+) ?(s|m|h|d|w|months?|quarters?|years?)", text.strip())
        if not match or int(match[1]) == 0:
            raise ValueError(
                "expected a length such as 15m, 1h, 1d, 1w, 1 month, 1 quarter or 1 year, or an integer for times that "
                "are counters"
            )
        unit = match[2] if match[2] in _FIXED else match[2].rstrip("s")
        return cls(int(match[1]), unit)

    @property
    def is_of_clock(self) -> bool:
        """Whether windows follow a clock, and not a counter."""
        return self.unit != ""

    def start_of(self, time: int, unit: TimeUnit | None) -> int:
        """The start of the window that a time lies in; both in the unit of the traffic's time."""
        if not self.is_of_clock:
            return time // self.count * self.count
        if unit is None:
            raise ValueError("this traffic has no time column: windows are counted in rows, so give an integer")
        ticks = UNITS_PER_SECOND[unit]
        if self.unit in _MONTHS:
            moment = _EPOCH + timedelta(seconds=time // ticks)
            months = self.count * _MONTHS[self.unit]
            number = ((moment.year - 1970) * 12 + moment.month - 1) // months * months
            return _month(number) * ticks
        length = self.count * int(_FIXED[self.unit].total_seconds()) * ticks
        origin = int((_FIRST_MONDAY - _EPOCH).total_seconds()) * ticks if self.unit == "w" else 0
        return (time - origin) // length * length + origin

    def end_of(self, start: int, unit: TimeUnit | None) -> int:
        """The end of the window that begins at `start`, where the next one begins."""
        if not self.is_of_clock:
            return start + self.count
        assert unit is not None
        ticks = UNITS_PER_SECOND[unit]
        if self.unit in _MONTHS:
            moment = _EPOCH + timedelta(seconds=start // ticks)
            return _month((moment.year - 1970) * 12 + moment.month - 1 + self.count * _MONTHS[self.unit]) * ticks
        return start + self.count * int(_FIXED[self.unit].total_seconds()) * ticks


def _month(number: int) -> int:
    """Seconds from 1970 to the beginning of month `number`, counted from January 1970."""
    return int((datetime(1970 + number // 12, number % 12 + 1, 1, tzinfo=UTC) - _EPOCH).total_seconds())
