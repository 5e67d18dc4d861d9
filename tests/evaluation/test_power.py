"""What a window can certify, before and after a plan was judged on it."""

import math

import numpy as np
import pytest

from lowprec.evaluation.metrics import sums_of_batch
from lowprec.evaluation.power import certifiable_kl_pct, certifiable_pct
from lowprec.evaluation.stats.bounds import one_sided_bounds
from lowprec.evaluation.stats.confidence import RatioMoments


def drawn(rng, n, moved):
    """Labels drawn from the reference, and logits moved at random."""
    z = rng.normal(-1.0, 1.0, n)
    y = (rng.random(n) < 1 / (1 + np.exp(-z))).astype(float)
    return sums_of_batch(z, (z + moved * rng.normal(size=n))[None], y, None, None)


def test_a_plan_at_the_largest_kl_gap_is_certified_in_half_of_the_windows():
    rng, n, budget = np.random.default_rng(0), 20_000, 0.1
    one = drawn(rng, 400_000, 0.02)
    loss = float(one.loss[0]) / one.num_rows
    kl = certifiable_kl_pct(budget, num_examples=n, loss=loss, confidence=0.95)
    moved = 0.02 * math.sqrt(kl / one.metrics(0, confidence=0.95).kl_pct)  # a KL gap goes with the square
    found = [drawn(rng, n, moved).metrics(0, confidence=0.95) for _ in range(300)]
    assert np.mean([m.kl_pct for m in found]) == pytest.approx(kl, rel=0.05)
    assert np.mean([m.verdict(budget) == "certified" for m in found]) == pytest.approx(0.5, abs=0.1)


def test_more_examples_certify_more_and_none_certify_nothing():
    found = [certifiable_kl_pct(0.02, num_examples=n, loss=0.45, confidence=0.95) for n in (0, 10_000, 120_000, 10**9)]
    assert found[0] == 0.0 and found == sorted(found) and found[-1] == pytest.approx(0.02, rel=0.02)
    assert found[2] == pytest.approx(0.01, rel=0.05)  # of the demo


def test_the_smallest_budget_is_the_upper_bound():
    metrics = drawn(np.random.default_rng(1), 5000, 0.05).metrics(0, confidence=0.95)
    budget = certifiable_pct(metrics)
    assert metrics.verdict(budget) == "certified" != metrics.verdict(budget * 0.999)
    nothing = drawn(np.random.default_rng(1), 5000, 0.0).metrics(0, confidence=0.95)
    assert certifiable_pct(nothing) is None
    x = -1.0 + 0.1 * np.random.default_rng(2).normal(size=500)
    assert one_sided_bounds(RatioMoments.of(x, np.ones(500)), 0.95).upper < 0
