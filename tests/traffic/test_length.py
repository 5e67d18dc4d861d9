"""Lengths of windows, and where windows of that length begin."""

from datetime import UTC, datetime

import pytest

from lowprec.traffic.length import WindowLength


def seconds(text):
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


@pytest.mark.parametrize(
    "length, time, start, end",
    [
        ("15m", "2026-03-05T10:44:59", "2026-03-05T10:30", "2026-03-05T10:45"),
        ("1h", "2026-03-05T10:00:00", "2026-03-05T10:00", "2026-03-05T11:00"),
        ("1d", "2026-03-05T23:59:59", "2026-03-05", "2026-03-06"),
        ("1w", "2026-03-05T10:00", "2026-03-02", "2026-03-09"),  # a Thursday: from Monday
        ("1 month", "2024-02-29T10:00", "2024-02-01", "2024-03-01"),
        ("1 quarter", "2026-12-31", "2026-10-01", "2027-01-01"),
        ("2 quarters", "2026-12-31", "2026-07-01", "2027-01-01"),
        ("1 year", "1999-12-31", "1999-01-01", "2000-01-01"),
        ("1d", "1969-12-31T12:00", "1969-12-31", "1970-01-01"),
        ("1 month", "1969-12-31T12:00", "1969-12-01", "1970-01-01"),
    ],
)
@pytest.mark.parametrize("unit, ticks", [("s", 1), ("us", 10**6)])
def test_windows_are_aligned_to_the_clock(length, time, start, end, unit, ticks):
    parsed = WindowLength.parse(length)
    begin = parsed.start_of(seconds(time) * ticks + ticks - 1, unit)
    assert begin == seconds(start) * ticks
    assert parsed.end_of(begin, unit) == seconds(end) * ticks
    assert parsed.start_of(begin, unit) == begin


def test_counters_are_aligned_to_zero():
    parsed = WindowLength.parse(1000)
    assert (parsed.start_of(2999, None), parsed.end_of(2000, None), parsed.is_of_clock) == (2000, 3000, False)
    assert parsed.start_of(2999, "s") == 2000


@pytest.mark.parametrize("text", ["", "d", "0d", "1.5h", "1 fortnight", "-1d", "1D", 0, -5])
def test_what_is_no_length_says_what_would_be_one(text):
    with pytest.raises(ValueError, match="expected a length such as|longer than nothing"):
        WindowLength.parse(text)


def test_rows_without_a_time_have_no_clock():
    with pytest.raises(ValueError, match="no time column"):
        WindowLength.parse("1d").start_of(5, None)
