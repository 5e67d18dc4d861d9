"""The main job on real click logs, with the configs of the project, in one process."""

import json
from pathlib import Path

import pytest
from real_logs import arguments_of, real_log

DATA = {"movielens": "movielens_latest_small_2015_2018.parquet", "criteo": "criteo_kaggle_head10k.parquet"}


@pytest.fixture(scope="module", params=DATA)
def job(request, lowprec, tmp_path_factory):
    """Name, config arguments and folder of a job whose model was trained by the command."""
    name = request.param
    log = real_log(DATA[name])
    folder = tmp_path_factory.mktemp(name)
    arguments = arguments_of(name, log, folder)
    done = lowprec("train", *arguments, "--json")
    assert done.code == 0, done.err
    return name, arguments, folder, done.document


@pytest.fixture(scope="module")
def searched(lowprec, job):
    _, arguments, _, _ = job
    return lowprec("search", *arguments, "--json")


def test_the_model_learns_and_is_roughly_calibrated(job):
    name, _, _, document = job
    validation = document["validation"]
    # Predicting the label rate alone has NE 1. Criteo trains on 5,000 rows, so little is asked of it.
    assert validation["ne"] < {"movielens": 0.87, "criteo": 0.95}[name]
    assert validation["auc"] > {"movielens": 0.73, "criteo": 0.68}[name]
    assert 0.7 < validation["calibration"] < 1.4


def test_search_finds_a_plan_and_every_gap_has_its_evidence(job, searched):
    name, _, _, _ = job
    assert searched.code == 0, searched.err
    document = searched.document
    assert document["verdict"] == "certified" and document["bytes_ratio"] < 0.3
    assert document["confirm"]["gap_upper_pct"] <= document["budget_pct"]
    assert document["confirm"]["num_examples"] == {"movielens": 35382, "criteo": 2500}[name]
    rows = document["rows"]["confirm"]
    assert rows["num_bad"] == 0 and rows["out_of_range"] == {}
    for item in (document["search"], document["confirm"], *document["front"], *document["finalists"]):
        assert item["num_examples"] > 0
        # Where a plan changes hardly any of a few thousand examples there is no interval, and that is said.
        if item["gap_lower_pct"] is not None or item in (document["search"], document["confirm"]):
            assert item["gap_lower_pct"] <= item["gap_pct"] <= item["gap_upper_pct"]
    plan = json.loads(Path(document["plan_path"]).read_text())
    assert plan["bytes"] == document["bytes"] and plan["evidence"]["verdict"] == "certified"
    assert len(plan["units"]) == {"movielens": 3, "criteo": 26}[name]


def test_verify_says_the_same_of_the_plan(lowprec, job, searched):
    _, arguments, _, _ = job
    done = lowprec("verify", *arguments, "--plan", searched.document["plan_path"], "--json")
    assert done.code == 0
    assert done.document["gap_pct"] == searched.document["confirm"]["gap_pct"]
    # The same examples once more are no new look, so the confidence is that of the confirmation.
    assert done.document["gap_upper_pct"] == searched.document["confirm"]["gap_upper_pct"]


def test_results_show_the_front(lowprec, job, searched):
    _, _, folder, _ = job
    done = lowprec("results", "--root", folder / "runs")
    assert done.code == 0
    for part in (searched.document["run_id"], "Pareto front, exact on up to", "examples of [", "*"):
        assert part in done.out
    sql = "SELECT count(*) AS n FROM trials WHERE evaluation = 'exact'"
    rows = json.loads(lowprec("results", sql, "--root", folder / "runs", "--format", "json").out)["rows"]
    assert rows == [{"n": searched.document["num_trials"]}]


def test_few_heavy_users_are_no_success_and_the_missing_evidence_is_stated(lowprec, tmp_path):
    """With users as groups a plan carries its change in a few of them: nothing cheaper than fp32 can be certified."""
    log = real_log("movielens_latest_small_2015_2018.parquet")
    arguments = arguments_of("movielens", log, tmp_path)
    assert lowprec("train", *arguments).code == 0
    done = lowprec("search", *arguments, "--set", "traffic.group=cat_user", "--json")
    assert done.code == 4, done.err
    missing = done.document["missing_evidence"]
    assert done.document["verdict"] == "inconclusive" and missing["unit"] == "groups"
    assert missing["effective_units"] < missing["effective_needed"] or missing["examples_needed"] > 0
    assert missing["days_needed"] > 0 and "more groups" in missing["text"]
    shown = lowprec("search", *arguments, "--set", "traffic.group=cat_user", "--set", "search.max_trials=8")
    assert shown.code == 4 and "missing evidence: " in shown.out
