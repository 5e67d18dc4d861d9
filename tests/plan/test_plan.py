"""Plans hold one precision for every unit, and a plan file comes back as it was written."""

import json
import math

import pytest

from lowprec.core.errors import PlanError
from lowprec.plan import (
    Plan,
    PlanFile,
    Precision,
    RowRange,
    Unit,
    precision_counts,
    precision_texts,
    read_plan,
    write_plan,
)
from lowprec.plan.layer_form import Arithmetic, ClipRange, LayerForm, WeightScale

UNITS = (Unit("table:a", 10, 4), Unit("table:b", 20, 8))
PLAN = Plan({"table:a": Precision.INT4, "table:b": Precision.FP16})


@pytest.fixture
def plan_path(tmp_path):
    path = tmp_path / "deep" / "plan.json"
    write_plan(PlanFile(PLAN, "m:f", "ab" * 32, 123, 16, {"table:a": RowRange.MSE}, {"gap_pct": 0.01}), path)
    return path


def rewritten(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


def test_round_trip(plan_path):
    file = read_plan(plan_path, units=UNITS, checkpoint_sha256="ab" * 32)
    assert file == PlanFile(PLAN, "m:f", "ab" * 32, 123, 16, {"table:a": RowRange.MSE}, {"gap_pct": 0.01})
    assert json.loads(plan_path.read_text())["units"]["table:a"] == {"precision": "int4", "range": "mse"}
    assert not list(plan_path.parent.glob("*.partial"))


LAYERS = (Unit("layer:top.0", 8, 4), Unit("layer:top.2", 1, 8), Unit("layer:over", 1, 1), Unit("table:a", 10, 4))
FORMS = {
    "layer:top.0": LayerForm(WeightScale.TENSOR, ClipRange.MSE, 0.01, 7, 0.125, 3),
    "layer:top.2": LayerForm(),
    "layer:over": Arithmetic(block=4),
}
LAYER_PLAN = Plan(
    dict(
        zip(
            (unit.name for unit in LAYERS),
            (Precision.INT8_STATIC, Precision.INT8_DYNAMIC, Precision.EMULATED, Precision.FP16),
            strict=True,
        )
    )
)


@pytest.fixture
def layer_path(tmp_path):
    path = tmp_path / "layers.json"
    write_plan(PlanFile(LAYER_PLAN, "m:f", "ab" * 32, 123, layer_forms=FORMS), path)
    return path


def test_round_trip_of_layers_with_their_forms(layer_path):
    file = read_plan(layer_path, units=LAYERS, checkpoint_sha256=None)
    assert (file.plan, file.layer_forms) == (LAYER_PLAN, FORMS)
    entry = json.loads(layer_path.read_text())["units"]["layer:top.2"]
    assert entry == {
        "precision": "int8_dynamic",
        "weights": "channel",
        "range": "minmax",
        "outliers": 0.0,
        "input_bits": 8,
    }


@pytest.mark.parametrize(
    ("unit", "key", "value", "said"),
    [
        ("layer:top.0", "precision", "int4", 'int8_static, emulated; got "int4"'),
        ("table:a", "precision", "bf16", 'fp32, fp16, int8, int4, int2; got "bf16"'),
        ("layer:top.0", "weights", "row", 'unit "layer:top.0": is not the form of an int8 layer'),
        ("layer:top.0", "colour", "red", 'unit "layer:top.0": an int8 layer has no colour'),
        ("layer:over", "accumulate", "fp12", 'unit "layer:over": does not describe an arithmetic'),
    ],
)
def test_a_layer_that_makes_no_sense_is_refused(layer_path, unit, key, value, said):
    changed = rewritten(layer_path, lambda d: d["units"][unit].update({key: value}))
    with pytest.raises(PlanError, match=said):
        read_plan(changed, units=LAYERS, checkpoint_sha256=None)


def test_all_keys_that_a_layer_misses_are_named(layer_path):
    entry = {"precision": "int8_static", "weights": "channel", "input_bits": 8}
    changed = rewritten(layer_path, lambda d: d["units"].update({"layer:top.0": entry}))
    with pytest.raises(PlanError, match="misses range, outliers, input_scale, input_zero_point of a layer") as e:
        read_plan(changed, units=LAYERS, checkpoint_sha256=None)
    assert "--unit UNIT=int8_static" in str(e.value) and "search again" not in str(e.value)
    emulated = {"layer:top.0": {"precision": "fp32"}, "layer:over": {"precision": "emulated", "block": 4}}
    changed = rewritten(layer_path, lambda d: d.update(units=d["units"] | emulated))
    with pytest.raises(PlanError, match="misses inputs, weights, accumulate, output of a layer at emulated"):
        read_plan(changed, units=LAYERS, checkpoint_sha256=None)


def test_a_plan_lists_every_unit_in_the_order_of_the_model():
    plan = Plan.of(UNITS, {"table:b": Precision.FP16, "table:a": Precision.INT4})
    assert list(plan) == ["table:a", "table:b"]
    assert plan == PLAN and hash(plan) == hash(PLAN)
    assert precision_counts([*plan.values(), Precision.INT4]) == "int4:2 fp16:1"


@pytest.mark.parametrize(
    ("precisions", "said"),
    [
        ({"table:a": Precision.INT4}, "the plan misses table:b"),
        ({"table:a": Precision.INT4, "table:b": Precision.INT4, "table:c": Precision.INT4}, "does not know table:c"),
    ],
)
def test_a_plan_that_misses_or_invents_a_unit_cannot_exist(precisions, said):
    with pytest.raises(PlanError, match=said):
        Plan.of(UNITS, precisions)


def test_replacing_an_unknown_unit_is_an_error():
    with pytest.raises(PlanError, match='no unit "table:z"'):
        PLAN.replace({"table:z": Precision.INT8})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["units"].pop("table:b"), "misses table:b"),
        (lambda d: d["units"].update({"table:zz": {"precision": "fp16"}}), "does not know table:zz"),
        (lambda d: d["units"]["table:a"].update(precision="int5"), 'fp32, fp16, int8, int4, int2; got "int5"'),
        (lambda d: d["units"]["table:a"].update(range="best"), 'range must be one of minmax, mse; got "best"'),
        (lambda d: d["units"]["table:a"].pop("range"), '"table:a" at int4 has precision and range; got precision'),
        (lambda d: d["units"]["table:a"].update(rnge="mse"), "has precision and range; got precision, range, rnge"),
        (lambda d: d["units"]["table:b"].update(range="mse"), "at fp16 has precision; got precision, range"),
        (lambda d: d["units"].update({"table:a": "int4"}), "needs"),
        (lambda d: d.update(schema_version=9), "schema_version must be 1"),
        (lambda d: d.pop("bytes"), "misses bytes"),
        (lambda d: d.update(bytes="abc"), r"misses bytes \(int\), or has another type"),
        (lambda d: d.update(checkpoint_sha256=None), r"checkpoint_sha256 \(str\)"),
        (lambda d: d.update(checkpoint_sha256="cd" * 32), "was made for checkpoint cdcdcdcdcdcd"),
        (lambda d: d.update(checkpoint_sha256="cd" * 32), "lowprec verify CONFIG --plan PLAN --snapshot CHECKPOINT"),
        (lambda d: d.update(evidence=[1]), r"evidence \(dict\), or has another type"),
        (lambda d: d.update(evidence=None), r"evidence \(dict\), or has another type"),
        (
            lambda d: d.update(evidence={"budget_pct": True}),
            "evidence.budget_pct must be a positive number.*; got true",
        ),
        (lambda d: d.update(evidence={"budget_pct": math.nan}), "evidence.budget_pct must be .*; got NaN"),
        (lambda d: d.update(evidence={"budget_pct": math.inf}), "evidence.budget_pct must be .*; got Infinity"),
        (lambda d: d.update(evidence={"budget_pct": -1}), "evidence.budget_pct must be .*; got -1"),
        (lambda d: d.update(evidence={"budget_pct": "0.05"}), 'evidence.budget_pct must be .*; got "0.05"'),
        (lambda d: d.update(row_alignmnet=16, x=1), "has no key row_alignmnet, x; known here: schema_version, units, "),
        (lambda d: d.pop("model"), r"misses model \(str\)"),
        (lambda d: d.update(bytes=True), r"bytes \(int\), or has another type"),
        (lambda d: d.update(row_alignment=0), "row_alignment must be positive; got 0"),
    ],
)
def test_a_plan_file_that_does_not_fit_is_refused(plan_path, change, said):
    with pytest.raises(PlanError, match=said) as caught:
        read_plan(rewritten(plan_path, change), units=UNITS, checkpoint_sha256="ab" * 32)
    assert str(plan_path) in str(caught.value)


def test_a_plan_for_another_snapshot_is_accepted_when_asked(plan_path):
    assert read_plan(plan_path, units=UNITS, checkpoint_sha256=None).plan == PLAN


def test_unreadable_plan_files(tmp_path):
    with pytest.raises(PlanError, match="cannot be read"):
        read_plan(tmp_path / "none.json", units=UNITS, checkpoint_sha256=None)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(PlanError, match="is not JSON"):
        read_plan(tmp_path / "bad.json", units=UNITS, checkpoint_sha256=None)


@pytest.mark.parametrize("name", ["a", "row:a", "table:"])
def test_units_are_named_by_kind(name):
    with pytest.raises(PlanError, match="table:NAME"):
        Unit(name, 1, 1)


def test_plans_that_count_alike_name_the_units_in_which_they_differ():
    first = {"table:a": "int4", "table:b": "int2", "table:c": "int2"}
    second = {"table:a": "int2", "table:b": "int4", "table:c": "int2"}
    other = {"table:a": "int4", "table:b": "int4", "table:c": "int2"}
    assert precision_texts([first, other, second]) == [
        "int2:2 int4:1",
        "int4:2 int2:1",
        "int2:2 int4:1 (table:a int2, table:b int4)",
    ]
    many = [dict.fromkeys(map(str, range(10)), p) for p in ("int4", "int2")]
    turned = {**many[0], **{str(k): "int2" for k in range(5)}}
    assert precision_texts([turned, {k: "int2" if v == "int4" else "int4" for k, v in turned.items()}])[1].endswith(
        "2 int4 and 7 more)"
    )
