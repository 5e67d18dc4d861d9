"""Plans by hand: what patterns make of a model's units, and plan files that say what they are."""

import json
import re

import pytest
from plans import LAYERS

import lowprec
from lowprec.cli.main import main
from lowprec.core.errors import ConfigError, PlanError
from lowprec.export import export_plan
from lowprec.gate import verify_plan
from lowprec.plan import Precision, Unit, read_plan
from lowprec.plan.layer_form import Arithmetic, LayerForm
from lowprec.search import open_job
from lowprec.search.space.hand_plan import HandPlan, make_plan, write_hand_plan
from lowprec.storage import Location

UNITS = (Unit("table:a", 10, 4), Unit("table:ab", 10, 4), Unit("layer:top.0", 4, 4))


def plan_of(uniform, *units):
    return {name: str(p) for name, p in HandPlan.parse(uniform, units).plan(UNITS).items()}


def test_later_patterns_win_and_what_cannot_have_a_precision_stays_fp32():
    assert plan_of(None) == {"table:a": "fp32", "table:ab": "fp32", "layer:top.0": "fp32"}
    assert plan_of("int4") == {"table:a": "int4", "table:ab": "int4", "layer:top.0": "fp32"}
    assert plan_of("fp16") == {"table:a": "fp16", "table:ab": "fp16", "layer:top.0": "fp16"}
    assert plan_of("int8_dynamic") == {"table:a": "fp32", "table:ab": "fp32", "layer:top.0": "int8_dynamic"}
    assert plan_of(None, "table:a=int2") == {"table:a": "int2", "table:ab": "fp32", "layer:top.0": "fp32"}
    found = plan_of("int8", "table:a*=int4", "table:ab=int2", "layer:*=bf16")
    assert found == {"table:a": "int4", "table:ab": "int2", "layer:top.0": "bf16"}
    assert plan_of(None, "table:ab=int2", "table:*=int4")["table:ab"] == "int4"


@pytest.mark.parametrize(
    ("uniform", "units", "said"),
    [
        ("int5", (), "--uniform: precision must be one of fp32"),
        (None, ("table:a",), "expected PATTERN=PRECISION"),
        (None, ("=int4",), "expected PATTERN=PRECISION"),
        (None, ("table:a=int5",), 'got "int5"'),
        (
            None,
            ("table:z=int4",),
            "--unit table:z=int4: matches no unit; .*The units are table:a, table:ab, layer:top.0",
        ),
        (None, ("*=int4",), r"layer:top.0 cannot be int4; a table can be .*; a layer can be fp32, fp16, bf16"),
        (None, ("table:a=bf16",), "table:a cannot be bf16"),
    ],
)
def test_what_fits_no_unit_is_an_error_with_what_there_is(uniform, units, said):
    with pytest.raises(PlanError, match=said):
        HandPlan.parse(uniform, units).plan(UNITS)


def test_layers_that_are_no_units_are_explained():
    with pytest.raises(PlanError, match=r"layers are units only where the config has space\.layers"):
        HandPlan.parse(None, ("layer:*=bf16",)).plan(UNITS[:2])
    with pytest.raises(PlanError, match=r"--uniform bf16: no unit can have it; .*layers are units only where"):
        HandPlan.parse("bf16", ()).plan(UNITS[:2])


@pytest.fixture
def command(tmp_path, capfd):
    """A command on a config: its exit code, and what it printed on both streams."""

    def run(config, name, *arguments):
        path = tmp_path / "config.json"
        path.write_text(config.to_json())
        with pytest.raises(SystemExit) as ended:
            main(
                [name, *arguments[:1], str(path), *arguments[1:]] if name == "submit" else [name, str(path), *arguments]
            )
        return ended.value.code, "".join(capfd.readouterr())

    return run


def test_a_plan_is_judged_without_a_file_as_with_one(small_config, tmp_path):
    config = small_config("search.budget=1000")
    hand = HandPlan.parse("int4", ("table:c1=int2",))
    found = verify_plan(config, hand)
    assert {u for u, p in found.plan.items() if p is Precision.INT2} == {"table:c1"}
    out = tmp_path / "plan.json"
    document = write_hand_plan(config, hand, Location.of(out))
    assert verify_plan(config, out).metrics == found.metrics
    file = read_plan(out, units=open_job(config).units, checkpoint_sha256=None)
    assert (file.plan, file.size_bytes) == (found.plan, document["bytes"])
    assert file.evidence == {"kind": "hand", "made_with": "--uniform int4 --unit table:c1=int2"}
    with pytest.raises(PlanError, match="is there already"):
        write_hand_plan(config, hand, Location.of(out))


def test_the_commands(small_config, command, tmp_path):
    config = small_config("search.budget=1000")
    out = tmp_path / "plan.json"
    code, said = command(config, "plan", "--unit", "table:c*=int8", "--unit", "table:c1=int2", "--out", str(out))
    assert code == 0 and "int8:5 int2:1" in said
    code, by_file = command(config, "verify", "--plan", str(out), "--json")
    code, by_hand = command(config, "verify", "--unit", "table:c*=int8", "--unit", "table:c1=int2", "--json")
    by_file, by_hand = (json.loads(text[text.index("{\n") : text.rindex("\n}") + 2]) for text in (by_file, by_hand))
    assert code == 0 and by_hand["gap_pct"] == by_file["gap_pct"] and by_hand["plan"] == by_file["plan"]
    for wrong in ((), ("--plan", str(out), "--uniform", "int4")):
        code, said = command(config, "verify", *wrong)
        assert code == 64 and "give either --plan PLAN or a plan by hand" in said
    code, said = command(config, "submit", "verify", "--address", "http://127.0.0.1:1")
    assert code == 64 and "give either --plan PLAN" in said  # before anything is sent
    code, said = command(config, "plan", "--unit", "tabel:c1=int2", "--out", str(tmp_path / "other.json"))
    assert code == 64 and "did you mean table:c1" in said and not (tmp_path / "other.json").exists()
    code, said = command(config, "plan", "--out", str(tmp_path / "fp32.json"))
    assert code == 0 and "fp32:6" in said


def test_int8_layers_get_their_forms_as_in_a_search(small_config, tmp_path):
    config = small_config(LAYERS, "search.budget=1000")
    hand = HandPlan.parse("int8", ("layer:top.0=int8_static", "layer:top.2=int8_dynamic", "layer:bottom.*=bf16"))
    out = tmp_path / "plan.json"
    write_hand_plan(config, hand, Location.of(out))
    file = read_plan(out, units=open_job(config).units, checkpoint_sha256=None)
    static, dynamic = (file.layer_forms[unit] for unit in ("layer:top.0", "layer:top.2"))
    assert isinstance(static, LayerForm) and static.is_static and not dynamic.is_static
    assert set(file.layer_forms) == {"layer:top.0", "layer:top.2"}
    assert verify_plan(config, out).verdict == "certified"
    assert export_plan(config, out, tmp_path / "served").to_dict()["num_low_layers"] == 4
    lowprec.load(tmp_path / "served")


def test_emulated_layers_need_their_arithmetic(small_config):
    hand = HandPlan.parse(None, ("layer:top.0=emulated",))
    with pytest.raises(ConfigError, match="the config describes no arithmetic"):
        make_plan(small_config(LAYERS), hand)
    described = small_config("space.layers={precisions: [fp32, emulated], arithmetic: {block: 8}}")
    assert make_plan(described, hand).layer_forms == {"layer:top.0": Arithmetic(block=8)}


def changed(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(bytes=d["bytes"] - 1), r"says .* bytes, and its units take .* at row alignment 1"),
        (lambda d: d["units"].update({"table:c1": {"precision": "fp16"}}), "its units or .bytes. were changed by hand"),
        (lambda d: d.update(row_alignment=16), 'at 1: "row_alignment" was changed by hand; set it to 1, or write'),
        (
            lambda d: d.update(model="other.models:build"),
            'was made for model "other.models:build", and model.factory is',
        ),
    ],
)
def test_a_plan_file_that_says_something_else_than_its_units_is_refused(small_config, tmp_path, change, said):
    config, out = small_config("search.budget=1000"), tmp_path / "plan.json"
    write_hand_plan(config, HandPlan.parse("int8", ()), Location.of(out))
    changed(out, change)
    for use in (lambda: verify_plan(config, out), lambda: export_plan(config, out, tmp_path / "served")):
        with pytest.raises(PlanError, match=said):
            use()
    # A plan of another checkpoint is judged on a new snapshot all the same: that may have more rows.
    changed(out, lambda d: d.update(checkpoint_sha256="ab" * 32))
    assert verify_plan(config, out, snapshot=config.model.checkpoint).verdict == "certified"


def test_bytes_are_those_of_the_plans_own_alignment(small_config, tmp_path):
    out = tmp_path / "plan.json"
    write_hand_plan(small_config("space.row_alignment=16"), HandPlan.parse("int2", ()), Location.of(out))
    found = verify_plan(small_config(), out)
    assert any("row alignment 16" in warning for warning in found.to_dict()["warnings"])


@pytest.mark.parametrize(
    ("unit", "allowed"),
    [
        ("table:item=int3", "fp32, fp16, int8, int4, int2"),
        ("layer:*=int3", "fp32, fp16, bf16, int8_dynamic, int8_static, emulated"),
        ("*=int3", ", ".join(Precision)),
    ],
)
def test_an_unknown_precision_is_compared_with_those_of_the_kind_of_unit(unit, allowed):
    with pytest.raises(PlanError, match=re.escape(f'precision must be one of {allowed}; got "int3"')):
        HandPlan.parse(None, (unit,))
