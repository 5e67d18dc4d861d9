"""Which windows are due."""

from datetime import UTC, datetime

import pytest

from lowprec.core.errors import ConfigError
from lowprec.monitor.schedule import Schedule, certified_window
from lowprec.traffic import Window, open_traffic

DAY = 86400
CONFIRM = ("windows.confirm={start: 2026-01-08, end: 2026-01-09}",)


def at(text):
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def day(number):
    return int(at("2026-01-01").timestamp()) + (number - 1) * DAY


def schedule(config, now="2026-02-01"):
    traffic = open_traffic(config.traffic.path, config.traffic.schema_of_columns(), batch_size=1024)
    return Schedule.of(config, traffic, at(now))


def days(found):
    return [(w.start - day(1)) // DAY + 1 for w in found]


def test_windows_begin_where_the_certified_one_ends_and_end_by_now(small_config):
    found = schedule(small_config(*CONFIRM), now="2026-01-11T23:59")
    assert days(found.complete_windows()) == [9, 10]
    assert days(schedule(small_config(*CONFIRM), now="2026-01-12T00:00").complete_windows()) == [9, 10, 11]


def test_lateness_delays_a_window(small_config):
    config = small_config(*CONFIRM, "monitor.lateness=6h")
    assert days(schedule(config, now="2026-01-11T05:59").complete_windows()) == [9]
    assert days(schedule(config, now="2026-01-11T06:00").complete_windows()) == [9, 10]


def test_a_start_between_windows_begins_with_the_next_one(small_config):
    config = small_config(*CONFIRM, "monitor.start=2026-01-09T00:00:01", "monitor.end=2026-01-12")
    assert days(schedule(config).complete_windows()) == [10, 11]


def test_a_backfill_is_of_whole_windows(small_config):
    found = schedule(small_config(*CONFIRM, "monitor.end=2026-01-20"))
    since, until = found.between("2026-01-10T12:00", "2026-01-13T12:00")
    assert days(found.complete_windows(since, until)) == [11, 12]
    with pytest.raises(ConfigError, match=r"--since 2026-01-01: lies before the first window .* set monitor.start"):
        found.between("2026-01-01", None)


def test_a_backfill_that_ends_before_it_begins_is_refused(small_config):
    found = schedule(small_config(*CONFIRM))
    with pytest.raises(ConfigError, match="--until 2026-01-10: must lie after --since 2026-01-12"):
        found.between("2026-01-12", "2026-01-10")
    with pytest.raises(ConfigError, match="--since: must be an ISO 8601 date"):
        found.between("soon", None)


def test_absurdly_many_windows_are_asked_about(small_config):
    found = schedule(small_config(*CONFIRM, "monitor.window=30s"))
    with pytest.raises(ConfigError, match=r"more than 5000 windows are due.*\(monitor.start\).*--until"):
        found.due_windows(None, None, judged=set())
    assert len(found.due_windows(None, day(10), judged={day(9)})) == DAY / 30 - 1


@pytest.mark.parametrize(
    ("now", "sentence"),
    [
        ("2026-01-11", ""),
        ("2026-01-12", "1 later window is not judged until it has rows"),
        ("2026-12-01", "324 later windows are not judged until they have rows"),
        ("2126-12-01", "more than 5,000 later windows are not judged until they have rows"),
    ],
)
def test_windows_after_the_last_row_are_not_due(small_config, now, sentence):
    found = schedule(small_config(*CONFIRM), now=now)
    assert days(found.due_windows(None, None, judged=set())) == [9, 10]
    after = found.windows_after_traffic(None, None, judged=set())
    assert after.startswith("traffic ends at 2026-01-10T23:59:") or not sentence
    assert after.endswith(sentence) and bool(after) is bool(sentence)
    assert found.windows_after_traffic(None, day(11), judged=set()) == ""


def test_windows_that_an_earlier_version_judged_as_gaps_are_not_counted(small_config):
    found = schedule(small_config(*CONFIRM), now="2026-01-14")
    assert ": 1 later window " in found.windows_after_traffic(None, None, judged={day(11), day(12)})
    assert ": 2 later windows " in found.windows_after_traffic(day(12), None, judged=set())


def test_labels_are_waited_for_as_long_as_the_config_says(small_config):
    found = schedule(small_config(*CONFIRM, "monitor.labels_within=2d"), now="2026-01-12")
    assert not found.may_get_labels(Window(day(9), day(10)))
    assert found.may_get_labels(Window(day(10), day(11)))


def test_rows_from_the_future_are_said(small_config):
    assert schedule(small_config(*CONFIRM), now="2026-02-01").skew_s == 0
    assert schedule(small_config(*CONFIRM), now="2026-01-10").skew_s > 3600


def test_counters_are_complete_when_later_ones_are_there(small_config):
    config = small_config("traffic.time=null", "windows.train=null", *ROWS, "monitor.window=1000")
    found = schedule(config, now="1999-01-01")
    windows = list(found.complete_windows())
    assert (windows[0], windows[-1]) == (Window(8000, 9000), Window(18_000, 19_000))


ROWS = ("windows.search={start: 0, end: 4000}", "windows.confirm={start: 4000, end: 8000}")


def test_a_clock_needs_times(small_config):
    with pytest.raises(ConfigError, match=r"monitor.window: this traffic has no time column.* expected an integer"):
        schedule(small_config("traffic.time=null", "windows.train=null", *ROWS))


def test_an_open_confirm_window_needs_a_start(small_config):
    with pytest.raises(ConfigError, match=r"monitor.start: is required, because windows.confirm has no end"):
        schedule(small_config())
    config = small_config("monitor.start=2026-01-10")
    assert certified_window(config, schedule(config)) == Window(day(8), day(10))


def test_a_certified_window_must_not_be_watched(small_config):
    config = small_config(*CONFIRM, "monitor.start=2026-01-08T12:00")
    with pytest.raises(ConfigError, match=r"monitor.certified: ends at .*after the first window"):
        other = config.model_copy(
            update={"monitor": config.monitor.model_copy(update={"certified": config.windows.confirm})}
        )
        certified_window(
            other.model_copy(update={"windows": config.windows.model_copy(update={"confirm": config.windows.search})}),
            schedule(small_config(*CONFIRM, "monitor.start=2026-01-08")),
        )
