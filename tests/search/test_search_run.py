"""Whole searches in this process, on the small model: the ordinary one and the odd ones."""

import json
import shutil

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

import lowprec
from lowprec.core.errors import ConfigError, ResultsError, TrafficError, WorkerError
from lowprec.evaluation.evaluate import evaluate_plans
from lowprec.evaluation.workers.worker import LocalWorkers
from lowprec.latency.calibration import Calibration, LatencyPoint
from lowprec.latency.calibration_file import write_calibration
from lowprec.plan import TABLE_PRECISIONS, Plan, Precision, read_plan
from lowprec.search import open_job, run_search
from lowprec.search.confirm.alpha_spending import confidence_of_attempt
from lowprec.search.record.record import RunRecord
from lowprec.search.record.trial import Trial
from lowprec.search.rule import Forecast


class Listener:
    """Stages and notes that a search told of."""

    def __init__(self):
        """Nothing was heard yet."""
        self.stages, self.notes = [], []

    def stage(self, name, total):
        """Remember a stage."""
        self.stages.append(name)

    def advance(self, steps=1):
        """Ignored."""

    def note(self, text):
        """Remember a note."""
        self.notes.append(text)

    def run(self, search, config):
        """Itself, after a search was heard."""
        search(config, progress=self)
        return self


def trials_of(config, outcome, evaluation="exact"):
    sql = f"SELECT * FROM trials WHERE run_id = '{outcome.run_id}' AND evaluation = '{evaluation}' ORDER BY number"
    return lowprec.query(sql, config.results.root)


def test_a_search_leaves_a_profile_sensitivities_trials_and_a_plan(small_config):
    config = small_config()
    outcome = run_search(config)
    (recommendation,) = outcome.recommendations
    assert outcome.profile_path.kind() == outcome.plan_paths[0].kind() == "file"
    found = lowprec.query("SELECT * FROM sensitivities", config.results.root)
    assert len(found) == 6 * 4 and (found["gap_lower_pct"] <= found["gap_upper_pct"]).all()
    assert (found["linearization_error"].abs() < 0.5).all()
    small = found[found["precision"] == "int8"]
    assert (small["linearization_error"].abs() < 0.02).all()  # where changes are small the prediction is exact
    trials = trials_of(config, outcome)
    kinds = list(trials["kind"].unique())
    assert kinds[:2] == ["uniform", "front"] and {*kinds[2:]} <= {"descent", "optuna"}
    document = json.loads(json.dumps(outcome.to_dict()))
    assert document["promised_pct"] == recommendation.best.choice.trial.promised_pct
    assert document["recommendations"][0]["plan"] == document["plan"]


def test_the_estimates_of_a_race_hold_on_the_whole_window(small_config):
    """Every trial's bounds of the risk on this window hold the risk by evaluating all of it."""
    config = small_config("traffic.batch_size=128")  # many slices, so that races do not see them all
    job = open_job(config)
    outcome = run_search(config)
    trials = trials_of(config, outcome)
    assert (trials["num_exact"] < trials["num_examples"]).sum() >= 5
    plans = [Plan({n: Precision(p) for n, p in json.loads(text).items()}) for text in trials["plan_json"]]
    workers = LocalWorkers(job.spec, job.adapter)
    exact = evaluate_plans(workers, job.window("search"), plans, confidence=0.95, batches_per_task=1).metrics
    forecast = Forecast.of(
        confidence=confidence_of_attempt(config.search.confidence, 0),
        num_search=job.window("search").num_rows,
        num_confirm=job.window("confirm").num_rows,
    )
    for text, metrics, plan in zip(trials["metrics_json"], exact, plans, strict=True):
        known = json.loads(text)
        lower, upper = known["risk_on_window_pct"]
        expected = metrics.gap_pct + known["expected_pct"] - known["gap_pct"]
        risk = forecast.risk_pct(Trial("", 0, 0, "", plan, 0, None, 0.0, None, metrics, None, None, expected))
        slack = 1e-6 + 0.1 * forecast.margin_pct(metrics)  # the half width itself is an estimate
        assert lower is None or lower - slack <= risk <= upper + slack


@pytest.mark.parametrize("where", ["add_sensitivities", "add_trials"])
@pytest.mark.parametrize("error", [ResultsError("full"), TrafficError("gone"), OSError(28, "No space left on device")])
def test_a_search_that_fails_from_outside_says_how_to_go_on(small_config, monkeypatch, where, error):
    """As by a store that is gone, or a disk that is full, after the profile was kept."""

    def fails(*_args, **_kwargs):
        raise error

    listener, config = Listener(), small_config()
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(RunRecord, where, fails)
        run_search(config, progress=listener)
    (note,) = (note for note in listener.notes if "--resume" in note)
    assert note.startswith("what is committed is kept; go on with the options that it had and --resume ")
    assert run_search(config, resume=note.split()[-1]).verdict


def test_a_search_that_never_began_is_not_to_be_resumed(small_config):
    listener = Listener()
    with pytest.raises(WorkerError, match="cannot be reached"):
        run_search(small_config("evaluation.num_workers=1", "evaluation.address=127.0.0.1:9"), progress=listener)
    assert listener.notes and not any("--resume" in note for note in listener.notes)


def test_several_budgets_get_a_plan_each_from_one_search(small_config):
    config = small_config("search.budget=null", "search.budgets=[2.0, 0.1, 0.5]")
    outcome = run_search(config)
    assert [r.budget_pct for r in outcome.recommendations] == [0.1, 0.5, 2.0]
    sizes = [r.best.choice.trial.size_bytes for r in outcome.recommendations]
    assert sizes[0] >= sizes[1] >= sizes[2]
    assert [p.name for p in outcome.plan_paths] == ["plan-0.1.json", "plan-0.5.json", "plan-2.json"]
    for recommendation, path in zip(outcome.recommendations, outcome.plan_paths, strict=True):
        assert json.loads(path.read_bytes())["evidence"]["budget_pct"] == recommendation.budget_pct
    confirmed = trials_of(config, outcome, "confirm")
    assert confirmed["plan_json"].is_unique  # plans of several budgets are confirmed once


def test_a_budget_that_nobody_can_meet_gets_the_most_accurate_plan_and_no_certificate(small_config):
    listener = Listener()
    config = small_config("space.precisions=[int2]", "search.budget=0.0001")
    outcome = run_search(config, progress=listener)
    assert outcome.verdict != "certified"
    assert any("no plan meets the budget of 0.0001" in note for note in listener.notes)
    assert set(outcome.recommendations[0].best.choice.trial.plan.values()) == {Precision.INT2}


def test_one_free_table(small_config):
    rules = "[{match: 'table:*', fixed: int8}, {match: 'table:c5', precisions: [fp32, fp16, int8, int4]}]"
    outcome = run_search(small_config(f"space.units={rules}"))
    assert outcome.num_trials == 4  # every plan that there is
    assert outcome.to_dict()["profile"]["front_is_exact"]


@pytest.mark.parametrize("precision", ["int4", "fp32"])
def test_all_units_fixed(small_config, precision):
    outcome = run_search(small_config(f"space.precisions=[{precision}]"))
    assert outcome.num_trials == 1
    assert set(outcome.recommendations[0].best.choice.trial.plan.values()) == {Precision(precision)}
    if precision == "fp32":
        assert outcome.recommendations[0].best.verdict == "certified" and outcome.verdict == "inconclusive"


def test_precisions_that_give_the_same_bits(small_folder, small_config, tmp_path):
    """Rows of zeros: every precision is exact, every plan has a gap of 0, and the cheapest is chosen by bytes alone.

    Nothing changes, so nothing is evidence: inconclusive, not perfect.
    """
    from safetensors.torch import load_file, save_file

    state = {
        name: tensor * 0 if name.startswith("tables.") else tensor
        for name, tensor in load_file(small_folder / "model.safetensors").items()
    }
    save_file(state, tmp_path / "zeros.safetensors")
    config = small_config(f"model.checkpoint={tmp_path / 'zeros.safetensors'}")
    outcome = run_search(config)
    gaps = trials_of(config, outcome)["gap_pct"]
    assert (gaps.abs() < 1e-9).all()
    assert outcome.verdict == "inconclusive"


def rewritten(small_folder, tmp_path, change):
    """The small traffic with some columns changed by `change(frame)`."""
    frame = ds.dataset(small_folder / "traffic").to_table().to_pandas()
    change(frame)
    (tmp_path / "traffic").mkdir()
    import pyarrow as pa

    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), tmp_path / "traffic" / "part.parquet")
    return f"traffic.path={tmp_path / 'traffic'}"


def test_a_window_with_one_class_only(small_folder, small_config, tmp_path):
    def no_clicks(frame):
        frame["label"] = np.int8(0)

    outcome = run_search(small_config(rewritten(small_folder, tmp_path, no_clicks)))
    document = outcome.to_dict()
    assert document["confirm"]["ne_ref"] is None and document["confirm"]["gap_pct"] is not None
    assert any("same label" in warning for warning in document["warnings"])


def test_a_badly_calibrated_reference_is_noticed(small_folder, small_config, tmp_path):
    """Labels at twice the rate that the reference believes in: its logits must move up by about ln 2 or more."""
    rng = np.random.default_rng(0)

    def more_clicks(frame):
        frame["label"] = (rng.random(len(frame)) < 0.7).astype(np.int8)

    config = small_config(rewritten(small_folder, tmp_path, more_clicks))
    profile = run_search(config).to_dict()["profile"]
    assert profile["first_order_kept"]["shift"] > 0.9
    assert profile["logit_shift"] < -0.3  # the derivative of the loss: below zero where logits are too low


def test_a_group_key_with_very_unequal_groups_is_less_evidence(small_folder, small_config, tmp_path):
    rng = np.random.default_rng(0)

    def few_users(frame):
        frame["user"] = rng.zipf(1.5, len(frame)).clip(1, 2000)

    path = rewritten(small_folder, tmp_path, few_users)
    by_row, by_user = (small_config(path, *group) for group in ((), ("traffic.group=user",)))
    outcomes = [run_search(config) for config in (by_user, by_row)]
    # Half of all rows are of one user: fewer than 30 users carry any change, so nothing but fp32 itself is certain.
    for config, outcome, is_known in zip((by_user, by_row), outcomes, (False, True), strict=True):
        trials = trials_of(config, outcome)
        assert trials["gap_upper_pct"].iloc[1:].notna().any() == is_known
    assert set(outcomes[0].recommendations[0].best.choice.trial.plan.values()) == {Precision.FP32}


def test_a_profile_is_used_again_and_refused_for_anything_else(small_config, small_folder, tmp_path):
    config = small_config()
    first = run_search(config)
    listener = Listener()
    again = run_search(config, profile=first.profile_path, progress=listener)
    assert "profile" not in listener.stages and "profile" in Listener().run(run_search, config).stages
    columns = ["plan_json", "gap_pct", "promised_pct"]
    assert trials_of(config, first)[columns].equals(trials_of(config, again)[columns])
    shutil.copy(small_folder / "model.safetensors", tmp_path / "other.safetensors")
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "other.safetensors")
    save_file({k: v * 1.5 for k, v in state.items()}, tmp_path / "other.safetensors")
    for override, said in (
        (f"model.checkpoint={tmp_path / 'other.safetensors'}", "the checkpoint"),
        ("windows.search.end=2026-01-07", "the window"),
        ("space.precisions=[fp16, int8]", "the space"),
        ("traffic.batch_size=512", "the traffic"),
    ):
        with pytest.raises(ConfigError, match=said):
            run_search(small_config(override), profile=first.profile_path)


def calibrated(tmp_path, ns):
    points = tuple(
        LatencyPoint(p, dim, rows, pooling, ns[p] * pooling, 0.1)
        for p in TABLE_PRECISIONS
        for dim in (8, 16)
        for rows in (10, 10_000)
        for pooling in (1, 4)
    )
    path = tmp_path / "calibration.json"
    write_calibration(Calibration(points, {}), path)
    return f"cost.calibration={path}"


def test_latency_is_minimised_and_limited(small_config, tmp_path):
    """A machine on which int8 is fastest and int2 slowest: by latency int2 is never worth its gap."""
    ns = dict(zip(TABLE_PRECISIONS, (100.0, 80.0, 40.0, 60.0, 120.0), strict=True))
    calibration = calibrated(tmp_path, ns)
    config = small_config(calibration, "cost.minimize=latency", "search.budget=5")
    plan = run_search(config).recommendations[0].best.choice.trial
    assert set(plan.plan.values()) == {Precision.INT8} and plan.cost == plan.latency_ns
    everything_int8 = plan.latency_ns
    limit = small_config(calibration, f"cost.max_latency_ns={everything_int8 * 1.2}", "search.budget=5")
    outcome = run_search(limit)
    trials = trials_of(limit, outcome)
    assert (trials["latency_ns"] <= everything_int8 * 1.2 + 1e-6).all() and (
        trials["cost"] == trials["size_bytes"]
    ).all()
    cheapest = outcome.recommendations[0].best.choice.trial
    assert cheapest.size_bytes < plan.size_bytes  # some tables in int4, as many as the limit allows
    with pytest.raises(ConfigError, match=r"cost\.max_latency_ns"):
        run_search(small_config(calibration, "cost.max_latency_ns=1"))


def test_latency_without_calibration_is_a_config_error(small_config):
    with pytest.raises(ConfigError, match="lowprec calibrate"):
        small_config("cost.minimize=latency")


def test_a_calibration_that_is_not_there_costs_no_pass(small_config, tmp_path):
    listener = Listener()
    config = small_config("cost.minimize=latency", f"cost.calibration={tmp_path / 'none.json'}")
    with pytest.raises(ConfigError, match=r"none\.json.*lowprec calibrate"):
        run_search(config, progress=listener)
    assert listener.stages == [] and not (tmp_path / "runs" / "runs").exists()


def test_a_confirm_window_is_spent_by_every_run_of_its_checkpoint(small_config):
    """The second run on an overlapping window is held to a stricter confidence, that on a later one is not."""
    first = run_search(small_config())
    assert first.num_spent == 0
    again = run_search(small_config("search.seed=1"))
    attempts = max(c.attempt for r in first.recommendations for c in r.tried) + 1
    assert again.num_spent == attempts and again.to_dict()["confirm_window_uses"] == attempts
    assert again.recommendations[0].tried[0].attempt == attempts
    before, after = (r.recommendations[0].tried[0].metrics.confidence for r in (first, again))
    assert after > before > 0.95
    earlier = "windows.confirm={start: 2026-01-08, end: 2026-01-09}"
    assert run_search(small_config(earlier)).num_spent > attempts
    earlier_search = "windows.search={start: 2026-01-05, end: 2026-01-07}"
    later = earlier_search, "windows.confirm={start: 2026-01-07, end: 2026-01-08}"
    assert run_search(small_config(*later)).num_spent == 0  # a window of its own


def test_a_resumed_run_does_not_count_itself(small_config):
    config = small_config()
    outcome = run_search(config)
    assert run_search(config, resume=outcome.run_id).num_spent == 0


def test_a_search_that_finds_nothing_cheaper_is_inconclusive(small_config):
    listener = Listener()
    outcome = run_search(small_config("space.precisions=[fp32, int2]", "search.budget=1e-7"), progress=listener)
    (recommendation,) = outcome.recommendations
    assert set(recommendation.best.choice.trial.plan.values()) == {Precision.FP32}
    assert recommendation.best.verdict == "certified" and recommendation.verdict == "inconclusive"
    document = outcome.to_dict()
    assert document["verdict"] == document["recommendations"][0]["verdict"] == "inconclusive"
    assert not document["saves"] and any("saves nothing" in note for note in listener.notes)
    assert read_plan(outcome.plan_paths[0], units=None, checkpoint_sha256=None).evidence["verdict"] == "inconclusive"


def test_an_inconclusive_search_says_how_much_evidence_is_missing(small_config):
    """Groups of users of which few carry the change."""
    outcome = run_search(small_config("traffic.group=user", "space.precisions=[int4, int2]", "search.budget=1e-4"))
    document = outcome.to_dict()
    assert document["verdict"] == "inconclusive" and document["saves"]
    missing = document["missing_evidence"]
    assert missing["unit"] == "groups" and "effective groups found" in missing["text"]
    assert 0 < missing["num_units"] <= 300 and missing["effective_needed"] > 0
