"""The statistics of one pass predict the exact gap of any plan, and add up over any split of traffic."""

from dataclasses import replace

import numpy as np
import pytest

from lowprec.evaluation.exact import ExactEvaluator
from lowprec.evaluation.profile import Profile, Profiler, ProfileSums, columns_of
from lowprec.plan import Plan, Precision
from lowprec.search import open_job


@pytest.fixture
def job(small_config):
    return open_job(small_config())


@pytest.fixture
def evaluator(job):
    return ExactEvaluator(job.adapter)


@pytest.fixture
def profiler(job, evaluator):
    return Profiler(job.adapter, evaluator.shards, columns_of(job.units, Precision))


def random_plans(units, count, precisions, seed=0):
    picks = np.random.default_rng(seed).integers(0, len(precisions), (count, len(units)))
    return [Plan({u.name: precisions[k] for u, k in zip(units, row, strict=True)}) for row in picks]


def predicted(profile, plans):
    """Gap and KL gap of the quadratic model, in percent."""
    z, total = profile.selected(plans), profile.total
    quadratic = 0.5 * np.einsum("pk,kl,pl->p", z, total.second, z)
    return 100 * (z @ total.first + quadratic) / total.loss, 100 * quadratic / total.loss


def test_columns_leave_fp32_out(job):
    columns = columns_of(job.units, [Precision.INT4, Precision.FP32, Precision.FP16])
    assert columns[:3] == (("table:c0", Precision.FP16), ("table:c0", Precision.INT4), ("table:c1", Precision.FP16))
    assert len(columns) == 2 * len(job.units)


@pytest.mark.parametrize(("cheapest", "correlation"), [(Precision.INT4, 0.999), (Precision.INT2, 0.98)])
def test_gaps_of_random_plans_are_predicted(job, evaluator, profiler, cheapest, correlation):
    """Small changes are predicted to a thousandth; int2 on these rough tables moves logits by 1 and more."""
    batches = list(job.window("search").batches())
    profile = Profile(columns_of(job.units, Precision), tuple(profiler.sums(b) for b in batches))
    plans = random_plans(job.units, 40, list(Precision)[: list(Precision).index(cheapest) + 1])
    exact = evaluator.sums(batches[0], plans)
    for batch in batches[1:]:
        exact = exact + evaluator.sums(batch, plans)
    found = [exact.metrics(k, confidence=0.95) for k in range(len(plans))]
    gap, kl = predicted(profile, plans)
    assert np.corrcoef(gap, [m.gap_pct for m in found])[0, 1] > correlation
    assert np.corrcoef(kl, [m.kl_pct for m in found])[0, 1] > correlation


def test_first_order_changes_are_those_of_a_small_step(job, evaluator, profiler):
    """fp16 moves logits by some 1e-4: there a single swap's exact change is its first-order change but for rounding."""
    batch = job.window("search").batch(0)
    columns = columns_of(job.units, Precision)
    reference, s = profiler.swaps(batch)
    for k, (unit, precision) in enumerate(columns):
        if precision is Precision.FP16:
            plan = Plan.uniform(job.units, Precision.FP32).replace({unit: precision})
            exact = evaluator.logits(batch, [plan]).plans[0].astype(float) - reference
            assert np.abs(exact).max() > 1e-5
            # fp32 logits of order 1 carry errors of about 1e-6.
            np.testing.assert_allclose(s[k], exact, atol=5e-6 + 0.02 * np.abs(exact).max())


def test_blocks_merge_in_any_order_and_equal_one_pass(job, profiler):
    columns = columns_of(job.units, Precision)
    parts = [profiler.sums(job.window("search").batch(k)) for k in range(4)]
    empty = ProfileSums.zero(len(columns))
    a = Profile(columns, (parts[0], parts[1], empty))
    b = Profile(columns, (parts[2], empty, parts[3]))
    c = Profile(columns, (empty, parts[3], parts[0]))
    for left, right in (((a + b) + c, a + (b + c)), (a + b, b + a)):
        for x, y in zip(left.blocks, right.blocks, strict=True):
            assert x.num_rows == y.num_rows
            np.testing.assert_allclose(x.second, y.second, rtol=1e-12)
            np.testing.assert_allclose(x.first, y.first, rtol=1e-12, atol=1e-15)
    assert (a + b).total.num_rows == 4 * 1024
    with pytest.raises(ValueError, match="same columns"):
        a + Profile(columns[:-1], a.blocks)


def test_noise_is_the_second_moment_of_the_terms_of_the_first_order(job, profiler):
    batch = job.window("search").batch(0)
    sums = profiler.sums(batch)
    logits, s = profiler.swaps(batch)
    p = 1 / (1 + np.exp(-logits.astype(float)))
    terms = s.astype(float) * (p - batch.labels)
    np.testing.assert_allclose(sums.first, terms.sum(axis=1), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(sums.noise, terms @ terms.T, rtol=1e-6)
    np.testing.assert_allclose(sums.second, (s * p * (1 - p)) @ s.T.astype(float), rtol=1e-6, atol=1e-12)


def test_where_labels_are_drawn_from_the_model_the_noise_is_the_curvature(job, profiler):
    """E[r^2 | x] = h then: the variance of the first-order term is known without labels."""
    rng = np.random.default_rng(0)
    columns = columns_of(job.units, [Precision.INT2])
    narrow = Profiler(job.adapter, ExactEvaluator(job.adapter).shards, columns)
    total = ProfileSums.zero(len(columns))
    for batch in job.window("search").batches():
        p = 1 / (1 + np.exp(-narrow.swaps(batch)[0].astype(float)))
        total = total + narrow.sums(replace(batch, labels=(rng.random(len(p)) < p).astype(np.float32)))
    ratio = np.diag(total.noise) / np.diag(total.second)
    np.testing.assert_allclose(ratio, 1, atol=0.15)
    deviations = total.first / np.sqrt(np.diag(total.noise))
    assert np.abs(deviations).max() < 4  # six columns, each a standard normal


def test_weights_and_missing_labels(job, profiler):
    batch = job.window("search").batch(0)
    w = np.random.default_rng(1).integers(0, 3, batch.num_rows).astype(float)
    repeated = np.repeat(np.arange(batch.num_rows), w.astype(int))
    weighted = profiler.sums(replace(batch, weights=w))
    logits, s = profiler.swaps(batch)
    p = 1 / (1 + np.exp(-logits.astype(float)))
    terms = (s * (p - batch.labels))[:, repeated]
    np.testing.assert_allclose(weighted.first, terms.sum(axis=1), rtol=1e-5, atol=1e-8)
    assert weighted.weight == w.sum()
    holes = batch.labels.copy()
    holes[::2] = np.nan
    half = profiler.sums(replace(batch, labels=holes))
    assert half.num_rows == batch.num_rows // 2
    np.testing.assert_allclose(half.first, (s * (p - batch.labels))[:, 1::2].sum(axis=1), rtol=1e-5, atol=1e-8)
