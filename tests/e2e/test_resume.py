"""A search killed at any moment and resumed does the trials of one left alone."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lowprec as package
from lowprec.config import load_config
from lowprec.search import open_job

SQL = "SELECT * FROM trials WHERE run_id = '{}' ORDER BY evaluation, number"


def trials(root, run_id):
    frame = package.query(SQL.format(run_id), root=str(root))
    return frame.drop(columns=["run_id", "row_key", "committed_at"]).to_json(orient="records")


def only_run(root):
    return package.query("SELECT DISTINCT run_id FROM runs", root=str(root)).run_id


@pytest.fixture(scope="module")
def whole_run(lowprec, small_folder, tmp_path_factory):
    """A whole run in process, how long it took, and its root."""
    root = tmp_path_factory.mktemp("whole") / "runs"
    began = time.monotonic()
    settings = ("--set", f"results.root={root}")
    done = lowprec("search", small_folder / "runs" / "config.yaml", *settings, "--json")
    assert done.code in (0, 2, 4), done.err
    return done, time.monotonic() - began, root


@pytest.fixture
def undisturbed(whole_run, tmp_path):
    """That run and how long it took; its root is copied to the folder of the test."""
    done, seconds, root = whole_run
    shutil.copytree(root, tmp_path / "alone")
    return done, seconds


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


@pytest.mark.parametrize("cut", [3, 7, 11])
def test_more_trials_continue_where_fewer_ended(lowprec, config_file, tmp_path, undisturbed, cut):
    """Also where the limit cut a wave in two: the trials in the end are those of a run without the limit."""
    _, _ = undisturbed
    root = tmp_path / "short"
    config = config_file(results__root=str(root))
    short = lowprec("search", config, "--json", "--max-trials", cut)
    run = short.document["run_id"]
    assert short.document["num_trials"] == cut
    full = lowprec("search", config, "--json", "--resume", run)
    exact = "SELECT plan_json, metrics_json, kind, wave FROM trials WHERE evaluation = 'exact' ORDER BY number"
    continued, alone = (package.query(exact, root=str(r)).to_dict("list") for r in (root, tmp_path / "alone"))
    assert continued == alone
    # Plans that were not confirmed the first time are held to a stricter level on the same window.
    confidences = {f["trial_key"]: f["confidence"] for f in full.document["finalists"]}
    again = {f["trial_key"] for f in short.document["finalists"]}
    assert all((c == pytest.approx(0.955)) == (key in again) for key, c in confidences.items())


def test_traffic_that_changed_is_noticed(lowprec, config_file, one_sentence, small_folder, tmp_path):
    shutil.copytree(small_folder / "traffic", tmp_path / "traffic")
    config = config_file(traffic__path=str(tmp_path / "traffic"))
    done = lowprec("search", config, "--json", "--max-trials", 3)
    file = next((tmp_path / "traffic").glob("*.parquet"))
    shutil.copy(file, file.with_name("part-99999.parquet"))
    changed = lowprec("search", config, "--resume", done.document["run_id"])
    one_sentence(changed, 64, ["windows.search", "begin a new run"])


def test_traffic_and_checkpoint_may_move_as_long_as_they_stay_the_same(
    lowprec, config_file, one_sentence, small_folder, tmp_path
):
    for name in ("here", "there"):
        shutil.copytree(small_folder / "traffic", tmp_path / name / "traffic")
        shutil.copy(small_folder / "model.safetensors", tmp_path / name)

    def config(name):
        folder = tmp_path / name
        return config_file(traffic__path=str(folder / "traffic"), model__checkpoint=str(folder / "model.safetensors"))

    done = lowprec("search", config("here"), "--json", "--max-trials", 3)
    resume = ("--resume", done.document["run_id"])
    shutil.rmtree(tmp_path / "here")
    moved = lowprec("search", config("there"), "--json", "--max-trials", 5, *resume)
    assert moved.code in (0, 2, 4) and moved.document["num_trials"] == 5, moved.err
    with (tmp_path / "there" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    one_sentence(lowprec("search", config("there"), *resume), 64, ["that run searched checkpoint", "begin a new run"])


def test_a_finished_run_keeps_its_verdict_while_it_is_resumed(lowprec, config_file, tmp_path, undisturbed):
    done, _ = undisturbed
    root = str(tmp_path / "alone")
    command = [str(Path(sys.executable).with_name("lowprec")), "search", str(config_file(results__root=root))]
    process = subprocess.Popen([*command, "--resume", done.document["run_id"], "--max-trials", "4000"])
    deadline = time.monotonic() + 60
    while package.query("SELECT status FROM runs", root=root).status[0] != "running":
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    run = package.query("SELECT verdict, recommended_trial_key FROM runs", root=root).iloc[0]
    assert (run.verdict, run.recommended_trial_key) == (done.document["verdict"], done.document["trial_key"])


def test_the_best_plan_so_far_is_always_there(lowprec, config_file, tmp_path):
    """A search that cannot confirm leaves a plan that verifies elsewhere."""
    config = config_file(search__max_trials=5)
    broken = lowprec("search", config, "--set", "windows.confirm={start: 2030-01-01}")
    assert broken.code == 3
    command = [str(Path(sys.executable).with_name("lowprec")), "search", str(config_file(search__max_trials=4000))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    plans = tmp_path / "runs" / "artifacts"
    deadline = time.monotonic() + 60
    while not list(plans.glob("*/plan.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    (plan,) = plans.glob("*/plan.json")
    evidence = json.loads(plan.read_text())["evidence"]
    assert evidence["kind"] == "exact" and evidence["verdict"] is None
    assert lowprec("verify", config_file(), "--plan", plan).code in (0, 2, 4)


def test_a_run_is_resumed_with_its_own_config_only(lowprec, config_file, one_sentence, tmp_path, undisturbed):
    done, _ = undisturbed
    run = done.document["run_id"]
    config = config_file(results__root=str(tmp_path / "alone"))
    changed = lowprec("search", config, "--resume", run, "--set", "search.seed=9", "--set", "search.budget=0.7")
    one_sentence(changed, 64, ["search.budget", "search.seed", "differ"])
    one_sentence(lowprec("search", config, "--resume", "20200101-000000-abcdef"), 64, ["no such run", run])


@pytest.mark.parametrize("number, code, workers", [(signal.SIGINT, 130, 0), (signal.SIGTERM, 143, 2)])
def test_an_interrupt_says_how_to_go_on(lowprec, config_file, tmp_path, number, code, workers):
    """By Ctrl-C, or as `timeout`, systemd and Kubernetes end what they run; Ray has a handler of its own for that."""
    config = config_file(
        evaluation__num_workers=workers, results__root=str(tmp_path / "runs2"), search__max_trials=4000
    )
    command = [str(Path(sys.executable).with_name("lowprec")), "search", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "runs2" / "trials").exists():
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "--resume" in err and "Traceback" not in err
    frame = package.query("SELECT run_id, status FROM runs", root=str(tmp_path / "runs2"))
    assert list(frame.status) == ["stopped"]
    # Who resumes with another limit is told, and one of speed as well.
    changes = ("--set", "search.max_trials=5", "--set", "evaluation.task_timeout_s=9")
    resumed = lowprec("search", config, "--resume", frame.run_id[0], *changes)
    assert resumed.code in (0, 2, 4)
    assert "resumed with search.max_trials 5, where the run had 4000" in resumed.err
    assert "resumed with evaluation.task_timeout_s 9.0, where the run had 600.0" in resumed.err


def test_a_time_limit_stops_the_waves_and_still_confirms(lowprec, config_file):
    done = lowprec("search", config_file(search__max_trials=100_000), "--json", "--timeout", "3s")
    assert done.code in (0, 2, 4)
    assert done.document["num_trials"] < 100_000 and done.document["confirm"]["num_examples"] > 0
    assert "time limit" in done.err


def test_work_that_kills_its_workers_is_set_aside_and_done_when_mended(lowprec, config_file, tmp_path, undisturbed):
    """The model kills its process on one batch, as a bug in its own C++ might; later it is mended."""
    done, _ = undisturbed
    batch = open_job(load_config(config_file())).window("search").batch(2)
    model = tmp_path / "fragile.py"
    lines = (
        "import os, signal, time, torch\n"
        "from lowprec.models import dlrm\n"
        "class Fragile(dlrm.DLRM):\n"
        "    def forward(self, dense, sparse):\n"
        f"        if len(dense) == 1024 and int(sparse['c5'][0].sum()) == {batch.sparse['c5'].values.sum()}: DIE\n"
        "        return super().forward(dense, sparse)\n"
        "def build(schema, **args):\n"
        "    model = dlrm.build(schema=schema, **args)\n"
        "    model.__class__ = Fragile\n"
        "    return model\n"
    )
    model.write_text(lines.replace("DIE", "os.kill(os.getpid(), signal.SIGKILL); time.sleep(100)"))
    root = tmp_path / "fragile"
    config = config_file(results__root=str(root), evaluation__num_workers=2, model__factory="fragile:build")
    failed = lowprec("search", config, "--json", cwd=tmp_path)
    assert failed.code == 3
    error = failed.document["error"]
    assert error["type"] == "PoisonedWorkError"
    assert "came to nothing 3 times and is set aside" in error["message"] and "want of memory" in error["message"]
    run = only_run(root)[0]
    (kept,) = (root / "artifacts" / run / "quarantine").glob("work-*.json")
    assert f"described in {kept}" in failed.err and f"--resume {run}" in failed.err
    aside = json.loads(kept.read_text())
    assert aside["work"].startswith("ProfileTask of batches 2 to") and len(aside["tries"]) == 3

    model.write_text(lines.replace("DIE", "pass"))
    mended = lowprec("search", config, "--json", "--resume", run, cwd=tmp_path)
    assert mended.code == done.code, mended.err
    for key in ("plan", "bytes", "search", "confirm", "verdict"):
        ours, theirs = mended.document[key], done.document[key]
        assert ours == theirs
