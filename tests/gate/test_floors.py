"""The floors of the launch gate: a ruined model is rejected, however well its plan follows it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from plans import write_mixed_plan
from safetensors.numpy import load_file, save_file

import lowprec
from lowprec.cli.main import main
from lowprec.config import GateConfig
from lowprec.core.errors import ConfigError, PlanError
from lowprec.evaluation.metrics import PlanMetrics
from lowprec.evaluation.stats.confidence import Interval
from lowprec.gate import verify_plan
from lowprec.gate.floors import floors_of, gated

METRICS = PlanMetrics(
    num_examples=1000,
    num_exact=1000,
    num_units=1000,
    gap_pct=0.01,
    gap_interval_pct=Interval(0.0, 0.02),
    kl_pct=0.01,
    kl_interval_pct=Interval(0.0, 0.02),
    ne_ref=0.9,
    ne_plan=0.91,
    auc_ref=0.7,
    auc_plan=0.7,
    auc_error=0.0,
    calibration_ref=1.0,
    calibration_plan=1.05,
    confidence=0.95,
)


@pytest.fixture
def ruined(small_folder, tmp_path):
    """A checkpoint whose logits are off by so much: NE far above 1, with the tables as they were."""
    weights = load_file(small_folder / "model.safetensors")
    last = max(name for name in weights if name.startswith("top.") and name.endswith(".bias"))
    path = tmp_path / "ruined.safetensors"
    save_file(weights | {last: np.float32(weights[last] + 3)}, path)
    return str(path)


def kept(gate, metrics=METRICS, deployed=None):
    return {floor.name: floor.is_kept for floor in floors_of(metrics, gate, deployed)}


def test_each_floor_is_judged_by_the_plan():
    assert kept(GateConfig()) == {"max_ne": True}
    assert kept(GateConfig(max_ne=0.91)) == {"max_ne": False}  # must be below
    assert kept(GateConfig(max_ne=None)) == {}
    assert kept(GateConfig(calibration=(0.9, 1.05)))["calibration"] is True
    assert kept(GateConfig(calibration=(0.9, 1.04)))["calibration"] is False
    assert kept(GateConfig(calibration=(1.06, 1.1)))["calibration"] is False
    before = replace(METRICS, ne_plan=0.9)
    assert kept(GateConfig(max_ne_change_pct=1.2), deployed=before)["max_ne_change_pct"] is True
    assert kept(GateConfig(max_ne_change_pct=1.1), deployed=before)["max_ne_change_pct"] is False
    assert "max_ne_change_pct" not in kept(GateConfig(max_ne_change_pct=1.1))


def test_a_broken_floor_rejects_and_an_unknown_one_certifies_nothing():
    broken = floors_of(replace(METRICS, ne_plan=1.2, ne_ref=1.19), GateConfig())
    assert [gated(v, broken) for v in ("certified", "inconclusive", "rejected")] == ["rejected"] * 3
    assert broken[0].message.startswith("gate.max_ne: NE is 1.2000 (fp32: 1.1900), and the floor is below 1: ")
    assert broken[0].is_kept_by_fp32 is False
    unknown = floors_of(replace(METRICS, ne_plan=float("nan"), ne_ref=float("nan")), GateConfig())
    assert [gated(v, unknown) for v in ("certified", "inconclusive", "rejected")] == [
        "inconclusive",
        "inconclusive",
        "rejected",
    ]
    assert json.loads(json.dumps(unknown[0].to_dict()))["figure"] is None
    assert gated("certified", floors_of(METRICS, GateConfig())) == "certified"


def test_a_ruined_snapshot_is_rejected_though_its_gap_is_within_budget(small_config, ruined, tmp_path):
    config = small_config("search.budget=1000", "gate.max_ne=1.3")
    write_mixed_plan(config, tmp_path / "plan.json")
    found = verify_plan(config, tmp_path / "plan.json", snapshot=ruined)
    assert found.budget_verdict == "certified" and found.verdict == found.final_verdict == "rejected"
    assert found.metrics.ne_plan > 1.3 and found.snapshot.plan_path is None
    document = json.loads(json.dumps(found.to_dict()))
    (floor,) = document["floors"]
    assert (floor["name"], floor["figure"], floor["is_kept"]) == ("max_ne", found.metrics.ne_plan, False)
    assert document["budget_verdict"] == "certified" and document["verdict"] == "rejected"
    (row,) = lowprec.query("SELECT * FROM trials WHERE evaluation = 'verify'", config.results.root).to_dict("records")
    assert row["verdict"] == "rejected" and json.loads(row["floors_json"]) == document["floors"]
    (run,) = lowprec.query("SELECT verdict, message FROM runs", config.results.root).to_dict("records")
    assert run["verdict"] == "rejected" and floor["message"] in run["message"]
    # What a search cannot mend it does not try to.
    again = verify_plan(config, tmp_path / "plan.json", snapshot=ruined, repair=True)
    assert again.repair is None and again.final_verdict == "rejected"
    # The default floor holds without --snapshot too.
    itself = small_config("search.budget=1000", "gate.max_ne=1", f"model.checkpoint={ruined}")
    write_mixed_plan(itself, tmp_path / "itself.json")
    assert verify_plan(itself, tmp_path / "itself.json").verdict == "rejected"


def test_the_deployed_checkpoint_is_evaluated_on_the_same_window_where_it_is_asked_for(
    small_config, ruined, tmp_path, monkeypatch
):
    plan = tmp_path / "plan.json"
    config = small_config("search.budget=1000", "gate.max_ne_change_pct=1")
    write_mixed_plan(config, plan)
    deployed = verify_plan(config, plan)
    assert deployed.floors == ()  # the deployed checkpoint itself: nothing to compare
    found = verify_plan(config, plan, snapshot=ruined)
    (floor,) = found.floors
    expected = 100 * (found.metrics.ne_plan / deployed.metrics.ne_plan - 1)
    assert floor.figure == pytest.approx(expected) and floor.figure > 1 and found.verdict == "rejected"
    assert f"NE {deployed.metrics.ne_plan:.4f}" in floor.message
    wide = small_config("search.budget=1000", "gate.max_ne_change_pct=1000")
    assert verify_plan(wide, plan, snapshot=ruined).verdict == "certified"
    # A plan of another checkpoint than the config's does not say what is deployed.
    other = small_config("search.budget=1000", "gate.max_ne_change_pct=1", f"model.checkpoint={ruined}")
    with pytest.raises(PlanError, match="so it is not the deployed one; point model.checkpoint at"):
        verify_plan(other, plan, snapshot=config.model.checkpoint)
    without = small_config("search.budget=1000", "gate.calibration=[0.001, 1000]")
    monkeypatch.setattr("lowprec.gate.floors._deployed_metrics", None)
    assert [floor.name for floor in verify_plan(without, plan, snapshot=ruined).floors] == ["calibration"]


def test_what_a_repair_finds_is_held_to_the_floors(small_config, tmp_path):
    """The plan alone breaks the floor: fp32 keeps it, so a search is worth it."""
    write_mixed_plan(small_config(), tmp_path / "plan.json")
    loose = verify_plan(small_config(), tmp_path / "plan.json").metrics
    middle = (loose.calibration_ref + loose.calibration_plan) / 2
    ends = sorted((middle, 2 * loose.calibration_ref - middle))
    tight = small_config("search.budget=0.5", "search.max_trials=6", f"gate.calibration={ends}")
    found = verify_plan(tight, tmp_path / "plan.json", repair=True)
    assert found.verdict == "rejected" and found.repair is not None and len(found.repair_floors) == 1
    assert found.final_verdict == gated(found.repair.verdict, found.repair_floors)


@pytest.fixture
def run(tmp_path, capfd):
    """`lowprec verify`: its exit code, and what it printed, in one line."""

    def verify(config, *arguments):
        path = tmp_path / "config.json"
        path.write_text(config.to_json())
        with pytest.raises(SystemExit) as ended:
            main(["verify", str(path), "--plan", str(tmp_path / "plan.json"), *arguments])
        return ended.value.code, " ".join("".join(capfd.readouterr()).split())

    return verify


def test_the_command_takes_floors_and_ends_with_2(small_config, ruined, run, tmp_path):
    config = small_config("search.budget=1000")
    write_mixed_plan(config, tmp_path / "plan.json")
    assert run(config, "--snapshot", ruined)[0] == 0
    for floor in (("--max-ne", "1.3"), ("--calibration", "0.9,1.1"), ("--max-ne-change", "2")):
        code, shown = run(config, "--snapshot", ruined, *floor)
        assert code == 2
        assert "floor broken: gate." in shown and "the gap alone is certified against a budget" in shown
    for wrong in (("--calibration", "1.1,0.9"), ("--calibration", "1"), ("--max-ne-change", "2")):
        code, shown = run(config, *wrong)
        assert code == 64 and wrong[0] in shown


@pytest.mark.parametrize("wrong", ["[1.1, 0.9]", "[-1, 2]", "[1]", "0.9"])
def test_a_range_of_calibration_rises(small_config, wrong):
    with pytest.raises(ConfigError, match=r"gate\.calibration"):
        small_config(f"gate.calibration={wrong}")
