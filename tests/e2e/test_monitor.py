"""The monitor as a command, on made-up and on real logs."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from real_logs import real_log

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
    verified = lowprec("verify", config, "--plan", path, "--window", "search", "--json")
    assert verified.document["kl_pct"] < 0.3


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
