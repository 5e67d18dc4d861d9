"""Bounds of one look: against scipy, and against simulation of plans right at the budget."""

import math

import numpy as np
import pytest
from at_the_budget import SCENARIOS, false_rate
from scipy import stats

from lowprec.evaluation.stats.bounds import MIN_EFFECTIVE_UNITS, _deviations, normal_quantile, one_sided_bounds, spread
from lowprec.evaluation.stats.confidence import Interval, RatioMoments

RUNS = 2000
ALPHA = 0.05
LIMIT = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / RUNS)


def test_quantiles_are_those_of_scipy():
    assert normal_quantile(0.95) == pytest.approx(stats.norm.ppf(0.95))
    assert normal_quantile(0.955) == pytest.approx(1.6954, abs=1e-4)


def test_bounds_of_symmetric_units_are_those_of_a_t_test():
    """Units of +-1: as many degrees of freedom as there are units, less one, and no skewness."""
    n = 400
    x = np.where(np.arange(n) % 2 == 0, 1.0, -1.0)
    found = one_sided_bounds(RatioMoments.of(x, np.ones(n)), 0.95)
    error = x.std() / math.sqrt(n)
    assert found.upper == pytest.approx(stats.t.ppf(0.95, n - 1) * error, rel=1e-6)
    assert found.lower == pytest.approx(-found.upper, rel=1e-9)
    test = stats.ttest_1samp(x - found.upper, 0.0, alternative="less")
    assert test.pvalue == pytest.approx(0.05, abs=1e-3)


def test_degrees_of_freedom_follow_from_the_kurtosis():
    """Of the variance of n units with kurtosis k: 2 n / (k - 1), by simulation of the variance itself."""
    rng, n = np.random.default_rng(0), 500
    x = np.where(rng.random((20_000, n)) < 0.2, rng.normal(size=(20_000, n)), 0.0)
    variances = x.var(axis=1)
    wanted = 2 * variances.mean() ** 2 / variances.var()
    found = [spread(RatioMoments.of(row, np.ones(n))).degrees for row in x[:200]]
    assert np.mean(found) == pytest.approx(wanted, rel=0.1)


def test_the_skewness_correction_inverts_the_transformation_of_hall():
    """At the bound, T + g T^2 / 3 + g^2 T^3 / 27 + g / 6 is the quantile below zero; g is the skewness of the mean."""
    for quantile in (1.645, 2.1):
        for g in (0.01, 0.1, 0.3):
            t = -_deviations(quantile, g)
            assert t + g * t**2 / 3 + g**2 * t**3 / 27 + g / 6 == pytest.approx(-quantile, rel=1e-9)
            assert _deviations(quantile, g) > quantile
    assert _deviations(1.645, 0.0) == 1.645
    # Harmful changes by chance are counts: the bound of 30 of them is close to the exact one of Poisson.
    assert 30 + _deviations(1.645, 1 / math.sqrt(30)) * math.sqrt(30) == pytest.approx(
        stats.chi2.ppf(0.95, 62) / 2, rel=0.01
    )


def test_the_bound_and_the_test_of_the_mean_are_one_statement():
    rng = np.random.default_rng(2)
    y = rng.exponential(1.0, 3000)
    x = 0.001 * y + 0.02 * (rng.exponential(1.0, 3000) - 1)
    moments = RatioMoments.of(x, y)
    upper = one_sided_bounds(moments, 0.95).upper
    d = x - upper * y
    skewness = stats.skew(d) / math.sqrt(len(d))
    quantile = stats.t.ppf(0.95, spread(moments).degrees)
    assert d.mean() / (d.std() / math.sqrt(len(d))) == pytest.approx(-_deviations(quantile, skewness), rel=1e-6)


def test_few_units_that_carry_the_change_give_no_bound():
    y = np.ones(500)
    x = np.zeros(500)
    assert one_sided_bounds(RatioMoments.of(x, y), 0.95) == Interval(-math.inf, math.inf)
    x[: MIN_EFFECTIVE_UNITS - 1] = 1.0
    assert one_sided_bounds(RatioMoments.of(x, y), 0.95) == Interval(-math.inf, math.inf)
    x[:MIN_EFFECTIVE_UNITS] = 1.0
    assert math.isfinite(one_sided_bounds(RatioMoments.of(x, y), 0.95).upper)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_plan_at_its_budget_is_certified_no_more_often_than_promised(scenario):
    """And on independent examples not much less often: the bounds are sharp, not only safe."""
    rate = false_rate(SCENARIOS[scenario], RUNS, seed=1)
    assert rate <= LIMIT
    if scenario in ("independent", "time_blocks_1.0"):
        assert rate >= 0.025


def test_a_rule_without_these_corrections_fails_the_same_simulation():
    """1.645 standard errors, whatever the window: with few harmful changes far more than 5 percent are certified."""
    rng, n, wrong = np.random.default_rng(5), 2000, 0
    for _ in range(RUNS):
        x = np.where(rng.random(n) < 20 / n, rng.exponential(1.0, n), 0.0)
        d = x - 20 / n
        wrong += d.mean() < -1.645 * d.std() / math.sqrt(n)
    assert wrong / RUNS > 1.3 * LIMIT
