"""The intervals hold what they promise, however often one looks."""

import math

import numpy as np
import pytest

from lowprec.evaluation.confidence import MIN_UNITS, Interval, RatioMoments, radius, ratio_interval, verdict


def moments(x, y, n):
    return RatioMoments(
        n, x[:n].sum(), y[:n].sum(), (x[:n] ** 2).sum(), (x[:n] * y[:n]).sum(), (y[:n] ** 2).sum(), (x[:n] ** 4).sum()
    )


def draw(rng, n, ratio):
    """Reference losses and loss changes like those of a low-precision plan: heavy tails, scale rising with the loss."""
    y = rng.exponential(0.4, n)
    return ratio * y + 0.01 * rng.standard_t(5, n) * np.sqrt(y), y


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_time_uniform_coverage(alpha):
    """Miss rate over 100 looks at each of 600 streams; one-shot normal intervals would miss far more often."""
    rng, streams, length = np.random.default_rng(1), 600, 10_000
    missed = naive = 0
    for _ in range(streams):
        x, y = draw(rng, length, 0.0005)
        sums = [np.cumsum(v) for v in (x, y, x * x, x * y, y * y, x**4)]
        bad = bad_naive = False
        for n in range(100, length + 1, 100):
            sx, sy, sxx, sxy, syy, sx4 = (float(s[n - 1]) for s in sums)
            interval = ratio_interval(RatioMoments(n, sx, sy, sxx, sxy, syy, sx4), alpha, tuned_for=length)
            bad |= not interval.lower <= 0.0005 <= interval.upper
            d = sx / n - 0.0005 * sy / n
            sd = math.sqrt((sxx - 2 * 0.0005 * sxy + 0.0005**2 * syy) / n - d * d)
            bad_naive |= abs(d) > 1.96 * sd / math.sqrt(n)
        missed += bad
        naive += bad_naive
    standard_error = math.sqrt(alpha * (1 - alpha) / streams)
    assert missed / streams <= alpha + 3 * standard_error
    assert naive / streams > 0.2  # the simulation can tell a valid interval from an invalid one


def test_the_sequence_is_near_its_tightest_where_it_is_tuned():
    n = 10_000
    tuned = radius(n, 0.05, tuned_for=n)
    assert tuned <= min(radius(n, 0.05, tuned_for=m) for m in (n // 8, n // 2, 2 * n, 8 * n))
    assert 1.96 < tuned * math.sqrt(n) < 3.2  # wider than a one-shot interval, by a bounded factor


def test_the_interval_of_the_ratio_and_the_sign_of_the_mean_are_one_statement():
    rng = np.random.default_rng(2)
    x, y = draw(rng, 5000, 0.001)
    interval = ratio_interval(moments(x, y, 5000), 0.05)
    for b in (interval.lower, interval.upper):
        d = x - b * y
        assert abs(d.mean()) == pytest.approx(radius(5000, 0.05, tuned_for=5000) * d.std(), rel=1e-6)


@pytest.mark.parametrize("num_units", [200, 5000])
@pytest.mark.parametrize("num_changed", [1, 5, 30, 100])
def test_changes_that_touch_few_examples_are_not_certified_by_their_absence(num_units, num_changed):
    """The true ratio is right at the budget, where certifying is wrong; alpha / 2 of it is allowed on this side."""
    rng, runs, alpha = np.random.default_rng(0), 500, 0.05
    share = num_changed / num_units
    certified = naive = 0
    for _ in range(runs):
        x = np.where(rng.random(num_units) < share, rng.exponential(1.0, num_units), 0.0)
        y = rng.exponential(1.0, num_units)
        found = moments(x, y, num_units)
        certified += ratio_interval(found, alpha).upper < share
        d = x - share * y
        naive += d.mean() + radius(num_units, alpha, tuned_for=num_units) * d.std() < 0
    assert certified / runs <= alpha / 2 + 3 * math.sqrt(alpha / 2 / runs)
    if num_changed == 1:
        assert naive / runs > 0.3


def test_nothing_changed_is_no_evidence_of_nothing():
    y = np.random.default_rng(3).exponential(1, 500)
    assert ratio_interval(moments(np.zeros(500), y, 500), 0.05) == Interval(-math.inf, math.inf)


def test_too_little_evidence_says_nothing():
    x, y = draw(np.random.default_rng(4), 1000, 0.0)
    assert ratio_interval(moments(x, y, MIN_UNITS - 1), 0.05) == Interval(-math.inf, math.inf)
    assert math.isfinite(ratio_interval(moments(x, y, 10 * MIN_UNITS), 0.05).upper)


def test_a_denominator_that_may_be_zero_says_nothing():
    rng = np.random.default_rng(5)
    assert ratio_interval(moments(rng.normal(size=200), rng.normal(size=200), 200), 0.05).upper == math.inf


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (Interval(-1, 0.4), "certified"),
        (Interval(0.6, 1), "rejected"),
        (Interval(0.4, 0.6), "inconclusive"),
        (Interval(-math.inf, math.inf), "inconclusive"),
        (Interval(math.nan, math.nan), "inconclusive"),
    ],
)
def test_verdicts(interval, expected):
    assert verdict(interval, 0.5) == expected
