"""Selects the rows of a dataset in a window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lowprec.traffic.files.dataset import Dataset, RowGroup, Rows
from lowprec.traffic.window import Window

__all__ = ["Selection", "Span", "group_times", "rows_in_window", "select"]

_READ_ROWS = 1 << 16


class Span(NamedTuple):
    """A row group with rows in the window: how many, and whether they are all of its rows."""

    group: RowGroup
    num_rows: int
    is_whole: bool


class Selection(NamedTuple):
    """The spans of a window in dataset order, the earliest and latest time in them, and the data around it.

    `before` is the latest time before the window's start, `after` the earliest at or after its end, None where the
    data ends there. `times` is None when no row with a time lies in the window.
    """

    spans: tuple[Span, ...]
    times: tuple[int, int] | None
    before: int | None
    after: int | None


def select(dataset: Dataset, time: str | None, window: Window, known: dict[int, tuple[int, int] | None]) -> Selection:
    """The rows of the window, by the statistics of the row groups; only the time column is read, and only where a
    row group straddles a bound or has no statistics.

    A row without a time belongs to every window that its row group's own time range meets (any window, if the whole
    row group has no times), so that it is counted as a bad row instead of being lost. `known` keeps what was read of
    row groups without statistics, by position in `dataset.groups`.
    """
    spans: list[Span] = []
    inside: list[int] = []
    before: list[int] = []
    after: list[int] = []
    for index, group in enumerate(dataset.groups):
        times = group_times(dataset, time, index, known)
        if group.num_rows == 0:
            continue
        if times is None:
            spans.append(Span(group, group.num_rows, True))
            continue
        earliest, latest = times
        if window.start is not None and latest < window.start:
            before.append(latest)
        elif window.end is not None and earliest >= window.end:
            after.append(earliest)
        elif _is_in(window, earliest) and _is_in(window, latest):
            spans.append(Span(group, group.num_rows, True))
            inside += times
        else:
            count = 0
            for rows in _times_of(dataset, time, group):
                values, valid = _times(rows, time)
                mask = _mask(values, valid, window)
                count += int(mask.sum())
                _extend_ends(inside, values[mask & valid])
                if window.start is not None:
                    _extend_ends(before, values[valid & (values < window.start)])
                if window.end is not None:
                    _extend_ends(after, values[valid & (values >= window.end)])
            if count:
                spans.append(Span(group, count, count == group.num_rows))
    return Selection(
        tuple(spans),
        (min(inside), max(inside)) if inside else None,
        max(before, default=None),
        min(after, default=None),
    )


def group_times(
    dataset: Dataset, time: str | None, index: int, known: dict[int, tuple[int, int] | None]
) -> tuple[int, int] | None:
    """The earliest and latest time of a row group, read where the statistics do not tell; None if it has no times."""
    group = dataset.groups[index]
    if group.times is not None or group.num_rows == 0:
        return group.times
    if index not in known:
        ends: list[int] = []
        for rows in _times_of(dataset, time, group):
            values, valid = _times(rows, time)
            _extend_ends(ends, values[valid])
        known[index] = (min(ends), max(ends)) if ends else None
    return known[index]


def rows_in_window(rows: Rows, time: str | None, window: Window) -> Rows:
    """Those of some rows of a span that lie in the window, in order."""
    mask = _mask(*_times(rows, time), window)
    if mask.all():
        return rows
    return Rows(rows.columns.filter(pa.array(mask)), rows.positions[mask])


def _times_of(dataset: Dataset, time: str | None, group: RowGroup) -> Iterator[Rows]:
    if time is not None:
        return dataset.stream(group, [time], _READ_ROWS)
    positions = np.arange(group.position, group.position + group.num_rows)
    return iter([Rows(pa.record_batch([], []), positions)])


def _times(rows: Rows, time: str | None) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The times of some rows and which of them are not null; positions where the traffic has no time."""
    if time is None:
        return rows.positions, np.ones(len(rows.positions), np.bool_)
    column = rows.columns.column(time).cast(pa.int64())
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    return (column.fill_null(0) if column.null_count else column).to_numpy(), valid


def _mask(times: NDArray[np.int64], valid: NDArray[np.bool_], window: Window) -> NDArray[np.bool_]:
    mask = np.ones(len(times), np.bool_)
    if window.start is not None:
        mask &= times >= window.start
    if window.end is not None:
        mask &= times < window.end
    return mask | ~valid


def _is_in(window: Window, time: int) -> bool:
    return (window.start is None or time >= window.start) and (window.end is None or time < window.end)


def _extend_ends(ends: list[int], values: NDArray[np.int64]) -> None:
    if len(values):
        ends += [int(values.min()), int(values.max())]
