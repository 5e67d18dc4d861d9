"""The intervals hold what they promise, however often one looks."""

import math

import numpy as np
import pytest

from lowprec.evaluation.stats.confidence import (
    MIN_BLOCKS,
    MIN_UNITS,
    Blocks,
    Interval,
    RatioMoments,
    design_effect,
    radius,
    ratio_interval,
    verdict,
)


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


def blocks_of(x, y, num_blocks):
    parts = [np.array_split(v, num_blocks) for v in (x, y)]
    return Blocks(*(np.array([part.sum() for part in v]) for v in parts))


def in_blocks(rng, n, num_blocks, offset):
    """Loss changes at a ratio of 0.001 with an offset that the examples of a block share, in deviations of one."""
    x, y = draw(rng, n, 0.001)
    spread = float((x - 0.001 * y).std())
    shared = offset * spread * rng.normal(size=num_blocks)
    return x + np.repeat(shared, -(-n // num_blocks))[:n], y


def test_independent_units_have_no_design_effect():
    """In 19 of 20 windows it is 1, and where it is not it is small."""
    rng, runs = np.random.default_rng(6), 2000
    effects = []
    for _ in range(runs):
        x, y = in_blocks(rng, 2000, 20, 0.0)
        effects.append(design_effect(moments(x, y, 2000), blocks_of(x, y, 20)))
    above = np.mean(np.array(effects) > 1)
    assert above == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / runs))
    assert min(effects) == 1.0 and max(effects) < 4


@pytest.mark.parametrize("effect", [3.0, 10.0])
def test_the_design_effect_is_about_right_where_blocks_share_an_offset(effect):
    rng, runs, n = np.random.default_rng(7), 400, 2000
    offset = math.sqrt((effect - 1) / (n / 20))
    found = []
    for _ in range(runs):
        x, y = in_blocks(rng, n, 20, offset)
        found.append(design_effect(moments(x, y, n), blocks_of(x, y, 20)))
    # Units themselves vary by 1 + offset^2; of 20 blocks the factor is known to within sqrt(2 / 19) of it.
    assert np.mean(found) == pytest.approx(effect, rel=0.1)
    assert np.std(found) == pytest.approx(effect * math.sqrt(2 / 19), rel=0.3)


@pytest.mark.parametrize("num_seen", [20, 4])
def test_blocks_without_examples_are_no_blocks(num_seen):
    """A window of few batches leaves blocks empty; few blocks say too little, whatever their number on paper."""
    rng, runs, n = np.random.default_rng(8), 1000, 100 * num_seen
    above = 0
    for _ in range(runs):
        x, y = in_blocks(rng, n, num_seen, 0.0)
        seen = blocks_of(x, y, num_seen)
        padded = Blocks(*(np.concatenate([v, np.zeros(20 - num_seen)]) for v in (seen.x, seen.y)))
        above += design_effect(moments(x, y, n), padded) > 1
        assert num_seen >= MIN_BLOCKS or design_effect(moments(x, y, n), seen) == 1.0
    assert above / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


@pytest.mark.parametrize("offset", [0.05, 0.1, 0.2, 0.6])
def test_with_blocks_a_plan_right_at_the_budget_is_rarely_certified(offset):
    """Changes that share an offset in every time block: without blocks they would be certified too often."""
    rng, runs, alpha, n = np.random.default_rng(9), 800, 0.05, 2000
    certified = naive = 0
    for _ in range(runs):
        x, y = in_blocks(rng, n, 20, offset)
        found = moments(x, y, n)
        certified += ratio_interval(found, alpha, blocks=blocks_of(x, y, 20)).upper < 0.001
        naive += ratio_interval(found, alpha).upper < 0.001
    assert certified / runs <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)
    if offset >= 0.2:
        assert naive / runs > alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)


def test_blocks_only_widen():
    rng = np.random.default_rng(10)
    for offset in (0.0, 0.3):
        x, y = in_blocks(rng, 2000, 20, offset)
        found, over_time = moments(x, y, 2000), blocks_of(x, y, 20)
        wide, narrow = ratio_interval(found, 0.05, blocks=over_time), ratio_interval(found, 0.05)
        assert wide.lower <= narrow.lower and wide.upper >= narrow.upper
        assert (wide != narrow) == (design_effect(found, over_time) > 1)
