"""The launch gate: a deployed plan on a newer snapshot, and the search that begins from it where it fails."""

import json
from dataclasses import replace

import numpy as np
import pytest
from plans import LAYERS, LOW_LAYERS, write_mixed_plan
from safetensors.numpy import load_file, save_file

import lowprec
from lowprec.core.errors import ConfigError, PlanError
from lowprec.export import export_plan
from lowprec.gate import verify_plan
from lowprec.plan import Precision, RowRange, read_plan, write_plan
from lowprec.search import open_job, run_search


@pytest.fixture
def snapshot(small_folder, tmp_path):
    """Another checkpoint of the same model: every tensor goes through a function of its name and values."""

    def make(change):
        weights = load_file(small_folder / "model.safetensors")
        path = tmp_path / "newer.safetensors"
        save_file({name: np.float32(change(name, w)).reshape(w.shape) for name, w in weights.items()}, path)
        return str(path)

    return make


def moved(name, weight):
    """A little more training."""
    noise = np.random.default_rng(0).standard_normal(weight.shape)
    return weight + 0.01 * weight.std() * noise


def table_plan(config, path, precision=Precision.INT8):
    """All tables alike, layers at fp32."""
    file = write_mixed_plan(config, path)
    plan = file.plan.replace({unit: precision for unit in file.plan if unit.startswith("table:")})
    ranges = {unit: RowRange.MSE for unit, p in plan.items() if p.is_rowwise}
    size = open_job(config).space.size_bytes(plan)
    write_plan(replace(file, plan=plan, row_ranges=ranges, size_bytes=size), path)
    return plan


def test_a_plan_is_certified_for_a_newer_snapshot_and_can_be_exported(small_config, snapshot, tmp_path):
    config = small_config("search.budget=5.0")
    plan = table_plan(config, tmp_path / "plan.json")
    path = snapshot(moved)
    with pytest.raises(PlanError, match="was made for checkpoint"):
        verify_plan(small_config("search.budget=5.0", f"model.checkpoint={path}"), tmp_path / "plan.json")
    found = verify_plan(config, tmp_path / "plan.json", snapshot=path)
    assert found.verdict == found.final_verdict == "certified" and found.repair is None
    newer = small_config("search.budget=5.0", f"model.checkpoint={path}")
    job = open_job(newer)
    file = read_plan(found.snapshot.plan_path, units=job.units, checkpoint_sha256=job.checkpoint_sha256)
    assert file.plan == plan and file.evidence["verdict"] == "certified"
    assert found.snapshot.made_for_sha256 == open_job(config).checkpoint_sha256 != job.checkpoint_sha256
    # The same numbers as of a plan that was made for that snapshot.
    again = verify_plan(newer, found.snapshot.plan_path)
    assert again.metrics == found.metrics
    assert export_plan(newer, found.snapshot.plan_path, tmp_path / "served").to_dict()["warnings"] == []
    lowprec.load(tmp_path / "served")


def test_calibrated_inputs_are_calibrated_again(small_config, snapshot, tmp_path):
    config = small_config(LAYERS, "search.budget=1000")
    before = write_mixed_plan(config, tmp_path / "plan.json", LOW_LAYERS)
    # The layer before gives twice as much.
    path = snapshot(lambda name, w: 2 * w if name.startswith("top.0.") else w)
    found = verify_plan(config, tmp_path / "plan.json", snapshot=path)
    assert found.verdict == "certified"
    forms = read_plan(found.snapshot.plan_path, units=None, checkpoint_sha256=None).layer_forms
    static, old = forms["layer:top.2"], before.layer_forms["layer:top.2"]
    assert (static.weights, static.range, static.input_bits) == (old.weights, old.range, old.input_bits)
    job = open_job(small_config(LAYERS, f"model.checkpoint={path}"))
    largest = max(
        float(call.input.max())
        for batch in job.window("search").batches()
        for call in watched(job, batch)
        if call.layer == "layer:top.2"
    )
    # After a ReLU: from zero to the largest input of the search window.
    assert static.input_zero_point == 0 and static.input_scale == pytest.approx(largest / 127, rel=1e-5)
    assert forms["layer:top.0"] == before.layer_forms["layer:top.0"]
    # On the snapshot that it was made for, a plan stays as it is.
    same = verify_plan(config, tmp_path / "plan.json", snapshot=config.model.checkpoint)
    assert same.metrics == verify_plan(config, tmp_path / "plan.json").metrics


def watched(job, batch):
    """The calls of layers in the reference."""
    from lowprec.models.adapter import inputs_of

    with job.adapter.layers.watched(["layer:top.2"]) as calls:
        job.adapter.reference(inputs_of(batch))
    return calls


def rougher(name, weight):
    """Tables that int2 cannot hold."""
    return 1.1 * weight if name.startswith("tables.") else weight


def test_a_plan_that_fails_is_rejected_and_repaired_from_there(small_config, snapshot, tmp_path):
    config = small_config("search.budget=0.5")
    plan = table_plan(config, tmp_path / "plan.json", Precision.INT2)
    path = snapshot(rougher)
    rejected = verify_plan(config, tmp_path / "plan.json", snapshot=path)
    assert rejected.verdict == rejected.final_verdict == "rejected"
    assert rejected.snapshot.plan_path is None and rejected.repair is None
    found = verify_plan(config, tmp_path / "plan.json", snapshot=path, repair=True)
    assert found.verdict == "rejected" and found.final_verdict == "certified"
    tighter = verify_plan(config, tmp_path / "plan.json", snapshot=path, repair=True, budget_pct=0.2)
    assert tighter.repair.to_dict()["budget_pct"] == 0.2
    document = json.loads(json.dumps(found.to_dict()))
    repaired = document["repair"]
    assert repaired["verdict"] == "certified" and repaired["bytes"] > document["bytes"]
    sql = f"SELECT * FROM trials WHERE run_id = '{repaired['run_id']}' AND evaluation = 'exact' ORDER BY number"
    trials = lowprec.query(sql, config.results.root)
    assert trials["kind"].iloc[0] == "start" and "uniform" not in set(trials["kind"])
    assert json.loads(trials["plan_json"].iloc[0]) == {unit: str(p) for unit, p in plan.items()}
    # What is tried with it is at least as exact everywhere.
    order = list(Precision)
    for text in trials[trials["kind"] == "start"]["plan_json"]:
        other = json.loads(text)
        assert all(order.index(Precision(other[unit])) <= order.index(p) for unit, p in plan.items())
    newer = small_config(f"model.checkpoint={path}")
    assert verify_plan(newer, repaired["plan_path"]).verdict == "certified"


def test_too_few_examples_ask_for_more(small_config, snapshot, tmp_path):
    few = "windows.confirm={start: 2026-01-08, end: 2026-01-08T00:30:00Z}"
    config = small_config("search.budget=0.5", few)
    table_plan(config, tmp_path / "plan.json", Precision.INT4)
    assert verify_plan(config, tmp_path / "plan.json", snapshot=snapshot(moved)).verdict == "inconclusive"


def test_a_repair_that_was_stopped_goes_on_with_its_plan(small_config, tmp_path):
    def trials_of(config, run_id):
        sql = f"SELECT kind, plan_json, gap_pct FROM trials WHERE run_id = '{run_id}' AND evaluation = 'exact'"
        return lowprec.query(f"{sql} ORDER BY number", config.results.root)

    config = small_config("search.wave_size=4", "search.max_trials=9")
    plan = table_plan(config, tmp_path / "plan.json", Precision.INT4)
    whole = run_search(config, start=plan)
    short = small_config("search.wave_size=4", "search.max_trials=2")
    stopped = run_search(short, start=plan)
    assert len(trials_of(short, stopped.run_id)) == 2
    resumed = run_search(config, resume=stopped.run_id)
    assert resumed.run_id == stopped.run_id
    assert trials_of(config, whole.run_id).equals(trials_of(config, resumed.run_id))


def test_a_plan_outside_of_the_space_cannot_begin(small_config, tmp_path):
    config = small_config()
    table_plan(config, tmp_path / "plan.json", Precision.INT2)
    narrow = small_config("space.precisions=[fp32, int8]")
    with pytest.raises(ConfigError, match='"table:c0" is int2 in the plan to begin with, and the config lets it be'):
        verify_plan(narrow, tmp_path / "plan.json", repair=True)
    grouped = small_config("space.groups=[['table:c0', 'table:c1']]")
    file = read_plan(tmp_path / "plan.json", units=None, checkpoint_sha256=None)
    mixed = file.plan.replace({"table:c1": Precision.INT8})
    size = open_job(grouped).space.size_bytes(mixed)
    write_plan(replace(file, plan=mixed, size_bytes=size), tmp_path / "mixed.json")
    with pytest.raises(ConfigError, match="is one group in space.groups"):
        verify_plan(grouped, tmp_path / "mixed.json", repair=True)
