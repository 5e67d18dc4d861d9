"""Runs of the monitor: what is judged, kept and said, whatever traffic and snapshots are like."""

import json
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from monitor_tables import rows, states, with_column

from lowprec.core.errors import ConfigError
from lowprec.plan import TABLE_PRECISIONS, Precision, read_plan
from lowprec.results import ResultsStore
from lowprec.search import open_job

JAN_10 = int(datetime(2026, 1, 10, tzinfo=UTC).timestamp())


HALF_DAYS = "monitor.window=12h"


def from_day_10(table, name, value):
    """The table with another value in a column from January 10 on."""
    mask = pc.greater_equal(table["ts"], JAN_10)
    return table.set_column(
        table.column_names.index(name), name, pc.if_else(mask, pa.scalar(value, table[name].type), table[name])
    )


def with_other_users_every_day(table):
    """Ids of c5 that no other day has; on the last day ids of c2 are hardly more than one."""
    days = (np.asarray(table["ts"]).astype(np.int64) - JAN_10) // 86400
    users = np.random.default_rng(0).integers(0, 90, table.num_rows) + 90 * (days % 11)
    table = with_column(table, "c5", users.astype(np.int64))
    return with_column(table, "c2", np.where(days == 0, 7, np.asarray(table["c2"])).astype(np.int64))


def test_users_who_come_and_go_do_not_warn_for_ever_and_a_change_does(deployed, monitored, traffic_copy):
    folder = traffic_copy(with_other_users_every_day)
    config, plan = deployed(f"traffic.path={folder}", longer=True)
    outcome = monitored(config, plan)
    assert states(outcome) == ["warn"] * 4 + ["ok", "warn"]
    assert "what is normal here is not known before 4 windows" in outcome.windows[0]["warnings"][0]
    (said,) = outcome.windows[-1]["warnings"]
    assert said.startswith("inputs moved beside earlier windows: c2 (") and "c5" not in said
    # Decisions follow from rows: judged one by one, by processes that know nothing else, they are the same.
    other, _ = deployed(f"traffic.path={folder}", f"results.root={folder.parent / 'one-by-one'}", longer=True)
    for day in range(6, 12):
        monitored(other, plan, now=datetime(2026, 1, day, tzinfo=UTC))
    inputs = [sorted((r["window_start"], r["inputs_json"], r["message"]) for r in rows(c)) for c in (config, other)]
    assert inputs[0] == inputs[1]
    # What is known to move is named in no window.
    expecting, _ = deployed(
        f"traffic.path={folder}",
        f"results.root={folder.parent / 'expecting'}",
        "monitor.expected_drift=[c5]",
        longer=True,
    )
    assert states(monitored(expecting, plan)) == ["ok"] * 5 + ["warn"]


def test_expected_drift_names_features(deployed, monitored):
    config, plan = deployed("monitor.expected_drift=['c*', usr]")
    with pytest.raises(
        ConfigError, match=r'monitor.expected_drift\[1\]: "usr" matches no feature; features are called'
    ):
        monitored(config, plan)


def test_every_complete_window_is_judged_once(deployed, monitored):
    config, plan = deployed(precision=Precision.INT4)
    first = monitored(config, plan)
    assert states(first) == ["ok", "ok"] and first.state == "ok"
    kept = rows(config)
    again = monitored(config, plan)
    assert again.windows == () and again.state == "ok" and "no window is due" in again.message
    assert rows(config) == kept
    assert [row["version"] for row in kept] == [0, 0] and rows(config, "alerts") == []
    (row, _) = sorted(kept, key=lambda row: row["window_start"])
    assert row["gap_lower_pct"] < row["gap_pct"] < row["gap_upper_pct"]
    assert row["kl_pct"] > 0
    assert row["num_rows"] == row["num_labelled"] and row["num_bad"] == 0
    assert row["checkpoint_sha256"] == open_job(config).checkpoint_sha256
    assert {u["unit"] for u in json.loads(row["units_json"])} == {f"table:c{k}" for k in range(6)}


def test_what_is_measured_is_what_verify_measures(deployed, monitored):
    from lowprec.gate.verify import verify_plan

    config, plan = deployed("evaluation.batches_per_task=1", precision=Precision.INT2)
    (window, _) = monitored(config, plan).windows
    day = config.windows.confirm.model_copy(update={"start": "2026-01-09", "end": "2026-01-10"})
    # A first look of verify leaves a tenth of the error rate to others.
    other = config.model_copy(
        update={
            "windows": config.windows.model_copy(update={"confirm": day}),
            "search": config.search.model_copy(update={"confidence": 1 - (1 - config.search.confidence) / 0.9}),
        }
    )
    metrics = verify_plan(other, plan, budget_pct=5.0).metrics
    assert window["gap_pct"] == metrics.gap_pct
    assert (window["ne_ref"], window["auc_plan"]) == (metrics.ne_ref, metrics.auc_plan)
    assert (window["gap_lower_pct"], window["gap_upper_pct"]) == (
        pytest.approx(metrics.gap_interval_pct.lower, rel=1e-9),
        pytest.approx(metrics.gap_interval_pct.upper, rel=1e-9),
    )
    # Shares of the units add up to the label-free gap, to second order.
    shares = sum(u["kl_pct"] for u in json.loads(rows(config)[0]["units_json"]))
    assert shares == pytest.approx(rows(config)[0]["kl_pct"], rel=0.2)


def test_a_backfill_judges_what_it_is_asked_to(deployed, monitored):
    config, plan = deployed(HALF_DAYS)
    assert len(monitored(config, plan, since="2026-01-10", until="2026-01-10T12:00").windows) == 1
    # From then on only newer windows are due; older ones wait for a backfill.
    assert len(monitored(config, plan).windows) == 1
    assert len(monitored(config, plan, since="2026-01-09").windows) == 2
    assert len(rows(config)) == 4


def test_a_broken_promise_is_told_with_a_plan_that_would_keep_it(deployed, monitored):
    config, plan = deployed(precision=Precision.INT2, budget=0.3, longer=True)
    outcome = monitored(config, plan)
    assert outcome.state == "breach" and states(outcome)[-1] == "breach"
    broke = states(outcome).index("breach")
    assert "is found to be above 0.3 %" in outcome.windows[broke]["reasons"][0]
    after = outcome.windows[broke + 1]
    assert states(outcome)[broke + 1] == "breach" and "1 window since then" in after["reasons"][0]
    assert (
        f"was found to be above 0.3 % in window {outcome.windows[broke]['window']}: the breach stands until the test "
        "finds the gap to be below the budget again (+" in after["reasons"][0]
    )
    alerts = sorted(rows(config, "alerts"), key=lambda a: a["window_start"])
    assert next(a["event"] for a in alerts if a["state"] == "breach") == "opened"
    assert len({a["window_start"] for a in alerts}) == len(alerts)
    proposal = outcome.windows[-1]["proposal"]
    assert proposal["promised_pct"] < 0.3 < proposal["promised_now_pct"] and proposal["added_bytes"] > 0
    job = open_job(config)
    proposed = read_plan(proposal["plan"], units=job.units, checkpoint_sha256=job.checkpoint_sha256)
    deployed_plan = read_plan(plan, units=job.units, checkpoint_sha256=job.checkpoint_sha256)
    order = list(TABLE_PRECISIONS)
    assert all(order.index(p) <= order.index(deployed_plan.plan[u]) for u, p in proposed.plan.items())
    assert {u for u, p in proposed.plan.items() if p != deployed_plan.plan[u]} == set(proposal["changes"])
    from lowprec.gate.verify import verify_plan

    before, found = (verify_plan(config, p, window="search", budget_pct=0.3) for p in (plan, proposal["plan"]))
    assert found.metrics.kl_pct < 0.7 * before.metrics.kl_pct


def test_labels_that_come_late_are_judged_again(deployed, monitored, traffic_copy):
    folder = traffic_copy(lambda table: from_day_10(table, "label", None))
    config, plan = deployed(f"traffic.path={folder}", "monitor.labels_within=3d")
    first = monitored(config, plan)
    assert states(first) == ["ok", "insufficient_data"]
    assert "none of" in first.windows[1]["reasons"][0] and first.windows[1]["kl_pct"] is not None
    assert monitored(config, plan).windows == ()
    traffic_copy()
    again = monitored(config, plan)
    assert states(again) == ["ok"] and again.windows[0]["version"] == 1
    assert sorted((r["version"], r["state"]) for r in rows(config) if r["window_start"] == JAN_10) == [
        (0, "insufficient_data"),
        (1, "ok"),
    ]
    seen = ResultsStore(config.results.root).read("monitor_windows").to_pylist()
    assert sorted((r["window_start"], r["version"]) for r in seen)[-1] == (JAN_10, 1) and len(seen) == 2
    # What was judged with all its labels is what it would have been at once.
    other, _ = deployed(f"results.root={folder.parent / 'at-once'}", f"traffic.path={folder}")
    at_once = monitored(other, plan)
    assert at_once.windows[1]["gap_pct"] == again.windows[0]["gap_pct"]
    assert at_once.windows[1]["running_upper_pct"] == again.windows[0]["running_upper_pct"]


def test_labels_that_come_too_late_are_left_alone(deployed, monitored, traffic_copy):
    folder = traffic_copy(lambda table: from_day_10(table, "label", None))
    config, plan = deployed(f"traffic.path={folder}", "monitor.labels_within=1d")
    monitored(config, plan)
    traffic_copy()
    assert monitored(config, plan, now=datetime(2026, 1, 12, tzinfo=UTC)).windows == ()
    assert len([r for r in rows(config) if r["window_start"] == JAN_10]) == 1


def test_traffic_without_labels_can_be_judged_without_them(deployed, monitored, traffic_copy):
    folder = traffic_copy(lambda table: from_day_10(table, "label", None))
    config, plan = deployed(
        f"traffic.path={folder}", "monitor.judge_by=kl", precision=Precision.INT2, budget=0.2, longer=True
    )
    outcome = monitored(config, plan)
    assert states(outcome)[-1] == "breach"
    broke = states(outcome).index("breach")
    assert "the label-free gap is found to be above 0.2 %" in outcome.windows[broke]["reasons"][0]


def test_a_label_free_gap_above_the_budget_warns_where_labels_say_too_little(deployed, monitored, traffic_copy):
    folder = traffic_copy(lambda table: with_column(table, "label", [None] * (table.num_rows - 10) + [0, 1] * 5))
    config, plan = deployed(f"traffic.path={folder}", precision=Precision.INT2, budget=0.2, longer=True)
    outcome = monitored(config, plan)
    assert states(outcome)[0] == "insufficient_data" and states(outcome)[-1] == "warn"
    reasons = [window["reasons"][0] for window in outcome.windows if window["state"] == "warn"]
    assert reasons[0].startswith("the label-free gap is above 0.2 % (+")
    # The gap since then is that of few windows: by itself it need not be above the budget.
    assert all("was found to be above 0.2 %, and not to be below it again (since then +" in r for r in reasons[1:])


def test_labels_that_are_all_alike_are_no_evidence(deployed, monitored, traffic_copy):
    folder = traffic_copy(lambda table: from_day_10(table, "label", 0))
    config, plan = deployed(f"traffic.path={folder}")
    outcome = monitored(config, plan)
    assert states(outcome) == ["ok", "insufficient_data"]
    assert "labels are the same" in outcome.windows[1]["reasons"][0]


def test_a_window_without_rows_is_a_gap(deployed, monitored, traffic_copy):
    folder = traffic_copy(
        lambda table: table.filter(pc.or_(pc.less(table["ts"], JAN_10 - 86400), pc.greater(table["ts"], JAN_10)))
    )
    config, plan = deployed(f"traffic.path={folder}", "monitor.labels_within=3d")
    outcome = monitored(config, plan)
    assert states(outcome) == ["insufficient_data", "ok"] and outcome.state == "insufficient_data"
    assert "no row lies in this window: a gap in the traffic" in outcome.windows[0]["reasons"][0]
    assert outcome.windows[0]["num_rows"] == 0 and outcome.notes == ()
    # The rows come after all.
    traffic_copy()
    assert states(monitored(config, plan)) == ["ok"]


def test_windows_after_the_end_of_the_traffic_wait_for_rows(deployed, monitored, traffic_copy):
    folder = traffic_copy(lambda table: table.filter(pc.less(table["ts"], JAN_10)))
    config, plan = deployed(f"traffic.path={folder}")
    outcome = monitored(config, plan)
    assert states(outcome) == ["ok"] and len(rows(config)) == 1
    (note,) = outcome.notes
    assert note.startswith("traffic ends at 2026-01-09T23:5") and ": 1 later window is not judged until" in note
    assert (outcome.state, outcome.current_state, outcome.message) == ("insufficient_data", "insufficient_data", note)
    again = monitored(config, plan)
    assert (states(again), again.state, again.current_state) == ([], "insufficient_data", "insufficient_data")
    assert again.message == note and len(rows(config)) == 1
    traffic_copy()
    outcome = monitored(config, plan)
    assert (states(outcome), outcome.state, outcome.current_state, outcome.notes) == (["ok"], "ok", "ok", ())


def test_a_breach_stays_one_where_the_traffic_ends(deployed, monitored):
    config, plan = deployed(precision=Precision.INT2, budget=0.3, longer=True)
    outcome = monitored(config, plan, now=datetime(2026, 12, 1, tzinfo=UTC))
    assert outcome.current_state == outcome.state == "breach" and "324 later windows" in outcome.notes[0]
    again = monitored(config, plan, now=datetime(2026, 12, 1, tzinfo=UTC))
    assert (again.current_state, again.state) == ("breach", "breach") and "324 later windows" not in again.message


def test_the_clock_of_the_traffic_may_be_ahead(deployed, monitored):
    config, plan = deployed()
    outcome = monitored(config, plan, now=datetime(2026, 1, 10, 12, tzinfo=UTC))
    assert len(outcome.windows) == 1
    assert any("ahead of this machine's clock" in note for note in outcome.notes)


def test_a_window_with_too_many_bad_rows_is_an_error_of_its_own(deployed, monitored, traffic_copy):
    folder = traffic_copy(lambda table: spoilt(table, JAN_10 - 86400, JAN_10))
    config, plan = deployed(f"traffic.path={folder}")
    outcome = monitored(config, plan)
    assert states(outcome) == ["error", "ok"] and outcome.state == "error"
    assert "bad" in outcome.windows[0]["reasons"][0]
    # The same again is no new row; it is judged when the rows are mended.
    assert states(monitored(config, plan)) == ["error"]
    assert len(rows(config)) == 2
    traffic_copy()
    assert states(monitored(config, plan)) == ["ok"]
    assert sorted((r["window_start"], r["version"]) for r in rows(config)) == [
        (JAN_10 - 86400, 0),
        (JAN_10 - 86400, 1),
        (JAN_10, 0),
    ]


def test_some_bad_rows_are_set_aside_and_said(deployed, monitored, traffic_copy):
    folder = traffic_copy(lambda table: spoilt(table, JAN_10, JAN_10 + 3600))
    config, plan = deployed(f"traffic.path={folder}", "traffic.max_bad_fraction=0.1")
    outcome = monitored(config, plan)
    assert states(outcome) == ["ok", "warn"]
    assert "rows are bad and were set aside" in outcome.windows[1]["warnings"][0]
    assert outcome.windows[1]["num_bad"] > 0
    quarantine = ResultsStore(config.results.root).artifacts(f"monitor-{outcome.deployment}") / "quarantine"
    assert quarantine.names() == [f"window-{JAN_10}.parquet"]


def spoilt(table, start, end):
    """Rows between two times with a dense value that is no number."""
    times, values = table["ts"].to_numpy(), table["d0"].to_numpy().copy()
    values[(times >= start) & (times < end)] = np.nan
    return with_column(table, "d0", values)


def test_a_certified_window_that_is_gone_says_what_to_do(deployed, monitored, traffic_copy):
    folder = traffic_copy(lambda table: table.filter(pc.greater_equal(table["ts"], JAN_10 - 86400)))
    config, plan = deployed(f"traffic.path={folder}")
    outcome = monitored(config, plan)
    assert states(outcome) == ["error", "error"]
    assert "name one in monitor.certified" in outcome.windows[0]["reasons"][0]


def test_drift_warns_and_breaks_nothing(deployed, monitored, traffic_copy):
    def moved(table):
        times, ids = table["ts"].to_numpy(), table["c5"].to_numpy().copy()
        late = times >= JAN_10
        ids[late] = np.random.default_rng(0).integers(900, 1000, int(late.sum()))
        return with_column(table, "c5", ids)

    config, plan = deployed(f"traffic.path={traffic_copy(moved)}")
    outcome = monitored(config, plan)
    assert states(outcome) == ["ok", "warn"]
    assert outcome.windows[1]["inputs"][0]["feature"] == "c5" and outcome.windows[1]["num_moved"] == 1
    assert "by itself that breaks no promise" in outcome.windows[1]["warnings"][0]
    assert outcome.windows[1]["untouched"]["table:c5"] > 0.2
    alerts = rows(config, "alerts")
    assert [(a["event"], a["state"]) for a in alerts] == [("opened", "warn")]


def test_incidents_open_go_on_and_are_resolved(deployed, monitored, traffic_copy):
    def moved_for_some_hours(table):
        times, ids = table["ts"].to_numpy(), table["c5"].to_numpy().copy()
        late = (times >= JAN_10 - 86400 + 6 * 3600) & (times < JAN_10 - 86400 + 18 * 3600)
        ids[late] = np.random.default_rng(0).integers(900, 1000, int(late.sum()))
        return with_column(table, "c5", ids)

    config, plan = deployed(f"traffic.path={traffic_copy(moved_for_some_hours)}", "monitor.window=6h", budget=50.0)
    outcome = monitored(config, plan)
    assert states(outcome)[:4] == ["ok", "warn", "warn", "ok"], (
        outcome.windows[3]["warnings"] + outcome.windows[3]["inputs"]
    )
    alerts = sorted(rows(config, "alerts"), key=lambda a: a["window_start"])
    assert [(a["event"], a["state"]) for a in alerts[:3]] == [
        ("opened", "warn"),
        ("continues", "warn"),
        ("resolved", "ok"),
    ]
    assert len({a["incident"] for a in alerts[:3]}) == 1


def test_another_budget_begins_another_life(deployed, monitored):
    config, plan = deployed()
    first = monitored(config, plan)
    other = config.with_(monitor={"budget": 1.0})
    second = monitored(other, plan)
    assert first.deployment != second.deployment and len(second.windows) == 2
    assert (first.budget_pct, second.budget_pct) == (5.0, 1.0)


def test_a_plan_without_a_budget_needs_one(deployed, monitored, tmp_path):
    config, plan = deployed()
    document = json.loads(plan.read_text())
    plan.write_text(json.dumps(document | {"evidence": {}}))
    with pytest.raises(ConfigError, match=r"monitor.budget: is required, because plan .* does not say"):
        monitored(config, plan)


def test_groups_are_the_units_of_evidence(deployed, monitored):
    config, plan = deployed("traffic.group=user", precision=Precision.INT2)
    monitored(config, plan)
    assert all(100 < row["num_units"] <= 300 < row["num_labelled"] for row in rows(config))


@pytest.mark.parametrize("count", [1, 2])
def test_workers_change_no_bit(deployed, monitored, count):
    config, plan = deployed(f"evaluation.num_workers={count}", precision=Precision.INT4)
    monitored(config, plan)
    alone, _ = deployed(f"results.root={config.results.root}-alone", precision=Precision.INT4)
    monitored(alone, plan)
    left, right = (
        [{k: v for k, v in row.items() if k not in ("judged_at", "committed_at")} for row in rows(c)]
        for c in (config, alone)
    )
    assert left == right


def test_a_monitor_that_has_judged_nothing_is_not_ok(deployed, monitored):
    config, plan = deployed("monitor.start=2030-01-01")
    outcome = monitored(config, plan)
    assert outcome.state == outcome.current_state == "insufficient_data"
    assert outcome.message == (
        "no window is complete yet: the first one is [2030-01-01T00:00:00Z, 2030-01-02T00:00:00Z)"
    )


def test_what_is_not_watched_and_what_is_judged_late_is_said(deployed, monitored):
    config, plan = deployed("monitor.start=2026-01-09T05:30", longer=True)
    (note,) = monitored(config, plan).notes
    assert "2026-01-09T05:30:00Z) lies within a window" in note and "2026-01-10T00:00:00Z" in note
    config, plan = deployed("name=again", longer=True)
    assert monitored(config, plan, since="2026-01-08").notes == ()
    assert monitored(config, plan, since="2026-01-06").notes[0].startswith("windows before the newest one")
