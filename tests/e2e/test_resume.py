"""A search killed at any moment and resumed does the trials of one left alone."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lowprec as package

SQL = "SELECT * FROM trials WHERE run_id = '{}' ORDER BY evaluation, number"


def trials(root, run_id):
    frame = package.query(SQL.format(run_id), root=str(root))
    return frame.drop(columns=["run_id", "row_key", "committed_at"]).to_json(orient="records")


def only_run(root):
    return package.query("SELECT DISTINCT run_id FROM runs", root=str(root)).run_id


@pytest.fixture
def undisturbed(lowprec, config_file, tmp_path):
    """A whole run in process, and how long it took."""
    began = time.monotonic()
    done = lowprec("search", config_file(results__root=str(tmp_path / "alone")), "--json")
    assert done.code in (0, 2, 4), done.err
    return done, time.monotonic() - began


@pytest.mark.parametrize(
    ("num_workers", "num_kills", "extra_s"), [(0, 5, 0.0), (2, 2, 8.0)], ids=["in-process", "ray-workers"]
)
def test_killed_at_random_moments(config_file, tmp_path, undisturbed, num_workers, num_kills, extra_s):
    """The trials must be those of a run without kills and without Ray; `extra_s` is what starting Ray takes, about.

    A run that ends before its kill comes is compared as it is, and another one is begun for the kills still to come.
    """
    done, seconds = undisturbed
    expected = trials(tmp_path / "alone", done.document["run_id"])
    rng = random.Random(7)
    command = [str(Path(sys.executable).with_name("lowprec")), "search", "--json"]
    resume: list[str] = []
    kills = finished = 0
    while kills < num_kills or not finished:
        root = tmp_path / f"killed-{finished}"
        config = config_file(results__root=str(root), evaluation__num_workers=num_workers)
        process = subprocess.Popen(
            [*command, str(config), *resume], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if kills < num_kills:
            # From the start of the imports to just before the end of an undisturbed run.
            time.sleep(rng.uniform(0.1, 0.95) * seconds + extra_s * rng.random())
            process.send_signal(signal.SIGKILL)
        out, err = process.communicate()
        if process.returncode == -signal.SIGKILL:
            kills += 1
            if root.joinpath("runs", "_delta_log").exists() and len(only_run(root)):
                resume = ["--resume", only_run(root)[0]]
            continue
        assert process.returncode == done.code, err
        document = json.loads(out)
        assert trials(root, document["run_id"]) == expected
        for key in ("plan", "bytes", "search", "confirm", "front", "verdict"):
            assert document[key] == done.document[key]
        finished += 1
        resume = []
    assert kills == num_kills


def test_resuming_a_finished_run_changes_nothing(lowprec, config_file, tmp_path, undisturbed):
    done, _ = undisturbed
    root = tmp_path / "alone"
    run = done.document["run_id"]
    before = trials(root, run)
    again = lowprec("search", config_file(results__root=str(root)), "--json", "--resume", run)
    assert again.code == done.code and again.document["plan"] == done.document["plan"]
    assert trials(root, run) == before


def test_more_trials_continue_where_fewer_ended(lowprec, config_file, tmp_path, undisturbed):
    done, _ = undisturbed
    root = tmp_path / "short"
    config = config_file(results__root=str(root))
    short = lowprec("search", config, "--json", "--max-trials", 11)
    run = short.document["run_id"]
    assert short.document["num_trials"] == 11
    full = lowprec("search", config, "--json", "--resume", run)
    assert full.document["num_trials"] == done.document["num_trials"]


def test_a_run_is_resumed_with_its_own_config_only(lowprec, config_file, one_sentence, tmp_path, undisturbed):
    done, _ = undisturbed
    run = done.document["run_id"]
    config = config_file(results__root=str(tmp_path / "alone"))
    changed = lowprec("search", config, "--resume", run, "--set", "search.seed=9", "--set", "search.budget=0.7")
    one_sentence(changed, 64, ["search.budget", "search.seed", "differ"])
    one_sentence(lowprec("search", config, "--resume", "20200101-000000-abcdef"), 64, ["no such run", run])


def test_an_interrupt_says_how_to_go_on(config_file, tmp_path):
    config = config_file(results__root=str(tmp_path / "runs2"), search__max_trials=4000)
    command = [str(Path(sys.executable).with_name("lowprec")), "search", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "runs2" / "trials").exists():
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in err and "Traceback" not in err
    frame = package.query("SELECT status FROM runs", root=str(tmp_path / "runs2"))
    assert list(frame.status) == ["stopped"]


def test_a_time_limit_stops_the_waves_and_still_confirms(lowprec, config_file):
    done = lowprec("search", config_file(search__max_trials=100_000), "--json", "--timeout", "3s")
    assert done.code in (0, 2, 4)
    assert done.document["num_trials"] < 100_000 and done.document["confirm"]["num_examples"] > 0
    assert "time limit" in done.err
