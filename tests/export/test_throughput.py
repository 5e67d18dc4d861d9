"""How fast a folder serves: both models on the same requests, what is saved, and what was predicted."""

import json
import shutil
from dataclasses import replace

import pytest
from plans import LAYERS, LOW_LAYERS, write_mixed_plan
from torch import nn

from lowprec.cli.render import render_serving
from lowprec.core.errors import ExportError, PlanError
from lowprec.export import export_plan, measure_serving
from lowprec.latency.calibration_file import write_calibration
from lowprec.latency.measure import calibrate
from lowprec.ops.timing import default_grid
from lowprec.search import open_job
from lowprec.search.record.describe import what_to_time


@pytest.fixture
def served(small_config, tmp_path):
    """An exported folder of a mixed plan over tables and layers, and its config."""
    config = small_config(LAYERS)
    file = write_mixed_plan(config, tmp_path / "plan.json", LOW_LAYERS)
    export_plan(config, tmp_path / "plan.json", tmp_path / "served")
    return config, file, tmp_path / "served"


def test_both_models_are_measured_at_every_size(served):
    config, file, folder = served
    report = measure_serving(folder, batch_sizes=[1, 100], seconds=0.1)
    document = json.loads(json.dumps(report.to_dict()))
    assert [(s["batch_size"], s["model"]) for s in document["speeds"]] == [
        (1, "fp32"),
        (1, "served"),
        (100, "fp32"),
        (100, "served"),
    ]
    for speed in document["speeds"]:
        assert speed["num_requests"] >= 20 and 0 < speed["p50_ms"] <= speed["p99_ms"]
        assert speed["examples_per_s"] == speed["batch_size"] * speed["requests_per_s"]
    # In turns: as many of each.
    assert document["speeds"][0]["num_requests"] == document["speeds"][1]["num_requests"]
    job = open_job(config)
    capacity = document["capacity"]
    assert (capacity["fp32_bytes"], capacity["served_bytes"]) == (job.space.fp32_bytes, job.space.size_bytes(file.plan))
    for of, (plain, low) in zip(
        capacity["requests_per_s_per_core"], (document["speeds"][:2], document["speeds"][2:]), strict=True
    ):
        assert of["ratio"] == pytest.approx(low["requests_per_s"] / plain["requests_per_s"])
    assert document["units"]["predicted_ns_per_example"] is None and document["units"]["latency_error"] is None
    assert all(ns > 0 for ns in document["units"]["measured_ns_per_example"].values())


def test_tables_may_be_in_memory(served):
    _, _, folder = served
    report = measure_serving(folder, batch_sizes=[10], seconds=0.05, in_memory=True)
    assert report.to_dict()["is_in_memory"] and len(report.speeds) == 2


def test_tables_and_layers_take_a_part_of_a_request(served):
    _, _, folder = served
    report = measure_serving(folder, batch_sizes=[200], seconds=0.3)
    for speed in report.speeds:
        of_request = 1e6 * speed.p50_ms / 200
        assert 0.05 * of_request < report.units_ns[speed.model] < 1.5 * of_request


def test_a_calibration_predicts_what_is_measured(served, tmp_path, capsys):
    config, file, folder = served
    dims, layers = what_to_time(config, 500)
    write_calibration(calibrate(default_grid(quick=True, dims=dims, num_bags=500), layers), tmp_path / "c.json")
    setting = f"cost.calibration={tmp_path / 'c.json'}"
    report = measure_serving(folder, batch_sizes=[500], seconds=0.2, overrides=(setting,))
    job = open_job(config.with_(cost={"calibration": tmp_path / "c.json"}))
    from lowprec.evaluation.rows import TableUse
    from lowprec.models.inputs import inputs_of

    batch = job.window("confirm").batch(0)
    calls = job.adapter.trace_lookups(inputs_of(batch))
    use = {c.table: TableUse(1.0, len(c.indices) / batch.num_rows) for c in calls}
    expected = job.search_costs(use).plan_latency_ns(file.plan)
    # Of another sample of the same traffic.
    assert report.predicted_ns["served"] == pytest.approx(expected, rel=0.1)
    document = report.to_dict()
    for model, error in document["units"]["latency_error"].items():
        assert error == pytest.approx(report.predicted_ns[model] / report.units_ns[model] - 1)
        assert -0.9 < error < 9  # a machine that tests run on is no place to be exact: make bench NAME=serving
    render_serving(document)
    out = capsys.readouterr().out
    assert "times as many a second per core" in out and "predicted" in out


def test_the_models_are_left_as_they_were(served, monkeypatch):
    _, _, folder = served
    seen = []
    import lowprec.export.throughput as throughput

    loaded = throughput.load
    monkeypatch.setattr(throughput, "load", lambda path, **options: seen.append(loaded(path, **options)) or seen[-1])
    measure_serving(folder, batch_sizes=[10], seconds=0.01)
    (module,) = seen
    assert isinstance(module, nn.Module)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_what_cannot_be_measured_is_said(served, small_config, small_folder, tmp_path):
    _, _, folder = served
    with pytest.raises(ExportError, match=r"has no 1000000 good rows together; give a smaller --batch-size"):
        measure_serving(folder, batch_sizes=[1_000_000], seconds=0.1)
    with pytest.raises(ExportError, match="so it is no export"):
        measure_serving(tmp_path, seconds=0.1)
    from safetensors.numpy import load_file, save_file

    weights = load_file(small_folder / "model.safetensors")
    save_file({name: 2 * w for name, w in weights.items()}, tmp_path / "other.safetensors")
    with pytest.raises(PlanError, match="name the right one with --set model.checkpoint=PATH"):
        measure_serving(folder, seconds=0.1, overrides=(f"model.checkpoint={tmp_path}/other.safetensors",))
    shutil.copy(small_folder / "model.safetensors", tmp_path / "moved.safetensors")
    measure_serving(
        folder, batch_sizes=[8], seconds=0.01, overrides=(f"model.checkpoint={tmp_path}/moved.safetensors",)
    )


def test_what_figures_do_not_mean_is_said(served, monkeypatch):
    monkeypatch.setattr("lowprec.export.throughput.num_cores", lambda: 1)
    found = measure_serving(served[2], batch_sizes=[64], seconds=0.05, num_threads=2)
    threads, *small = found.to_dict()["warnings"]
    assert threads.startswith("2 threads on 1 core: what is given for a core is for a thread")
    fp32, low = found.speeds
    assert len(small) == (low.requests_per_s < fp32.requests_per_s)
    slow = replace(found, speeds=(fp32, replace(low, requests_per_s=fp32.requests_per_s / 2)))
    assert "fit into caches" in slow.to_dict()["warnings"][1]
    fast = replace(found, speeds=(fp32, replace(low, requests_per_s=2 * fp32.requests_per_s)))
    assert len(fast.to_dict()["warnings"]) == 1
    large = replace(slow, fp32_bytes=10**9)
    assert len(large.to_dict()["warnings"]) == 1
