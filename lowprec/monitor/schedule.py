"""Windows that are due: complete and aligned to the clock."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from datetime import datetime

from lowprec.config import Config, TimeBound
from lowprec.core.errors import ConfigError
from lowprec.core.sizes import parse_seconds
from lowprec.traffic import TrafficReader, Window, format_time, parse_window
from lowprec.traffic.length import WindowLength
from lowprec.traffic.schema import TimeUnit
from lowprec.traffic.window import UNITS_PER_SECOND, parse_time, time_text

__all__ = ["Schedule", "certified_window"]

# Rows that are dated further ahead of this machine's clock than this are said.
ALLOWED_SKEW_S = 60.0
# A run that would judge more windows is asked for by mistake more often than not.
MAX_WINDOWS_AT_ONCE = 5000


@dataclass(frozen=True)
class Schedule:
    """The windows of a deployment, in the unit of the traffic's time.

    first: the start of the first one. asked_first: where it was to begin. complete: windows that end by then are
    complete. newest: the time of the last row, None where no row has one: windows that begin after it are not due.
    open_for_labels: windows that end after it may still get labels or rows. skew_s: how far the newest row is ahead of
    the clock, 0 where it is not.
    """

    length: WindowLength
    unit: TimeUnit | None
    first: int
    asked_first: int
    complete: int
    newest: int | None
    open_for_labels: int
    skew_s: float

    @classmethod
    def of(cls, config: Config, reader: TrafficReader, now: datetime) -> Schedule:
        """The schedule of a config at a moment; raises `ConfigError` where windows and traffic do not fit."""
        watch, unit = config.monitor, reader.time_unit
        length = WindowLength.parse(watch.window)
        if length.is_of_clock and unit is None:
            raise ConfigError(
                "monitor.window: this traffic has no time column, so windows are counted in rows; got "
                f"{watch.window!r}, expected an integer (or name the column in traffic.time)"
            )
        start = _bound(watch.start, unit, "monitor.start")
        if start is None:
            confirm = config.windows.confirm
            start = _bound(confirm.end if confirm else None, unit, "windows.confirm.end")
        if start is None:
            raise ConfigError(
                "monitor.start: is required, because windows.confirm has no end; say where the traffic begins that "
                "the plan was not certified on"
            )
        first = length.start_of(start, unit)
        if first < start:
            first = length.end_of(first, unit)
        times = reader.time_range
        newest = times[1] if times else None
        skew = 0.0
        if length.is_of_clock and unit is not None:
            ticks = UNITS_PER_SECOND[unit]
            clock = int(now.timestamp() * ticks)
            complete = clock - int(parse_seconds(watch.lateness, zero=True) * ticks)
            open_for_labels = clock - int(parse_seconds(watch.labels_within, zero=True) * ticks)
            ahead = (newest - clock) / ticks if newest is not None else 0.0
            skew = ahead if ahead > ALLOWED_SKEW_S else 0.0
        else:
            complete = first if newest is None else newest
            open_for_labels = complete
        end = _bound(watch.end, unit, "monitor.end")
        complete = complete if end is None else min(complete, end)
        return cls(length, unit, first, start, complete, newest, open_for_labels, skew)

    def between(self, since: TimeBound, until: TimeBound) -> tuple[int | None, int | None]:
        """The bounds of a backfill, by `--since` and `--until`."""
        start = _bound(since, self.unit, "--since")
        if start is not None and start < self.first:
            raise ConfigError(
                f"--since {since}: lies before the first window of this deployment, which begins at "
                f"{format_time(self.first, self.unit)}; set monitor.start to watch earlier traffic"
            )
        end = _bound(until, self.unit, "--until")
        if start is not None and end is not None and end <= start:
            raise ConfigError(f"--until {until}: must lie after --since {since}")
        return start, end

    def notes(self, now: datetime) -> list[str]:
        """What is odd about the windows, at that moment."""
        found = []
        if self.skew_s:
            found.append(
                f"the newest row is {self.skew_s:.0f} s ahead of this machine's clock ({now:%Y-%m-%dT%H:%M:%SZ}): one "
                "of the two clocks is wrong, and windows may be judged before all of their rows are there"
            )
        if self.first > self.asked_first:
            asked, first = (format_time(t, self.unit) for t in (self.asked_first, self.first))
            found.append(
                f"{asked} lies within a window; the first whole one begins at {first}, and what lies before it is not "
                "watched"
            )
        return found

    def complete_windows(self, since: int | None = None, until: int | None = None) -> Iterator[Window]:
        """The complete windows, in order: those that begin at `since` or later and end by `until`."""
        start = self.first if since is None else max(self.first, self.length.start_of(since, self.unit))
        if since is not None and start < since:
            start = self.length.end_of(start, self.unit)
        while (end := self.length.end_of(start, self.unit)) <= self.complete and (until is None or end <= until):
            yield Window(start, end)
            start = end

    def due_windows(self, since: int | None, until: int | None, *, judged: Container[int | None]) -> list[Window]:
        """Those of `complete_windows` that were not judged and do not begin after the last row of the traffic.

        Raises `ConfigError` where there are absurdly many.
        """
        found: list[Window] = []
        for window in self.complete_windows(since, until):
            if self.newest is None or (window.start or 0) > self.newest:
                break
            if window.start not in judged:
                found.append(window)
            if len(found) > MAX_WINDOWS_AT_ONCE:
                raise ConfigError(
                    f"monitor: more than {MAX_WINDOWS_AT_ONCE} windows are due, from "
                    f"{format_time(found[0].start or 0, self.unit)} on; if times are no {self.unit} since 1970, give "
                    "monitor.window as an integer, or set traffic.time_unit; else begin later (monitor.start) or go "
                    "piece by piece (--until)"
                )
        return found

    def windows_after_traffic(self, since: int | None, until: int | None, *, judged: Container[int | None]) -> str:
        """A sentence on the complete windows that begin after the last row of the traffic; empty where there is none.

        They are not due: rows that are late by more than `lateness` would come to a window that was judged as a gap.
        """
        after = since if self.newest is None else max(self.newest + 1, self.first if since is None else since)
        num_found = 0
        for window in self.complete_windows(after, until):
            num_found += window.start not in judged
            if num_found > MAX_WINDOWS_AT_ONCE:
                break
        if num_found == 0:
            return ""
        ends = "has no row with a time" if self.newest is None else f"ends at {time_text(self.newest, self.unit)}"
        if num_found == 1:
            return f"traffic {ends}: 1 later window is not judged until it has rows"
        number = f"more than {MAX_WINDOWS_AT_ONCE:,}" if num_found > MAX_WINDOWS_AT_ONCE else f"{num_found:,}"
        return f"traffic {ends}: {number} later windows are not judged until they have rows"

    @property
    def first_window(self) -> Window:
        """The first one, complete or not."""
        return self.window_at(self.first)

    def window_at(self, start: int) -> Window:
        """The window that starts there."""
        return Window(start, self.length.end_of(start, self.unit))

    def may_get_labels(self, window: Window) -> bool:
        """Whether labels and rows of a window are still waited for."""
        return window.end is not None and window.end > self.open_for_labels


def certified_window(config: Config, schedule: Schedule) -> Window:
    """The window that "moved" is told from; raises `ConfigError` where it reaches into what is watched."""
    bounds, key = config.monitor.certified, "monitor.certified"
    if bounds is None:
        bounds, key = config.windows.of("confirm"), "windows.confirm"
    window = parse_window(bounds.start, bounds.end, unit=schedule.unit, key=key)
    if window.end is None:
        window = Window(window.start, schedule.first)
    if window.end is not None and window.end > schedule.first:
        raise ConfigError(
            f"{key}: ends at {format_time(window.end, schedule.unit)}, after the first window of the monitor begins "
            f"({format_time(schedule.first, schedule.unit)}); a plan is watched on traffic that did not certify it"
        )
    return window


def _bound(bound: TimeBound, unit: TimeUnit | None, key: str) -> int | None:
    return parse_time(bound, unit, key=key)
