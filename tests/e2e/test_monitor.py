"""The monitor as a command, on made-up and on real logs."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from real_logs import PROJECT, arguments_of, real_log

from lowprec.config import load_config
from lowprec.plan import Plan, PlanFile, Precision, RowRange, write_plan
from lowprec.search import open_job

WATCHED = {
    "windows__train": {"end": "2026-01-03"},
    "windows__search": {"start": "2026-01-03", "end": "2026-01-04"},
    "windows__confirm": {"start": "2026-01-04", "end": "2026-01-05"},
    "monitor__end": "2026-01-11",
}


def plan_of(config_path, out, precision, budget):
    job = open_job(load_config(config_path))
    plan = Plan.uniform(job.units, precision)
    ranges = dict.fromkeys(plan, RowRange.MINMAX)
    evidence = {"budget_pct": budget}
    size = job.space.size_bytes(plan)
    write_plan(PlanFile(plan, job.config.model.factory, job.checkpoint_sha256, size, 1, ranges, evidence), out)
    return str(out)


@pytest.mark.parametrize(
    "precision, budget, code, state",
    [
        (Precision.INT4, 5.0, 0, "ok"),
        (Precision.INT2, 0.3, 2, "breach"),
        (Precision.INT2, 3.0, 4, "insufficient_data"),
    ],
)
def test_the_exit_code_says_how_the_promise_stands(lowprec, config_file, tmp_path, precision, budget, code, state):
    num_windows = 1 if state == "insufficient_data" else 6
    watched = WATCHED | {"monitor__end": f"2026-01-{5 + num_windows:02d}"}
    config = config_file(results__root=str(tmp_path / "runs"), **watched)
    plan = plan_of(config, tmp_path / "plan.json", precision, budget)
    done = lowprec("monitor", config, "--plan", plan, "--json")
    assert (done.code, done.document["state"]) == (code, state), done.err
    assert done.document["command"] == "monitor" and len(done.document["windows"]) == num_windows
    again = lowprec("monitor", config, "--plan", plan)
    assert again.code == code and "no window is due" in again.out
    found = lowprec("results", "SELECT count(*) AS n FROM monitor_windows", "--root", tmp_path / "runs", "--json")
    assert json.loads(found.out)["rows"][0]["n"] == num_windows


def test_text_shows_windows_and_what_to_do(lowprec, config_file, tmp_path):
    config = config_file(results__root=str(tmp_path / "runs"), **WATCHED)
    plan = plan_of(config, tmp_path / "plan.json", Precision.INT2, 0.3)
    done = lowprec("monitor", config, "--plan", plan)
    assert done.code == 2
    assert "6 windows judged now" in done.out and "breach against a budget of 0.3 %" in done.out
    assert "proposed: table:" in done.out and "KL gap by unit" in done.out
    (path,) = {word for word in done.out.split() if word.endswith(".json") and "proposed-" in word}
    before, proposed = (lowprec("verify", config, "--plan", p, "--window", "search", "--json") for p in (plan, path))
    assert proposed.document["kl_pct"] < 0.7 * before.document["kl_pct"]


def test_wrong_times_and_sections_are_one_clear_sentence(lowprec, config_file, one_sentence, tmp_path):
    config = config_file(results__root=str(tmp_path / "runs"), **WATCHED)
    plan = plan_of(config, tmp_path / "plan.json", Precision.INT4, 5.0)
    command = ("monitor", config, "--plan", plan)
    one_sentence(lowprec(*command, "--since", "yesterday"), 64, ["--since", "ISO 8601", "yesterday"])
    one_sentence(
        lowprec(*command, "--set", "monitor.window=fortnight"), 64, ["monitor.window", "1 quarter", "fortnight"]
    )
    one_sentence(lowprec(*command, "--set", "monitor.lateness=soon"), 64, ["monitor.lateness", "15m", "soon"])
    one_sentence(lowprec(*command, "--set", "monitor.webhook={}"), 64, ["monitor.webhook", "url or url_env"])
    one_sentence(lowprec("monitor", config, "--plan", tmp_path / "no.json"), 64, ["no.json", "cannot be read"])


def test_two_hundred_clicks_are_not_enough_evidence(lowprec, tmp_path):
    """207 clicks in 40,000 rows: no window has enough of them, and all together have not."""
    path = real_log("open_bandit_small_40k.parquet")
    table = pq.read_table(path)
    clicks, times = table["label"].to_numpy().astype(int), table["ts"].to_numpy()
    assert (clicks.sum(), len(clicks)) == (207, 40_000)
    start = np.datetime64(int(times.min()), "s").astype("datetime64[D]")
    document = {
        "name": "bandit",
        "traffic": {
            "path": str(path),
            "time": "ts",
            "dense": ["dense_hour"],
            "missing_dense": "zero",
            "sparse": [{"name": f"cat_{name}", "modulo": 512} for name in ("item", "user_feature_0", "user_feature_1")],
            "batch_size": 1024,
        },
        "windows": {
            "train": {"end": str(start + 2)},
            "validation": {"start": str(start + 2), "end": str(start + 3)},
            "search": {"start": str(start + 3), "end": str(start + 4)},
            "confirm": {"start": str(start + 4), "end": str(start + 5)},
        },
        "model": {
            "args": {"embedding_dim": 8, "bottom": [8], "top": [16]},
            "checkpoint": str(tmp_path / "model.safetensors"),
        },
        "evaluation": {"num_workers": 0},
        "results": {"root": str(tmp_path / "runs")},
        "monitor": {"end": str(start + 7)},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(document))
    assert lowprec("train", config, "--json").code == 0
    plan = plan_of(config, tmp_path / "plan.json", Precision.INT4, 0.05)
    done = lowprec("monitor", config, "--plan", plan, "--json")
    assert {window["state"] for window in done.document["windows"]} == {"insufficient_data"}, done.out
    assert done.code == 4 and all("not enough evidence" in w["reasons"][0] for w in done.document["windows"])


def test_films_are_watched_quarter_by_quarter_as_the_readme_says(lowprec, tmp_path):
    log = real_log("movielens_latest_small_2015_2018.parquet")
    arguments = arguments_of("monitor-movielens", log, tmp_path)
    assert lowprec("train", *arguments).code == 0
    searched = lowprec("search", *arguments, "--json")
    assert searched.code == 0 and searched.document["bytes_ratio"] < 0.2, searched.err
    done = lowprec("monitor", *arguments, "--plan", searched.document["plan_path"], "--json")
    # The last digits of a trained model are those of a machine, so the worst quarter may be a breach or not. On every
    # machine that quarter is the one of the README, and inputs moved: hardly any user of 2014 rates films later.
    windows = done.document["windows"]
    worst = max(windows, key=lambda w: w["gap_pct"])
    states = [w["state"] for w in windows]
    assert len(windows) == 15 and set(states) <= {"ok", "warn", "insufficient_data", "breach"}
    assert done.code == (2 if "breach" in states else 1 if "warn" in states else 4), done.err
    if "breach" in states:
        assert windows[states.index("breach")] is worst and worst["gap_lower_pct"] > 0.3
    for window in windows:
        assert window["gap_lower_pct"] < window["gap_pct"] < window["gap_upper_pct"]
        assert 0 < window["kl_pct"] < 0.3
        if window["kl_lower_pct"] is not None:  # few examples of a small quarter may carry most of it
            assert window["kl_lower_pct"] < window["kl_pct"] < window["kl_upper_pct"]
        assert window["running_lower_pct"] < window["running_pct"] < window["running_upper_pct"]
        assert sum(u["kl_pct"] for u in window["units"]) == pytest.approx(window["kl_pct"], rel=0.3)
        assert window["inputs"][0]["feature"] == "cat_user" and window["inputs"][0]["distance"] > 0.5
    # Users come and go: that is named until earlier windows say that it is normal.
    assert all(w["num_moved"] > 0 for w in windows[:4])
    assert not any(i["is_warning"] for w in windows[4:] for i in w["inputs"] if i["feature"] == "cat_user")
    readme = (PROJECT / "README.md").read_text()
    (shown,) = (
        json.loads(block) for block in re.findall(r"```json\n(.*?)```", readme, re.DOTALL) if "cat_user" in block
    )
    told = next(w for w in windows if w["window"] == shown["window"])
    assert shown.keys() <= told.keys() and shown["units"][0].keys() <= told["units"][0].keys()
    assert told is worst and told["overdispersion"] > 5 and told["gap_pct"] > 0.5
    sql = 'SELECT left("window", 11) AS quarter, num_rows, state FROM monitor_windows ORDER BY window_start'
    rows = json.loads(lowprec("results", sql, "--root", tmp_path / "runs", "--format", "json").out)["rows"]
    assert [row["state"] for row in rows] == [w["state"] for w in windows]
    printed = re.findall(r"^    (\[\d{4}-\d\d-\d\d) +(\d+) +[-.\d]+ ", readme, re.MULTILINE)
    assert len(printed) >= 5
    assert set(printed) <= {(row["quarter"], str(row["num_rows"])) for row in rows}
