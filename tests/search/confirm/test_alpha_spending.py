"""Repeated evaluations of a plan share one error rate, and the output reports it."""

import math
from dataclasses import replace

import numpy as np
import pytest

from lowprec.evaluation.stats.bounds import one_sided_bounds
from lowprec.evaluation.stats.confidence import RatioMoments, ratio_interval
from lowprec.gate import verify_plan
from lowprec.plan import Precision, write_plan
from lowprec.search import open_job
from lowprec.search.confirm.alpha_spending import Look, confidence_of_attempt, spending
from lowprec.search.space.hand_plan import HandPlan, make_plan

INT8 = HandPlan(uniform=Precision.INT8)


def look(key, looks="once", confidence=0.955, num_units=100):
    return Look(key, looks, confidence, num_units)


def test_the_first_evaluation_leaves_error_rate_for_later_ones():
    found = spending([], "a", confidence=0.95, sequential=False)
    assert (found.looks, found.num_earlier, found.note) == ("once", 0, "")
    assert found.confidence == confidence_of_attempt(0.95, 0)


def test_each_further_evaluation_needs_a_stricter_confidence():
    earlier, error = [], 0.0
    for k in range(5):
        found = spending(earlier, f"window {k}", confidence=0.95, sequential=False)
        assert found.confidence == confidence_of_attempt(0.95, k) and found.num_earlier == k
        assert ("was evaluated" in found.note) == (k > 0)
        error += 1 - found.confidence
        earlier.append(look(f"window {k}", confidence=found.confidence))
    assert error < 0.05
    assert "evaluated 4 times before" in found.note and "95 %" in found.note


def test_identical_examples_spend_nothing():
    earlier = [look("a", confidence=0.955), look("b", confidence=0.9955), look("b", confidence=0.9955)]
    for key, confidence in (("a", 0.955), ("b", 0.9955)):
        found = spending(earlier, key, confidence=0.95, sequential=False)
        assert found.confidence == confidence and "identical examples" in found.note
    assert spending(earlier, "c", confidence=0.95, sequential=False).confidence == confidence_of_attempt(0.95, 2)


def test_a_sequence_allows_repeated_evaluations():
    first = spending([], "a", confidence=0.95, sequential=True)
    assert (first.looks, first.confidence, first.tuned_for, first.note) == ("repeated", 0.95, None, "")
    again = spending([look("a", "repeated", num_units=100)] * 3, "b", confidence=0.95, sequential=True)
    # Where a sequence is tightest must not depend on when one looks.
    assert (again.confidence, again.tuned_for) == (0.95, 100)
    # Looks that were not sequential have spent their part.
    late = spending([look("a")], "b", confidence=0.95, sequential=True)
    assert late.confidence == confidence_of_attempt(0.95, 1) and "evaluated once" in late.note
    after = spending([look("a", "repeated")] * 2, "b", confidence=0.95, sequential=False)
    assert after.confidence == confidence_of_attempt(0.95, 1)


def test_a_growing_window_keeps_the_error_rate_by_spending_or_by_a_sequence():
    """A plan at its budget, verified after every 300 rows: by spending, by a sequence, and by neither."""
    rng, runs, alpha = np.random.default_rng(0), 1000, 0.2
    wrong = np.zeros(3)
    for _ in range(runs):
        x, y = 1.0 + rng.normal(size=3000), np.ones(3000)
        earlier, hit = [], np.zeros(3, dtype=bool)
        for n in range(300, 3001, 300):
            m = RatioMoments.of(x[:n], y[:n])
            terms = spending(earlier, str(n), confidence=1 - alpha, sequential=False)
            earlier.append(look(str(n), confidence=terms.confidence))
            hit |= [
                one_sided_bounds(m, terms.confidence).upper <= 1.0,
                ratio_interval(m, alpha, tuned_for=300).upper <= 1.0,
                one_sided_bounds(m, 1 - alpha).upper <= 1.0,
            ]
        wrong += hit
    limit = alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)
    assert wrong[0] / runs <= limit and wrong[1] / runs <= limit
    assert wrong[2] / runs > limit


def test_verify_reports_earlier_evaluations(small_config):
    config = small_config("search.budget=5.0")
    first = verify_plan(config, INT8)
    assert first.spending.num_earlier == 0 and first.metrics.looks == "once"
    assert first.metrics.confidence == confidence_of_attempt(config.search.confidence, 0)
    same = verify_plan(config, INT8)
    assert same.metrics == first.metrics and same.verdict == first.verdict
    assert any("identical examples" in note for note in same.notes)
    # Another window that overlaps with it.
    window = open_job(config).window("confirm")
    overlapping = small_config("search.budget=5.0", f"windows.confirm={{start: {_start(config)}, end: null}}")
    assert open_job(overlapping).window("confirm").num_rows < window.num_rows
    second = verify_plan(overlapping, INT8)
    assert second.spending.num_earlier == 1 and second.to_dict()["earlier_looks"] == 1
    assert second.metrics.confidence == confidence_of_attempt(config.search.confidence, 1)
    assert any("evaluated once before" in note for note in second.to_dict()["warnings"])
    # Another plan is another question.
    assert verify_plan(config, HandPlan(uniform=Precision.INT4)).spending.num_earlier == 0


def test_a_sequential_verify_gives_a_sequence(small_config, tmp_path):
    config = small_config("search.budget=5.0")
    found = verify_plan(config, INT8, sequential=True)
    assert (found.metrics.looks, found.metrics.confidence) == ("repeated", config.search.confidence)
    once = verify_plan(small_config("search.budget=5.0", f"results.root={tmp_path}/elsewhere"), INT8)
    width, narrower = (m.gap_interval_pct.upper - m.gap_interval_pct.lower for m in (found.metrics, once.metrics))
    assert width > 1.5 * narrower


def _start(config):
    """A time in the middle of the confirm window."""
    batch = open_job(config).window("confirm").batch(0)
    return int(np.median(batch.times))


@pytest.mark.parametrize("given", [None, 0.5])
def test_the_budget_is_that_of_the_plan_where_the_config_says_none(small_config, tmp_path, given):
    config = small_config()
    search = type(config.search).model_validate({k: v for k, v in {"budget": given}.items() if v})
    config = config.model_copy(update={"search": search})
    file = make_plan(config, INT8)
    write_plan(replace(file, evidence={"budget_pct": 3.0}), tmp_path / "plan.json")
    assert verify_plan(config, tmp_path / "plan.json").budget_pct == (given or 3.0)
    assert verify_plan(config, tmp_path / "plan.json", budget_pct=4.0).budget_pct == 4.0
