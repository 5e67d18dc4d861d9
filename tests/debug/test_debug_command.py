"""`lowprec debug`, as a user types it."""

import os

import planted_faults as faults
import pytest
from command_process import run_command

from lowprec.debug import debug_plan
from lowprec.plan import Precision


@pytest.fixture
def debug(tmp_path):
    """Run `lowprec debug` on a config."""

    def run(config, *args):
        (tmp_path / "job.json").write_text(config.to_json())
        command = ["debug", "job.json", *(str(arg) for arg in args)]
        return run_command(command, tmp_path, {**os.environ, "COLUMNS": "200"})

    return run


def test_the_document_is_that_of_the_report(planned, debug):
    config, _, path = planned()
    done = debug(config, "--plan", path, "--json")
    assert done.code == 0, done.err
    document = done.document
    expected = {"schema_version": 1, "command": "debug", **debug_plan(config, path).to_dict()}
    assert document | {"seconds": 0} == expected | {"seconds": 0}


def test_people_read_units_suspects_and_the_change(uniform, debug, tmp_path):
    config, _, path = uniform(Precision.FP16, c4=Precision.INT2)
    done = debug(config, "--plan", path, "--examples", 2000, "--window", "search", "--arrays", tmp_path / "arrays")
    assert done.code == 0, done.err
    out = " ".join(done.out.split())
    lines = [line for line in done.out.splitlines() if "table:" in line or "layer:" in line]
    assert [line.split()[1] for line in lines[:3]] == ["layer:bottom.0", "layer:bottom.2", "table:c0"]
    assert "1. table:c4: " in out and "percent of the label-free gap" in out and "2. " not in out
    assert "change that helps most: table:c4 int" in out and "more: KL gap" in out and "exact on" in out
    assert "examples of [2026-01-05T00:00:00Z, 2026-01-08T00:00:00Z)" in out
    assert (tmp_path / "arrays" / "rows.parquet").exists() and "errors by row:" in out


def test_no_suspect_is_said_as_well(uniform, debug):
    config, _, path = uniform(Precision.FP32)
    done = debug(config, "--plan", path)
    assert done.code == 0 and "no unit is suspect" in done.out and "change that helps most" not in done.out


def test_a_folder_that_is_not_its_plan_is_rejected(served, debug, tmp_path):
    config, _, folder = served()
    assert debug(config, "--plan", folder).code == 0
    faults.dead_channel(folder, "layer:bottom.2", 5)
    done = debug(config, "--plan", folder)
    assert done.code == 2 and "1. layer:bottom.2: weight of channel 5 is not what the plan makes of it" in " ".join(
        done.out.split()
    )
    compared = debug(config, "--plan", tmp_path / "plan.json", "--against", folder, "--json")
    assert compared.code == 2 and not compared.document["is_as_planned"]
    assert compared.document["units"][0]["unit"] == "layer:bottom.2"


def test_values_that_are_not_finite_are_rejected(planned, changed_checkpoint, often, debug):
    row = often("c3")

    def change(weights):
        weights["tables.c3.weight"][row, 2] = 1e8

    config, _, path = planned(changed_checkpoint(change))
    done = debug(config, "--plan", path)
    assert done.code == 2 and "not finite" in done.out
    assert f"row {row} has 100 percent of its squared error: spans" in " ".join(done.out.split())
    document = debug(config, "--plan", path, "--json").document
    assert "NaN" not in done.out and document["is_as_planned"] is False
    assert document["suspects"][0]["unit"] == "table:c3"


def test_two_plans_are_printed_side_by_side(uniform, debug, tmp_path):
    config, _, path = uniform(Precision.FP16)
    before = path.rename(tmp_path / "before.json")
    _, _, after = uniform(Precision.FP16, c4=Precision.INT2)
    done = debug(config, "--plan", before, "--against", after)
    assert done.code == 0, done.err
    first = next(line for line in done.out.splitlines() if "table:" in line)
    assert "table:c4" in first and "fp16 to int2" in first
    assert f"before: {before}: gap" in " ".join(done.out.split())


def test_what_is_wrong_is_one_sentence(served, uniform, changed_checkpoint, debug, tmp_path):
    config, _, folder = served()
    plan = tmp_path / "plan.json"
    (tmp_path / "empty").mkdir()

    def change(weights):
        weights["top.0.bias"] += 1

    override = changed_checkpoint(change)
    other = config.with_(model={"checkpoint": override.removeprefix("model.checkpoint=")})
    said = [
        (
            debug(config, "--plan", tmp_path / "empty"),
            3,
            "is a folder without manifest.json; give a plan.json, or what",
        ),
        (debug(config, "--plan", tmp_path / "gone"), 64, "gone: cannot be read: No such file"),
        (debug(other, "--plan", folder), 64, "was made of checkpoint"),
        (debug(other, "--plan", plan), 64, "was made for checkpoint"),
        (
            debug(config, "--plan", plan, "--against", plan, "--snapshot", "x"),
            64,
            "give either --against or --snapshot",
        ),
        (debug(config, "--plan", plan, "--snapshot", tmp_path / "gone"), 3, "gone"),
        (debug(config), 64, "--plan"),
    ]
    for done, code, text in said:
        errors = [line for line in done.err.splitlines() if line.lower().startswith("error:")]
        assert done.code == code, done.err
        assert len(errors) == 1 and text in " ".join(done.err.split()), done.err
        assert "Traceback" not in done.err and done.out == ""
