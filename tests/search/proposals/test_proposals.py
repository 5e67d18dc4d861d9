"""Where plans come from: uniform ones, the front, and Optuna around it; and which one is recommended."""

import math
from dataclasses import replace

import numpy as np
import pytest

from lowprec.config import SpaceConfig
from lowprec.evaluation.metrics import PlanMetrics
from lowprec.evaluation.rows import RowAccount
from lowprec.evaluation.stats.confidence import Interval
from lowprec.plan import TABLE_PRECISIONS, Precision, Unit
from lowprec.search.confirm.choice import Choice, Confirmed, finalists, recommended
from lowprec.search.proposals.study import Known, propose
from lowprec.search.record.trial import Trial, pareto_front
from lowprec.search.rule import Forecast
from lowprec.search.space.space import build_space
from lowprec.search.surrogate.sensitivity import single_swaps

UNITS = tuple(Unit(f"table:{k}", 100 * (k + 1), 16) for k in range(6))
SPACE = build_space(UNITS, SpaceConfig())
ERROR = dict(zip(TABLE_PRECISIONS, (0.0, 1e-6, 1e-4, 1e-2, 0.3), strict=True))
FRAGILITY = {u.name: 10.0 ** (k % 3) for k, u in enumerate(UNITS)}


ROWS = RowAccount(1000, 0, 0, {})
FORECAST = Forecast(1.0, 1.0)


def true_gap(plan):
    return sum(ERROR[p] * FRAGILITY[name] for name, p in plan.items())


def metrics(gap, half_width=0.0, kl=None):
    return PlanMetrics(
        1000, 1000, 1000, gap, Interval(gap - half_width, gap + half_width), gap if kl is None else kl,
        Interval(gap, gap), 0.8, 0.8, 0.7, 0.7, 0.0, 1.0, 1.0, 0.95, 1000.0, half_width,
    )  # fmt: skip


def trial_of(number, plan, size_bytes, found, wave=0):
    return Trial(f"k{number}", number, wave, "t", plan, size_bytes, None, size_bytes, 0.01, found, None, ROWS)


def trial(plan, number=0, wave=0, half_width=0.0, space=SPACE):
    return trial_of(number, plan, space.size_bytes(plan), metrics(true_gap(plan), half_width), wave)


def known(plans, space=SPACE):
    return [Known(plan, space.size_bytes(plan), true_gap(plan)) for plan in plans]


def test_uniform_plans_come_first_and_once():
    assert [set(p.values()) for p in SPACE.uniform_plans()] == [{p} for p in TABLE_PRECISIONS]
    fixed = build_space(UNITS, SpaceConfig.model_validate({"precisions": ["int8"]}))
    assert len(fixed.uniform_plans()) == 1


def test_single_swaps_change_one_decision():
    swaps = single_swaps(SPACE)
    assert len(swaps) == 6 * 4
    for swap in swaps:
        assert [n for n, p in swap.plan.items() if p is not Precision.FP32] == [swap.decision]


def seeds(count=20):
    rng = np.random.default_rng(0)
    plans = [
        SPACE.plan({d.name: d.choices[rng.integers(len(d.choices))] for d in SPACE.decisions}) for _ in range(count)
    ]
    return list(dict.fromkeys([*SPACE.uniform_plans(), *plans]))


def test_proposals_are_new_legal_and_a_function_of_what_is_known_and_the_seed():
    found = known(seeds())
    plans = propose(SPACE, found, count=10, budget_pct=0.1, seed=3)
    assert len(set(plans)) == 10 and not set(plans) & {item.plan for item in found}
    assert plans == propose(SPACE, found, count=10, budget_pct=0.1, seed=3)
    assert plans != propose(SPACE, found, count=10, budget_pct=0.1, seed=4)
    assert plans != propose(SPACE, found[:-1], count=10, budget_pct=0.1, seed=3)


def test_enqueued_plans_come_first_and_once():
    first = seeds(40)[-8:]
    plans = propose(SPACE, known(first[:2]), enqueued=[*first, *first], count=12, budget_pct=0.1, seed=0)
    assert plans[:6] == first[2:] and len(set(plans)) == 12
    assert propose(SPACE, [], enqueued=first, count=5, budget_pct=0.1, seed=0) == first[:5]


def test_proposals_lie_around_the_front_that_the_study_begins_with():
    """Children of plans that keep the fragile tables exact keep most of them so; of random plans they do not."""
    good = [
        SPACE.plan({d.name: d.choices[1 if k % 3 == 2 else p] for k, d in enumerate(SPACE.decisions)})
        for p in (2, 3, 4)
    ]
    plans = propose(SPACE, [], front=known(good), count=30, budget_pct=0.1, seed=0)
    fragile = [plan[name] for plan in plans for name, f in FRAGILITY.items() if f == 100]
    assert np.mean([p in (Precision.FP32, Precision.FP16) for p in fragile]) > 0.7


def test_of_the_proposals_those_with_the_least_distance_are_kept():
    found = known(seeds())

    def distance(plans):
        return np.array([true_gap(plan) for plan in plans])

    chosen = propose(SPACE, found, distance_to_front=distance, count=10, budget_pct=0.1, seed=1)
    anyhow = propose(SPACE, found, count=20, budget_pct=0.1, seed=1)
    assert set(chosen) <= set(anyhow)
    assert max(map(true_gap, chosen)) <= min(true_gap(p) for p in set(anyhow) - set(chosen)) + 1e-12


def test_proposals_respect_groups_and_fixed_units():
    space = build_space(
        UNITS,
        SpaceConfig.model_validate(
            {"groups": [["table:0", "table:1"]], "units": [{"match": "table:5", "fixed": "int8"}]}
        ),
    )
    plans = propose(space, known(space.uniform_plans(), space), count=12, budget_pct=0.1, seed=0)
    assert len(plans) == 12 and all(space.holds(p) for p in plans)


def test_a_small_space_is_exhausted_and_then_nothing_is_proposed():
    space = build_space(UNITS[:4], SpaceConfig.model_validate({"precisions": ["fp32", "int8", "int4"]}))
    found = known([space.most_exact], space)
    while plans := propose(space, found, count=16, budget_pct=0.1, seed=len(found)):
        found += known(plans, space)
    assert len({item.plan for item in found}) == len(found) == space.num_plans
    everything_fixed = build_space(UNITS, SpaceConfig.model_validate({"precisions": ["int8"]}))
    assert propose(everything_fixed, [], count=4, budget_pct=0.1, seed=0) == []
    only = everything_fixed.most_exact
    assert propose(everything_fixed, [], enqueued=[only], count=4, budget_pct=0.1, seed=0) == [only]


def test_a_plan_without_a_finite_gap_does_not_disturb_the_study():
    broken = Known(SPACE.cheapest, 1, math.nan)
    assert len(propose(SPACE, [*known(seeds()), broken], count=4, budget_pct=0.1, seed=0)) == 4


def test_pareto_front():
    trials = [trial(plan, n) for n, plan in enumerate(seeds())]
    trials.append(trial_of(99, SPACE.cheapest, 1, metrics(math.nan)))  # cheapest of all, but unknown
    front = pareto_front(trials)
    assert len(front) > 3 and trials.pop() not in front
    front = pareto_front(trials)
    assert [t.size_bytes for t in front] == sorted({t.size_bytes for t in front})
    for t in trials:
        assert any(f.size_bytes <= t.size_bytes and f.metrics.gap_pct <= t.metrics.gap_pct for f in front)
    for f in front:
        assert not any(t.size_bytes <= f.size_bytes and t.metrics.gap_pct < f.metrics.gap_pct for t in trials)


def with_gap(number, size_bytes, gap, half_width=0.0, kl=None):
    return trial_of(number, SPACE.most_exact, size_bytes, metrics(gap, half_width, kl))


def test_finalists_go_from_the_safest_to_the_boldest():
    trials = [with_gap(0, 900, 0.0), with_gap(1, 500, 0.04, 0.01), with_gap(2, 300, 0.065, 0.012)]
    trials += [with_gap(3, 200, 0.09, 0.005)]
    trials += [with_gap(4, 100, 0.2), with_gap(5, 150, 0.02, half_width=0.09), with_gap(6, 120, 0.03, kl=0.15)]
    assert [c.trial.number for c in finalists(trials, 0.1, FORECAST)] == [1, 2, 3]
    assert all(c.meets_budget for c in finalists(trials, 0.1, FORECAST))


def test_one_plan_may_be_safest_and_boldest_at_once():
    assert [c.trial.number for c in finalists([with_gap(0, 900, 0.0), with_gap(1, 1000, 0.0)], 0.1, FORECAST)] == [0]


def test_without_a_sure_plan_the_likely_one_and_without_that_the_best_one_is_tried():
    likely = finalists([with_gap(0, 500, 0.05, 0.2), with_gap(1, 300, 0.3)], 0.1, FORECAST)
    assert [c.trial.number for c in likely] == [0] and likely[0].meets_budget and "estimated" in likely[0].because
    none = finalists([with_gap(0, 500, 0.5), with_gap(1, 300, 0.3)], 0.1, FORECAST)
    assert [c.trial.number for c in none] == [1] and not none[0].meets_budget
    assert "no plan meets the budget" in none[0].because
    assert finalists([], 0.1, FORECAST) == [] == finalists([with_gap(0, 1, math.nan)], 0.1, FORECAST)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["certified", "certified", "certified"], 2),
        (["certified", "inconclusive", "certified"], 0),  # testing stops at the first that is not certified
        (["certified", "certified", "rejected"], 1),
        (["inconclusive", "certified"], 0),
        (["rejected"], 0),
    ],
)
def test_recommended_is_the_last_before_the_first_that_is_not_certified(verdicts, expected):
    choices = [Choice(with_gap(n, 100, 0.0), True, "") for n in range(len(verdicts))]
    confirmed = [Confirmed(c, c.trial.metrics, v, ROWS) for c, v in zip(choices, verdicts, strict=True)]
    assert recommended(confirmed) is confirmed[expected]


def test_confirming_several_finalists_certifies_no_more_falsely_than_confirming_one():
    """All finalists at the budget, where certifying is always wrong, on 4,000 confirm windows."""
    rng, runs, alpha, n = np.random.default_rng(0), 4000, 0.2, 2000
    wrong = bonferroni_free = 0
    for _ in range(runs):
        y = rng.exponential(1.0, n)
        certified = []
        for _ in range(3):
            x = 0.001 * y + 0.01 * rng.normal(size=n)
            # A one-shot interval, the tightest that a valid test may use: the sequences of lowprec are wider.
            d = x - 0.001 * y
            certified.append(d.mean() + 0.8416 * d.std() / np.sqrt(n) < 0)
        choices = [
            Confirmed(Choice(with_gap(k, 1, 0.0), True, ""), metrics(0.0), "certified" if c else "inconclusive", ROWS)
            for k, c in enumerate(certified)
        ]
        wrong += recommended(choices).verdict == "certified"
        bonferroni_free += any(certified)
    standard_error = math.sqrt(alpha * (1 - alpha) / runs)
    assert wrong / runs <= alpha + 3 * standard_error
    assert bonferroni_free / runs > 2 * alpha  # taking any certified plan would not have been safe


def test_trials_survive_a_round_trip_through_their_row():
    for risk in (None, Interval(0.1, math.inf)):
        t = replace(trial(SPACE.cheapest, 3, 2), risk_on_window=risk, expected_pct=0.02)
        assert Trial.from_row(t.to_row()) == t


def test_where_only_the_reference_meets_the_rule_a_plan_that_may_save_is_confirmed_too():
    """The search window has too few units for an interval, the confirm window may have more."""
    sizes = [SPACE.size_bytes(plan) for plan in SPACE.uniform_plans()]
    plans = SPACE.uniform_plans()
    found = [metrics(0.0), metrics(0.0, math.inf), metrics(-0.1, math.inf, kl=0.04), metrics(-0.2, math.inf, kl=0.2)]
    trials = [trial_of(k, plan, sizes[k], m) for k, (plan, m) in enumerate(zip(plans, found, strict=False))]
    assert [c.trial.number for c in finalists(trials, 0.05, FORECAST)] == [0]
    assert [c.trial.number for c in finalists(trials, 0.05, FORECAST, reference_cost=sizes[0])] == [0, 2]
    assert [c.trial.number for c in finalists(trials, 0.05, FORECAST, reference_cost=sizes[0] + 1)] == [0]
