"""The rule of a search: what it asks, what the profile predicts of it, and that a search finds the cheapest plan."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lowprec.evaluation.evaluate import evaluate_plans
from lowprec.evaluation.metrics import PlanMetrics
from lowprec.evaluation.race.estimate import PlanEstimate
from lowprec.evaluation.stats.bounds import MIN_EFFECTIVE_UNITS
from lowprec.evaluation.stats.confidence import Interval
from lowprec.evaluation.workers.worker import LocalWorkers
from lowprec.plan import Plan
from lowprec.search import open_job, run_search
from lowprec.search.confirm.alpha_spending import confidence_of_attempt
from lowprec.search.confirm.choice import finalists
from lowprec.search.proposals.descent import descent
from lowprec.search.record.record import RunRecord
from lowprec.search.record.trial import Trial
from lowprec.search.rule import Forecast
from lowprec.search.surrogate import front_solver as sweep_module
from lowprec.search.surrogate import rule_front as rule_front_module
from lowprec.search.surrogate import surrogate as surrogate_module
from lowprec.search.surrogate.surrogate import build_surrogate

BUDGET = 0.02


# Windows of one size, and bounds two standard errors away.
FORECAST = Forecast(2.0, 1.0)


def metrics(gap, error, kl):
    return PlanMetrics(
        1000, 1000, 1000, gap, Interval(gap, gap), kl, Interval(kl, kl),
        0.8, 0.8, 0.7, 0.7, 0.0, 1.0, 1.0, 0.95, 1000.0, error,
    )  # fmt: skip


def trial_with(gap, error, kl, expected=None):
    return Trial("k", 0, 0, "t", Plan({}), 1, None, 1.0, None, metrics(gap, error, kl), None, None, expected)


def test_the_risk_is_that_of_the_worse_of_both_gaps():
    assert FORECAST.risk_pct(trial_with(0.03, 0.005, 0.02)) == pytest.approx(0.04)
    assert FORECAST.risk_pct(trial_with(-0.5, 0.005, 0.02)) == pytest.approx(0.03)  # no excuse for a KL gap
    assert FORECAST.risk_pct(trial_with(-0.5, 0.005, 0.02, expected=0.025)) == pytest.approx(0.035)
    assert FORECAST.risk_pct(trial_with(0.0, math.inf, 0.0)) == math.inf
    assert math.isnan(FORECAST.risk_pct(trial_with(math.nan, 0.01, 0.02)))


def test_more_examples_to_confirm_on_leave_less_to_chance():
    large = Forecast.of(confidence=0.95, num_search=1000, num_confirm=4000)
    assert large.quantile == pytest.approx(stats.norm.ppf(0.95)) and large.scale == 0.5
    assert large.margin_pct(metrics(0.0, 0.1, 0.0)) == pytest.approx(0.5 * 0.1 * stats.norm.ppf(0.95))
    few = replace(metrics(0.0, 0.1, 0.0), effective_units=MIN_EFFECTIVE_UNITS / 3)
    assert math.isfinite(large.margin_pct(few)) and FORECAST.margin_pct(few) == math.inf


def test_the_probability_is_how_often_a_plan_is_certified_in_simulation():
    """The true gap is about the estimate, and the confirm window has its own error."""
    rng, runs = np.random.default_rng(0), 200_000
    forecast = Forecast.of(confidence=0.95, num_search=1000, num_confirm=2000)
    trial = trial_with(0.02, 0.01, 0.015)
    truth = trial.metrics.gap_pct + 0.01 * rng.normal(size=runs)
    there = truth + 0.01 * math.sqrt(0.5) * rng.normal(size=runs)
    for budget in (0.03, 0.04, 0.06):
        certified = (there + stats.norm.ppf(0.95) * 0.01 * math.sqrt(0.5) <= budget).mean()
        assert forecast.probability(trial, budget) == pytest.approx(certified, abs=0.005)
    assert forecast.probability(trial_with(0.0, 0.0, 0.0), 0.01) == 1.0  # the reference itself


def test_bounds_of_the_risk_on_a_window_follow_from_those_of_both_gaps():
    estimate = PlanEstimate(metrics(0.0, 0.005, 0.0), Interval(-0.3, -0.1), Interval(0.02, 0.06))
    assert FORECAST.risk_on_window(estimate, 0.0) == Interval(pytest.approx(0.03), pytest.approx(0.07))
    assert FORECAST.risk_on_window(estimate, 0.35) == Interval(pytest.approx(0.06), pytest.approx(0.26))
    unknown = PlanEstimate(metrics(0.0, math.inf, 0.0), Interval(-0.3, -0.1), Interval(0.02, 0.06))
    assert FORECAST.risk_on_window(unknown, 0.0) == Interval(-math.inf, math.inf)


@pytest.fixture
def surrogate(small_config):
    """A function that solves the small model; its reference's logits were shifted, so that gaps may be negative."""
    job = open_job(small_config("space.precisions=[int8, int4, int2]"))
    workers = LocalWorkers(job.spec, job.adapter)

    def solve():
        measured = job.measure_profile(workers, "search", job.window("search"), quarantine=None)
        return job, build_surrogate(
            measured, job.space, job.search_costs(measured.use), budgets=[BUDGET], forecast=FORECAST
        )

    return solve


def test_predicted_risks_are_those_of_evaluating_the_whole_window(surrogate):
    job, found = surrogate()
    plans = [plan for k, plan in enumerate(job.space.every_plan()) if k % 20 == 0]
    workers = LocalWorkers(job.spec, job.adapter)
    exact = evaluate_plans(workers, job.window("search"), plans, confidence=0.95, batches_per_task=1).metrics
    expected = [m.gap_pct + c for m, c in zip(exact, found.corrections_pct(plans), strict=True)]
    trials = [
        replace(trial_with(0.0, 0.0, 0.0), metrics=m, expected_pct=e) for m, e in zip(exact, expected, strict=True)
    ]
    risks, predicted = np.array([FORECAST.risk_pct(t) for t in trials]), found.risk.risks(plans)
    known = np.isfinite(risks)
    assert known.mean() > 0.9
    assert np.corrcoef(np.log(risks[known]), np.log(predicted[known]))[0, 1] > 0.99
    assert np.median(risks[known] / predicted[known]) == pytest.approx(1, abs=0.05)


def test_the_front_of_a_small_space_is_that_of_scoring_every_plan(surrogate):
    job, found = surrogate()
    plans = list(job.space.every_plan())
    costs, risks = np.array([found.costs.cost(p) for p in plans]), found.risk.risks(plans)
    assert found.rule_front.is_exact
    for point in found.rule_front.points:
        assert point.gap_pct == pytest.approx(risks[costs <= point.cost].min(), rel=1e-9)
    cost, risk, plan_of = found.alternatives(None)
    for k in (0, 5, len(plans) - 1):
        assert cost[k] == found.costs.cost(plan_of(k)) and risk[k] == pytest.approx(found.risk.risks([plan_of(k)])[0])


def test_the_front_of_a_large_space_comes_close(surrogate, monkeypatch):
    _, exact = surrogate()
    monkeypatch.setattr(sweep_module, "MAX_EXHAUSTIVE", 0)
    monkeypatch.setattr(rule_front_module, "MAX_EXHAUSTIVE", 0)
    _, pooled = surrogate()
    assert exact.rule_front.is_exact and not pooled.rule_front.is_exact
    costs, risks = (np.array([getattr(p, name) for p in exact.rule_front.points]) for name in ("cost", "gap_pct"))
    for point in pooled.rule_front.points:
        best = costs[risks <= point.gap_pct * (1 + 1e-9)].min()
        # The quadratic forms are those of the budget; risks far from it are only near their best.
        near = BUDGET / 2 <= point.gap_pct <= 2 * BUDGET
        assert best <= point.cost <= (1.1 if near else 1.2) * best
        assert point.cost_bound <= point.cost


def trial_of(number, plan, cost, risk):
    m = metrics(risk / 2, risk / 4, 0.0)
    return Trial(f"k{number}", number, 0, "t", plan, int(cost), None, cost, None, m, None, None)


def test_a_descent_tries_what_is_cheaper_and_may_meet_the_rule_and_then_ends(surrogate):
    """Measured risks are predicted ones times 1.3: that is learnt from the trials, and nothing is missed."""
    job, found = surrogate()
    plans = list(job.space.every_plan())
    risks = 1.3 * found.risk.risks(plans)
    budget = float(np.median(risks))
    found = build_surrogate(found.measured, job.space, found.costs, budgets=[budget], forecast=FORECAST)
    of = dict(zip(plans, risks, strict=True))
    trials = [trial_of(k, p, found.costs.cost(p), of[p]) for k, p in enumerate(job.space.uniform_plans())]
    for _ in range(20):
        proposed = descent(found, trials, 8)
        if not proposed:
            break
        assert len(set(proposed)) == len(proposed) <= 8 and not {t.plan for t in trials} & set(proposed)
        trials += [trial_of(len(trials) + k, p, found.costs.cost(p), of[p]) for k, p in enumerate(proposed)]
    else:
        raise AssertionError("the descent does not end")
    cheapest = min(found.costs.cost(p) for p in plans if of[p] <= budget)
    assert min(t.cost for t in trials if FORECAST.risk_pct(t) <= budget) <= 1.002 * cheapest
    assert len(trials) < 50


def test_a_space_within_the_limit_on_trials_is_evaluated_whole(small_config):
    units = "space.units=[{match: 'table:c[0-2]', fixed: int8}]"
    options = "space.precisions=[int8, int4, int2]", units
    config = small_config(*options, "search.max_trials=30")
    outcome = run_search(config)
    trials = RunRecord(open_job(config), outcome.run_id).trials("exact")
    assert len(trials) == len({t.plan for t in trials}) == open_job(config).space.num_plans == 27


def test_all_plans_that_keep_the_limits_are_evaluated(small_config):
    """The last ones are found one by one, among many that do not keep them."""
    units = "space.units=[{match: 'table:c[0-2]', fixed: int8}]"
    job = open_job(small_config("space.precisions=[int8, int4, int2]", units))
    limit = sorted(job.space.size_bytes(plan) for plan in job.space.every_plan())[9]
    options = "space.precisions=[int8, int4, int2]", units, f"cost.max_bytes={limit}"
    config = small_config(*options, "search.max_trials=30", "search.wave_size=4")
    outcome = run_search(config)
    assert outcome.num_trials == sum(job.space.size_bytes(plan) <= limit for plan in job.space.every_plan())


@pytest.mark.parametrize("shift", [0.0, -2.0])
def test_the_boldest_finalist_is_the_cheapest_plan_that_the_rule_allows(small_config, shift, tmp_path):
    """Also where the reference is badly calibrated, so that low precision has gaps below zero."""
    import torch
    from safetensors.torch import load_file

    config = small_config()
    weights = load_file(config.model.checkpoint) if config.model.checkpoint.endswith("safetensors") else None
    weights = weights or torch.load(config.model.checkpoint)
    last = max(name for name in weights if name.endswith(".bias") and weights[name].numel() == 1)
    weights[last] = weights[last] + shift
    torch.save(weights, tmp_path / "shifted.pt")
    options = "space.precisions=[int8, int4, int2]", f"model.checkpoint={tmp_path}/shifted.pt", "search.max_trials=48"
    job = open_job(small_config(*options))
    plans = list(job.space.every_plan())
    workers = LocalWorkers(job.spec, job.adapter)
    measured = job.measure_profile(workers, "search", job.window("search"), quarantine=None)
    forecast = Forecast.of(
        confidence=confidence_of_attempt(0.95, 0),
        num_search=job.window("search").num_rows,
        num_confirm=job.window("confirm").num_rows,
    )
    surrogate = build_surrogate(
        measured, job.space, job.search_costs(measured.use), budgets=[BUDGET], forecast=forecast
    )
    exact = evaluate_plans(workers, job.window("search"), plans, confidence=0.95, batches_per_task=1).metrics
    expected = [m.gap_pct + c for m, c in zip(exact, surrogate.corrections_pct(plans), strict=True)]
    found = [
        replace(trial_with(0.0, 0.0, 0.0), metrics=m, expected_pct=e) for m, e in zip(exact, expected, strict=True)
    ]
    risks = np.array([forecast.risk_pct(t) for t in found])
    budget = float(np.quantile(risks, 0.4))
    config = small_config(*options, f"search.budget={budget}")
    outcome = run_search(config)
    trials = RunRecord(open_job(config), outcome.run_id).trials("exact")
    boldest = min((c.trial for c in finalists(trials, budget, forecast)), key=lambda t: t.cost)
    sizes = np.array([job.space.size_bytes(plan) for plan in plans])
    assert risks[plans.index(boldest.plan)] <= budget * (1 + 1e-6)
    assert boldest.size_bytes <= 1.01 * sizes[risks <= budget].min()
    assert len(trials) <= 48


def test_plans_beside_the_budget_are_those_that_add_most_to_the_front(surrogate):
    """Each is the point of the front with the largest gain of hypervolume, by trying every point."""
    _, found = surrogate()
    points = found.front.points
    taken = [(points[3].cost, points[3].gap_pct)]
    corner = points[-1].cost, points[0].gap_pct

    def area(plans):
        total, best = 0.0, corner[1]
        for cost, gap in sorted(plans):
            total += max(best - gap, 0.0) * max(corner[0] - cost, 0.0)
            best = min(best, gap)
        return total

    chosen = surrogate_module._most_hypervolume(points, taken, 8)
    assert chosen[:2] == [points[0], points[-1]] and len(chosen) == 8
    known = [*taken, *((p.cost, p.gap_pct) for p in chosen[:2])]
    for point in chosen[2:]:
        gains = [area([*known, (p.cost, p.gap_pct)]) for p in points]
        assert area([*known, (point.cost, point.gap_pct)]) == pytest.approx(max(gains), rel=1e-12)
        known.append((point.cost, point.gap_pct))
    assert surrogate_module._most_hypervolume(points, taken, len(points) + 5) == list(points)
