"""One row and at most one alert for each window, whatever is killed and whoever runs beside."""

import contextlib
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from monitor_process import start_monitor

from lowprec.monitor.record import MonitorRecord
from lowprec.plan import Precision
from lowprec.results import ResultsStore
from lowprec.results.schema import table_schema

# Columns that say when something was done, and of files in the results root.
OF_THE_MOMENT = {"judged_at", "raised_at", "committed_at", "proposed_plan", "alert_json"}


def written(root, table):
    """The rows as they lie in the table's files, in the order of windows."""
    rows = ResultsStore(root).dataset(table).to_table().to_pylist()
    kept = [{k: v for k, v in row.items() if k not in OF_THE_MOMENT} for row in rows]
    return sorted(kept, key=lambda row: (row["window_start"], row["row_key"]))


@pytest.fixture
def job(deployed, monitored, tmp_path):
    """Starts a process that watches six days of a promise that breaks, and what it keeps if nothing happens to it."""
    overrides = (
        "windows.train={end: 2026-01-03}",
        "windows.search={start: 2026-01-03, end: 2026-01-04}",
        "windows.confirm={start: 2026-01-04, end: 2026-01-05}",
        "monitor.window=12h",
    )
    config, plan = deployed("monitor.window=12h", precision=Precision.INT2, budget=0.3, longer=True)
    monitored(config, plan)
    path = Path(config.results.root) / "config.yaml"

    def start(root):
        return start_monitor(path, plan, (*overrides, f"results.root={root}"))

    return start, config.results.root


def test_kills_at_ten_random_moments_lose_and_repeat_nothing(job, tmp_path):
    start, undisturbed = job
    rng = random.Random(0)
    root = tmp_path / "killed"
    kills = 0
    for _ in range(40):
        process = start(root)
        process.join(rng.uniform(0.0, 1.5))
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        if kills >= 10:
            break
        if process.exitcode == 0:
            # All is judged: begin again, until ten were killed.
            assert written(root, "monitor_windows") == written(undisturbed, "monitor_windows")
            root = tmp_path / f"killed-{kills}"
    process = start(root)
    process.join(120)
    assert process.exitcode == 0
    assert kills == 10
    for table in ("monitor_windows", "alerts"):
        assert written(root, table) == written(undisturbed, table)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["add_alert", "add_window"])
def test_a_kill_beside_a_commit_loses_and_repeats_nothing(deployed, monitored, tmp_path, monkeypatch, what, when):
    config, plan = deployed("monitor.window=12h", precision=Precision.INT2, budget=0.3, longer=True)
    monitored(config, plan)
    commit = getattr(MonitorRecord, what)

    def killed(*args, **kwargs):
        if when == "after":
            commit(*args, **kwargs)
        raise KeyboardInterrupt

    # Every run is killed at its first commit, so that windows are judged by as many runs.
    root = tmp_path / "killed"
    again = config.with_(results={"root": str(root)})
    with monkeypatch.context() as patch:
        patch.setattr(MonitorRecord, what, killed)
        for _ in range(12):
            with contextlib.suppress(KeyboardInterrupt):
                monitored(again, plan)
    monitored(again, plan)
    for table in ("monitor_windows", "alerts"):
        assert len(written(root, table)) > 3
        assert written(root, table) == written(config.results.root, table)


def test_two_at_once_keep_one_row_and_one_alert_for_each_window(job, tmp_path):
    start, undisturbed = job
    root = tmp_path / "together"
    both = [start(root) for _ in range(2)]
    for process in both:
        process.join(200)
    assert [process.exitcode for process in both] == [0, 0]
    for table in ("monitor_windows", "alerts"):
        assert written(root, table) == written(undisturbed, table)


def window_row(number):
    """A row of the table with nothing in it but its key."""
    names = table_schema("monitor_windows").arrow.names
    return {name: None for name in names if name != "committed_at"} | {"row_key": f"d/{number}", "window_start": number}


def test_many_at_once_keep_one_row_of_each(tmp_path):
    store_rows = [window_row(k) for k in range(3)]

    def append(_):
        store = ResultsStore(tmp_path / "runs")
        return [store.append("monitor_windows", [row], exclusive="same") for row in store_rows]

    ResultsStore(tmp_path / "runs").append("monitor_windows", [window_row(99)])
    with ThreadPoolExecutor(6) as pool:
        counts = list(pool.map(append, range(6)))
    assert [sum(column) for column in zip(*counts, strict=True)] == [1, 1, 1]
    table = ResultsStore(tmp_path / "runs").dataset("monitor_windows").to_table()
    assert table.num_rows == 4 and len(set(table["row_key"].to_pylist())) == 4


def test_what_a_process_that_was_killed_did_not_tell_the_next_one_tells(deployed, monitored, monkeypatch):
    config, plan = deployed(
        "monitor.webhook={url: 'http://127.0.0.1:9/', retries: 0}", precision=Precision.INT2, budget=0.3, longer=True
    )

    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowprec.monitor.monitor_run.notify", killed)
    with pytest.raises(KeyboardInterrupt):
        monitored(config, plan)
    monkeypatch.undo()
    outcome = monitored(config, plan)
    assert outcome.windows == () and [t["event"] for t in outcome.told] == ["opened"]
