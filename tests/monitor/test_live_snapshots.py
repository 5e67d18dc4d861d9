"""Which snapshot of the model a window is judged on, and what of it is compared."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from monitor_tables import rows, states

from lowprec.core.errors import CheckpointError, PlanError
from lowprec.monitor.deployment import Deployment
from lowprec.plan import Precision, RowRange, read_plan, write_plan
from lowprec.plan.layer_form import LayerForm
from lowprec.search import open_job

LAYERS = "space.layers=[fp32, fp16, int8_dynamic]"


def test_a_checkpoint_that_is_gone_is_an_error_and_judged_when_it_is_back(deployed, monitored, small_folder, tmp_path):
    checkpoint = tmp_path / "model.safetensors"
    shutil.copy(small_folder / "model.safetensors", checkpoint)
    config, plan = deployed(f"model.checkpoint={checkpoint}")
    checkpoint.rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"model.safetensors"):
            monitored(config, plan)
    (row,) = rows(config)
    assert row["state"] == "error" and "model.safetensors" in row["message"]
    (tmp_path / "away").rename(checkpoint)
    assert states(monitored(config, plan)) == ["ok", "ok"]
    assert len(rows(config)) == 3


def test_each_window_names_the_snapshot_that_was_live(deployed, monitored, small_folder, tmp_path):
    for name, factor in (("2026-01-08", 1.0), ("2026-01-10", 3.0)):
        (tmp_path / "models" / name).mkdir(parents=True)
        scaled_copy(small_folder / "model.safetensors", tmp_path / "models" / name / "model.safetensors", factor)
    config, plan = deployed(f"monitor.checkpoint={tmp_path}/models/%Y-%m-%d/model.safetensors")
    outcome = monitored(config, plan)
    first, second = sorted(rows(config), key=lambda row: row["window_start"])
    assert "2026-01-08" in first["checkpoint"] and "2026-01-10" in second["checkpoint"]
    assert first["checkpoint_sha256"] != second["checkpoint_sha256"]
    # The same weights, three times as large: every row's range grew.
    grown = json.loads(second["saturation_json"])
    assert {g["table"] for g in grown} == {f"table:c{k}" for k in range(6)}
    assert all(g["num_grown"] == g["num_rows"] and g["factor"] == pytest.approx(3, rel=1e-3) for g in grown)
    assert any("coarser steps" in warning for warning in outcome.windows[1]["warnings"])
    assert states(outcome)[0] == "ok" and json.loads(first["saturation_json"]) == []


def test_ranges_are_compared_of_tables_that_have_some(deployed, monitored, small_folder, tmp_path):
    scaled_copy(small_folder / "model.safetensors", tmp_path / "model-2026-01-09.safetensors", 3.0)
    config, path = deployed(f"monitor.checkpoint={tmp_path}/model-%Y-%m-%d.safetensors", LAYERS)
    file = read_plan(path, units=None, checkpoint_sha256=None)
    low = {"layer:top.0": Precision.FP16}
    plan = file.plan.replace({unit: Precision.FP32 for unit in file.plan} | {"table:c1": Precision.INT8} | low)
    size = open_job(config).space.size_bytes(plan)
    write_plan(replace(file, plan=plan, row_ranges={"table:c1": RowRange.MINMAX}, size_bytes=size), path)
    monitored(config, path)
    (found,) = {row["saturation_json"] for row in rows(config)}
    assert [growth["table"] for growth in json.loads(found)] == ["table:c1"]


def test_another_form_of_a_layer_is_another_deployment(deployed):
    config, path = deployed(LAYERS)
    file = read_plan(path, units=None, checkpoint_sha256=None)
    plan = file.plan.replace({"layer:top.0": Precision.INT8_DYNAMIC})
    keys = set()
    for form in (LayerForm(), LayerForm(outliers=0.1)):
        write_plan(replace(file, plan=plan, layer_forms={"layer:top.0": form}), path)
        keys.add(Deployment.of(config, path).key)
    assert len(keys) == 2


def scaled_copy(source, target, factor):
    from safetensors.numpy import load_file, save_file

    weights = load_file(source)
    save_file({k: v * np.float32(factor) if k.startswith("tables.") else v for k, v in weights.items()}, target)


def test_a_plan_of_another_checkpoint_is_refused_and_leaves_no_row(deployed, monitored, small_folder, tmp_path):
    config, plan = deployed()
    scaled_copy(small_folder / "model.safetensors", tmp_path / "other.safetensors", 2.0)
    with pytest.raises(PlanError, match="was made for checkpoint"):
        monitored(config.with_(model={"checkpoint": str(tmp_path / "other.safetensors")}), plan)
    assert rows(config) == []
