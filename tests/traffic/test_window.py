from __future__ import annotations

import pytest

from lowprec.core.errors import ConfigError
from lowprec.traffic import Window, format_time, format_window, parse_window
from lowprec.traffic.window import days_of, overlap


@pytest.mark.parametrize(
    ("text", "unit", "expected"),
    [
        ("1970-01-02", "s", 86_400),
        ("2018-09-24T14:27:30Z", "s", 1_537_799_250),
        ("2018-09-24T14:27:30", "ms", 1_537_799_250_000),
        ("2018-09-24T16:27:30+02:00", "us", 1_537_799_250_000_000),
        ("1969-12-31T23:59:59", "ns", -(10**9)),
        # t >= half past means t >= the next whole second: rounding up keeps both ends as written.
        ("1970-01-01T00:00:01.5", "s", 2),
        ("1969-12-31T23:59:58.5", "s", -1),
        (12, "s", 12),
    ],
)
def test_bounds_become_integers_in_the_unit_of_the_traffic(text: int | str, unit: str, expected: int) -> None:
    assert parse_window(text, None, unit=unit, key="w") == Window(expected, None)  # type: ignore[arg-type]
    assert parse_window(None, text, unit=unit, key="w") == Window(None, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("start", "end", "parts"),
    [
        ("2020-01-02", "2020-01-02", ["windows.search", "start must be before end", "2020-01-02"]),
        (7, 3, ["windows.search", "start must be before end", "7", "3"]),
        ("last week", None, ["windows.search.start", "ISO 8601", "'last week'"]),
        (None, "2020-13-01", ["windows.search.end", "ISO 8601", "'2020-13-01'"]),
        (None, True, ["windows.search.end", "True"]),
    ],
)
def test_unreadable_windows_name_their_key(start: int | str, end: int | str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_window(start, end, unit="s", key="windows.search")
    assert all(part in str(error.value) for part in parts), error.value


def test_dates_make_no_sense_without_a_time_column() -> None:
    assert parse_window(5, 9, unit=None, key="w") == Window(5, 9)
    with pytest.raises(ConfigError, match=r"w\.start: this traffic has no time column.*row positions"):
        parse_window("2020-01-01", None, unit=None, key="w")


def test_a_window_that_holds_nothing_cannot_exist() -> None:
    with pytest.raises(ConfigError, match="start must be before end"):
        Window(3, 3)


def test_times_are_shown_as_dates_where_they_look_like_clocks() -> None:
    assert format_time(1_537_799_250, "s") == "1537799250 (2018-09-24T14:27:30Z)"
    assert format_time(1_537_799_250_007, "ms") == "1537799250007 (2018-09-24T14:27:30.007Z)"
    assert format_time(17, "s") == "17"
    assert format_time(17, None) == "row 17"
    assert format_time(10**17, "s") == "100000000000000000"
    assert format_window(Window(None, 17), "s") == "[.., 17)"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("[2026-01-08T00:00:00Z, ..)", "[2026-01-09T00:00:00Z, 2026-01-10T00:00:00Z)", True),
        ("[2026-01-08T00:00:00Z, 2026-01-09T00:00:00Z)", "[2026-01-09T00:00:00Z, ..)", False),
        ("[2026-01-08T00:00:00.500Z, 2026-01-09T00:00:00Z)", "[.., 2026-01-08T00:00:01Z)", True),
        ("[.., ..)", "[5, 6)", True),
        ("[100, 200)", "[199, 300)", True),
        ("[100, 200)", "[200, 300)", False),
        ("[-5, 2)", "[2026-01-08T00:00:00Z, 2026-01-09T00:00:00Z)", False),
    ],
)
def test_windows_overlap_where_they_may_share_rows(one, other, expected):
    assert overlap(one, other) is overlap(other, one) is expected


def test_days_between_times_of_a_clock_and_of_a_counter():
    assert days_of(1_767_225_600, 1_767_225_600 + 86_400 * 3, "s") == 3.0
    assert days_of(0, 10_000, "s") is None and days_of(0, 10_000, None) is None
