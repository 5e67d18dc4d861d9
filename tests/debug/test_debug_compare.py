"""Two plans, or one plan on two snapshots, side by side."""

import json

import numpy as np
import planted_faults as faults
import pytest

from lowprec.core.errors import ConfigError, PlanError
from lowprec.debug import compare_plans, debug_plan
from lowprec.export import export_plan
from lowprec.plan import Precision


@pytest.fixture
def two_plans(uniform, tmp_path):
    """A plan of fp16 tables, and one with two of them coarse and a third better."""
    config, _, path = uniform(Precision.FP16, c5=Precision.INT8)
    before = path.rename(tmp_path / "before.json")
    _, _, after = uniform(Precision.FP16, c4=Precision.INT2, c3=Precision.INT4)
    return config, before, after


def test_units_are_ranked_by_how_much_their_part_of_the_gap_grew(two_plans):
    config, before, after = two_plans
    compared = compare_plans(config, before, after, None)
    document = compared.to_dict()
    alone = {path: {u.unit: u.kl_pct for u in debug_plan(config, path).units} for path in (before, after)}
    grew = {unit: alone[after][unit] - alone[before][unit] for unit in alone[before]}
    assert [unit["unit"] for unit in document["units"]] == sorted(grew, key=lambda unit: -grew[unit])
    assert [unit["grew_pct"] for unit in document["units"]] == pytest.approx(sorted(grew.values(), reverse=True))
    assert [unit["unit"] for unit in document["units"][:2]] == ["table:c4", "table:c3"]
    assert document["units"][0]["after"]["precision"] == "int2"
    assert document["before"]["plan"] == str(before) and "units" not in document["before"]
    assert document["after"]["kl_pct"] == debug_plan(config, after).metrics.kl_pct
    assert document["is_as_planned"]


def test_the_same_plan_on_another_snapshot(uniform, changed_checkpoint):
    config, _, path = uniform(Precision.INT8)

    def change(weights):
        weights["tables.c3.weight"] *= 20

    snapshot = changed_checkpoint(change).removeprefix("model.checkpoint=")
    compared = compare_plans(config, path, None, snapshot)
    assert compared.before.checkpoint_sha256 != compared.after.checkpoint_sha256
    assert compared.after.checkpoint_sha256 != json.loads(path.read_text())["checkpoint_sha256"]
    # Each beside the reference of its own snapshot: rows 20 times as large have as good an SQNR.
    before, after = (next(u for u in r.units if u.unit == "table:c3") for r in (compared.before, compared.after))
    assert after.alone.sqnr_db == pytest.approx(before.alone.sqnr_db, abs=0.3)
    assert after.alone.to_dict()["max_error"] > 15 * before.alone.to_dict()["max_error"]
    assert compared.to_dict()["units"][0]["unit"] == "table:c3"
    with pytest.raises(PlanError, match="was made for checkpoint"):
        debug_plan(config.with_(model={"checkpoint": snapshot}), path)


def test_there_is_one_thing_to_compare_with(two_plans):
    config, before, after = two_plans
    for against, snapshot in ((None, None), (after, "model.safetensors")):
        with pytest.raises(ConfigError, match="give either --against or --snapshot"):
            compare_plans(config, before, against, snapshot)


def test_a_plan_beside_its_folder(served, tmp_path):
    config, _, folder = served()
    plan = tmp_path / "plan.json"
    assert all(unit["grew_pct"] == 0 for unit in compare_plans(config, plan, folder, None).to_dict()["units"])
    faults.swapped_scales(folder, "table:c2", np.random.default_rng(0))
    compared = compare_plans(config, plan, folder, None)
    assert compared.before.is_as_planned and not compared.is_as_planned
    assert compared.to_dict()["units"][0]["unit"] == "table:c2"


def test_documents_are_json_also_of_what_is_broken(uniform, changed_checkpoint, often, tmp_path):
    row = often("c1")

    def change(weights):
        weights["tables.c1.weight"][row] = -1e8

    config, _, path = uniform(Precision.INT8)
    export_plan(config, path, tmp_path / "served")
    snapshot = changed_checkpoint(change).removeprefix("model.checkpoint=")
    compared = compare_plans(config, path, None, snapshot)
    assert not compared.is_as_planned and compared.before.is_as_planned
    document = json.loads(json.dumps(compared.to_dict(), allow_nan=False))
    assert document["after"]["suspects"][0]["unit"] == "table:c1"
    json.dumps(compared.after.to_dict(), allow_nan=False)
    with pytest.raises(PlanError, match="was made of checkpoint .* point model.checkpoint at"):
        compare_plans(config, tmp_path / "served", None, snapshot)


def test_arrays_of_both_have_folders_of_their_own(two_plans, tmp_path):
    config, before, after = two_plans
    document = compare_plans(config, before, after, None, arrays=tmp_path / "arrays").to_dict()
    for name in ("before", "after"):
        assert document[name]["arrays"]["rows"] == str(tmp_path / "arrays" / name / "rows.parquet")
        assert (tmp_path / "arrays" / name / "channels.parquet").exists()
