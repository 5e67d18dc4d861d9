"""Whatever is wrong with a folder or a checkpoint, its unit is the first suspect, and the reason is said."""

import json
import re

import numpy as np
import planted_faults as faults
import pytest
import safetensors.torch as torch_files
import torch
from safetensors.numpy import load_file, save_file

from lowprec import ops
from lowprec.debug import debug_plan
from lowprec.ops.linear import safe_input_bits
from lowprec.plan import Precision
from lowprec.plan.layer_form import LayerForm, WeightScale
from lowprec.search import open_job


def planted(config, file, folder, what):
    """Plant a fault; returns the unit whose fault it is."""
    rng = np.random.default_rng(0)
    kind, _, name = what.partition(" ")
    unit = f"layer:{name}" if kind in ("dead", "zero") else f"table:{name}"
    if kind == "scales":
        faults.swapped_scales(folder, unit, rng)
    elif kind == "rows":
        faults.corrupted_rows(folder, unit, rng, 30, 12)
    elif kind == "stale":
        weight = open_job(config).adapter.weights[unit].numpy()
        noise = rng.standard_normal(weight.shape).astype(np.float32)
        faults.stale_table(folder, unit, weight + np.float32(0.5) * weight.std() * noise, file.row_range(unit))
    elif kind == "dead":
        faults.dead_channel(folder, unit, 5)
    else:
        faults.wrong_zero_point(folder, unit, 64)
    return unit


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("scales c2", r"(160|15\d) of (160|15\d) rows .* scales and biases are others, codes are the same"),
        ("scales c3", "scales and biases are others, codes are the same"),
        ("scales c4", "scales and biases are others, codes are the same"),
        ("rows c2", r"rows 30 to 41, all 12 that traffic asked for, and no other .* codes are others"),
        ("rows c3", r"rows 30 to 41, all 11 that traffic asked for, and no other .* codes are others"),
        (
            "rows c1",
            r"rows 30 to 41, all 12 that traffic asked for, and no other .* like nothing in the checkpoint",
        ),
        ("rows c0", r"rows 30 to 39, all 10 that traffic asked for, and no other .* \(cosine -?0\.0\d+ "),
        ("stale c1", r"another version of the table \(cosine 0\.[89]\d+ with the checkpoint's\)"),
        ("stale c2", r"another version of the table \(cosine 0\.[89]\d+ with the checkpoint's\)"),
        ("stale c3", r"another version of the table \(cosine 0\.[89]\d+ with the checkpoint's\)"),
        ("stale c4", r"rows .* other values \(cosine 0\.\d+ with the checkpoint's\)"),
        ("stale c5", r"another version of the table \(cosine 0\.[89]\d+ with the checkpoint's\)"),
        ("dead bottom.0", r"^weight of channel 5 is not what the plan makes of it$"),
        ("dead bottom.2", r"^weight of channel 5 is not what the plan makes of it$"),
        ("dead top.0", r"^codes of channel 5 is not what the plan makes of it$"),
    ],
)
def test_a_fault_of_a_folder_is_the_first_suspect(served, what, said):
    config, file, folder = served()
    culprit = planted(config, file, folder, what)
    report = debug_plan(config, folder)
    assert not report.is_as_planned
    assert [unit.unit for unit in report.units if unit.differs] == [culprit]
    first = report.suspects[0]
    (unit,) = [unit for unit in report.units if unit.unit == culprit]
    assert first.unit == culprit and first.why[0] == unit.differs[0]
    assert any(re.search(said, text) for text in unit.differs), unit.differs
    assert not report.notes, "hashes fit what was planted"
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_dead_channel_is_the_worst_of_its_layer(served):
    config, file, folder = served()
    planted(config, file, folder, "dead bottom.2")
    why = debug_plan(config, folder).suspects[0].why
    assert any(text.startswith("channel 5 has ") and "all its weights became zero" in text for text in why), why


def test_a_wrong_zero_point_is_seen_by_the_inputs_that_its_codes_miss(served):
    """The plan of the folder has it, so that nothing differs from the plan."""
    config, file, folder = served()
    healthy = debug_plan(config, folder)
    assert not any(unit.misfits for unit in healthy.units)
    planted(config, file, folder, "zero top.2")
    report = debug_plan(config, folder)
    first = report.suspects[0]
    assert first.unit == "layer:top.2" and report.is_as_planned
    # (0 - 64) and (127 - 64) steps of 5 / 127.
    assert first.why[0].startswith("its input codes reach from -2.52 to 2.48 and its inputs from 0 to ")
    before, after = (next(u for u in r.units if u.unit == "layer:top.2") for r in (healthy, report))
    assert after.alone.sqnr_db < before.alone.sqnr_db - 6
    assert after.counts["inputs"]["saturated"] > before.counts["inputs"]["saturated"] == 0


def test_a_healthy_folder_is_as_planned(served):
    config, _, folder = served()
    report = debug_plan(config, folder)
    assert report.is_as_planned and report.notes == ()
    assert not any(unit.differs or unit.is_broken or unit.misfits for unit in report.units)
    assert report.label == str(folder)


def test_a_plan_and_its_folder_are_told_the_same(served, tmp_path):
    config, _, folder = served()
    plan, exported = (debug_plan(config, where).to_dict() for where in (tmp_path / "plan.json", folder))
    for document in (plan, exported):
        document.update(plan="", seconds=0)
    assert plan == exported


def test_a_file_that_changed_is_named_also_where_traffic_does_not_see_it(served):
    config, _, folder = served()
    path = folder / "tables" / "0004-c4.safetensors"
    job = open_job(config)
    window = job.window("confirm")
    asked = np.concatenate([window.batch(k).sparse["c4"].values for k in range(window.num_batches)])
    unseen = int(np.setdiff1d(np.arange(640), asked)[0])
    ((name, rows),) = load_file(path).items()
    rows = rows.copy()
    rows[unseen, 4] ^= 1
    save_file({name: rows}, path)
    report = debug_plan(config, folder)
    assert report.notes == (
        "tables/0004-c4.safetensors is not what the manifest says: it was changed after the export, or in copying",
    )
    assert report.to_dict()["warnings"][-1] == report.notes[0]
    assert report.differs == report.notes and not report.is_as_planned
    assert not any(unit.differs for unit in report.units)


def test_what_is_wrong_beside_tables_and_layers_is_named(served):
    config, _, folder = served()
    path = folder / "dense.safetensors"
    tensors = torch_files.load_file(path)
    tensors["dense_std"] = tensors["dense_std"] * 2
    torch_files.save_file(tensors, path)
    faults._fit_hash(folder, path)
    report = debug_plan(config, folder)
    assert report.notes == ('"dense_std" is not what the checkpoint has',) and not report.is_as_planned


def test_an_fp32_layer_that_changed_is_found(served):
    """Of a plan that says nothing of layers."""
    config, _, folder = served(layers=None)
    path = folder / "dense.safetensors"
    tensors = torch_files.load_file(path)
    tensors["top.0.bias"] = tensors["top.0.bias"] + 0.5 * (torch.arange(16) == 3)
    torch_files.save_file(tensors, path)
    faults._fit_hash(folder, path)
    report = debug_plan(config, folder)
    assert report.suspects[0].unit == "layer:top.0"
    assert report.suspects[0].why[0] == "bias of channel 3 is not what the plan makes of it"


def test_stored_values_that_are_not_finite_are_not_laid_to_the_checkpoint(served):
    config, _, folder = served()
    path = folder / "tables" / "0001-c1.safetensors"
    ((name, rows),) = load_file(path).items()
    rows = rows.copy()
    rows[3, 2] = np.inf
    save_file({name: rows}, path)
    report = debug_plan(config, folder)
    first = report.suspects[0]
    assert first.unit == "table:c1" and not report.is_as_planned
    (unit,) = [u for u in report.units if u.unit == "table:c1"]
    assert unit.is_broken and unit.differs[0].startswith("row 3 of those that traffic asked for is not what")
    assert unit.worst[0].id == 3 and unit.worst[0].why.startswith("what is stored of it is not finite, though it spans")
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("table", ["c1", "c3"])
def test_a_row_beyond_fp16_is_the_first_suspect(planned, changed_checkpoint, often, table):
    row = often(table)

    def change(weights):
        weights[f"tables.{table}.weight"][row, 2] = 1e8

    config, _, path = planned(changed_checkpoint(change))
    report = debug_plan(config, path)
    assert not report.is_as_planned and report.suspects[0].unit == f"table:{table}"
    broken = [unit for unit in report.units if unit.is_broken]
    assert [unit.unit for unit in broken] == [f"table:{table}"]
    assert broken[0].worst[0].id == row and "which overflows the fp16 parts of" in broken[0].worst[0].why
    window = open_job(config).window("confirm")
    asked = 0
    for k in range(window.num_batches):
        bags = window.batch(k).sparse[table]
        sizes = np.diff(bags.offsets)
        asked += len(np.unique(np.repeat(np.arange(len(sizes)), sizes)[bags.values == row]))
    # Of a row-wise form every value of the row is lost, of an fp16 one the value.
    assert broken[0].alone.num_not_finite == asked * (8 if table == "c3" else 1)
    assert f"{broken[0].alone.num_not_finite:,} of 48,000 values that it returned are not finite" in " ".join(
        report.suspects[0].why
    )
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.change.unit == f"table:{table}" and report.change.to == "fp32"
    assert np.isfinite(report.change.kl_after_pct)


def test_one_outlier_under_a_shared_scale_is_said_of_its_layer(planned, changed_checkpoint):
    def change(weights):
        weights["top.0.weight"][4] *= 200
        weights["top.0.bias"][4] *= 200
        weights["top.2.weight"][:, 4] /= 200

    form = LayerForm(WeightScale.TENSOR, input_bits=safe_input_bits())
    config, _, path = planned(changed_checkpoint(change), layers={"layer:top.0": (Precision.INT8_DYNAMIC, form)})
    report = debug_plan(config, path)
    first = report.suspects[0]
    assert first.unit == "layer:top.0" and report.is_as_planned
    assert first.why[0].startswith("one scale for all channels: with one for each, weights would have ")
    assert any("channel 4 has a weight of" in text and "all channels share its scale" in text for text in first.why)


def test_huge_values_that_fp32_holds_are_reported(planned, changed_checkpoint, often):
    row = often("c5")

    def change(weights):
        weights["tables.c5.weight"][row, 2] = 1e22

    config, _, path = planned(changed_checkpoint(change))
    json.dumps(debug_plan(config, path).to_dict(), allow_nan=False)


def test_stored_rows_are_told_by_what_ops_quantize_makes(served):
    """What is planted here is what the folder serves, so that a test of faults is one."""
    config, file, folder = served()
    planted(config, file, folder, "rows c2")
    weight = open_job(config).adapter.weights["table:c2"].numpy()
    expected = ops.quantize(weight, Precision.INT8, row_range=file.row_range("table:c2"))
    ((_, rows),) = load_file(folder / "tables" / "0002-c2.safetensors").items()
    assert np.flatnonzero((rows != expected).any(axis=1)).tolist() == list(range(30, 42))
