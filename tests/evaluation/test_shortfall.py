"""What an inconclusive verdict lacks, against simulation."""

import math
from dataclasses import replace

import numpy as np
import pytest

from lowprec.evaluation.metrics import sums_of_batch
from lowprec.evaluation.shortfall import MAX_FACTOR, shortfall
from lowprec.evaluation.stats.bounds import MIN_EFFECTIVE_UNITS, normal_quantile, spread
from lowprec.evaluation.stats.confidence import RatioMoments


def evaluated(rng, n, *, groups=None, changed=1.0):
    """Metrics of one plan on n examples, of which a share is changed; its gap is about zero."""
    z = rng.normal(size=n)
    y = (rng.random(n) < 1 / (1 + np.exp(-z))).astype(float)
    moved = np.where(rng.random(n) < changed, 0.02 * rng.normal(size=n), 0.0)
    return sums_of_batch(z, (z + moved)[None], y, None, groups).metrics(0, confidence=0.95)


def test_only_inconclusive_verdicts_lack_evidence():
    found = evaluated(np.random.default_rng(0), 2000)
    assert shortfall(found, 0.05, "certified") is None and shortfall(found, 0.05, "rejected") is None


@pytest.mark.parametrize("seed", range(5))
def test_so_many_more_examples_decide(seed):
    """With the same gap and spread on so much traffic, the interval ends at the budget."""
    rng = np.random.default_rng(seed)
    small = evaluated(rng, 1000)
    budget = small.gap_pct + 0.3 * (small.gap_interval_pct.upper - small.gap_pct)
    assert small.verdict(budget) == "inconclusive"
    lacks = shortfall(small, budget, "inconclusive", days=2.0)
    assert lacks.units_needed == pytest.approx(1000 / 0.3**2, rel=0.02)
    assert lacks.examples_needed == pytest.approx(lacks.units_needed - 1000, abs=1)
    assert lacks.days_needed == pytest.approx(2 * lacks.examples_needed / 1000, rel=0.01)
    assert f"{lacks.examples_needed:,} more examples" in lacks.sentence() and "more days" in lacks.sentence()
    error = small.standard_error_pct * math.sqrt(small.num_units / lacks.units_needed)
    assert small.gap_pct + normal_quantile(0.95) * error == pytest.approx(budget, rel=0.05)


def test_few_groups_that_carry_the_change_are_named():
    """One heavy user among 200: the groups count like a few."""
    rng = np.random.default_rng(1)
    groups = np.where(rng.random(20_000) < 0.7, 0, rng.integers(1, 200, 20_000))
    found = evaluated(rng, 20_000, groups=groups)
    assert found.num_units <= 200 and found.effective_units < MIN_EFFECTIVE_UNITS
    assert found.verdict(0.05) == "inconclusive"
    lacks = shortfall(found, 0.05, "inconclusive", by_group=True)
    assert lacks.unit == "groups" and lacks.effective_needed == MIN_EFFECTIVE_UNITS
    assert lacks.units_needed >= found.num_units * MIN_EFFECTIVE_UNITS / found.effective_units
    assert "more groups" in lacks.sentence() and f"{found.effective_units:,.0f} effective groups" in lacks.sentence()


def test_without_a_change_or_at_the_budget_no_number_is_made_up():
    rng = np.random.default_rng(2)
    nothing = shortfall(evaluated(rng, 1000, changed=0.0), 0.05, "inconclusive")
    assert nothing.units_needed is None and "no logit changed" in nothing.sentence()
    found = evaluated(rng, 1000)
    at = shortfall(found, found.gap_pct, "inconclusive")
    assert at.examples_needed is None and f"{MAX_FACTOR:,.0f} times" in at.sentence()


def test_the_standard_error_is_that_of_simulation():
    rng, n = np.random.default_rng(3), 400
    ratios, errors = [], []
    for _ in range(2000):
        y = rng.exponential(1.0, n)
        x = 0.1 * y + 0.05 * rng.normal(size=n) * y
        m = RatioMoments.of(x, y)
        ratios.append(m.ratio)
        errors.append(spread(m).standard_error)
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.05)
    assert math.isnan(spread(replace(m, y=0.0)).standard_error)
