"""The sums give the metrics that one would compute with everything in memory, over any split."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.evaluation.metrics import GROUP_BUCKETS, PlanMetrics, sums_of_batch


def draw(n, seed=0, num_plans=2):
    rng = np.random.default_rng(seed)
    reference = rng.normal(-1, 1.5, n)
    plans = reference + rng.normal(0, 0.05, (num_plans, n))
    labels = (rng.random(n) < 1 / (1 + np.exp(-reference))).astype(float)
    weights = rng.uniform(0.5, 2, n)
    groups = rng.integers(0, max(n // 7, 1), n) * 1_000_003
    return reference, plans, labels, weights, groups


def losses(logits, labels):
    """PyTorch's own loss, in float64."""
    logits, labels = torch.tensor(logits), torch.tensor(labels)
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").numpy()


def test_gap_ne_and_calibration_are_those_of_the_definitions():
    reference, plans, labels, weights, _ = draw(5000)
    m = sums_of_batch(reference, plans, labels, weights, None).metrics(1, confidence=0.95)
    ref, plan = (np.average(losses(z, labels), weights=weights) for z in (reference, plans[1]))
    rate = np.average(labels, weights=weights)
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    assert m.ne_ref == pytest.approx(ref / entropy, rel=1e-12)
    assert m.ne_plan == pytest.approx(plan / entropy, rel=1e-12)
    assert m.gap_pct == pytest.approx(100 * (plan / ref - 1), rel=1e-9)
    assert m.gap_interval_pct.lower < m.gap_pct < m.gap_interval_pct.upper
    prediction = 1 / (1 + np.exp(-plans[1]))
    assert m.calibration_plan == pytest.approx((weights * prediction).sum() / (weights * labels).sum(), rel=1e-12)
    assert m.num_examples == m.num_units == 5000


def test_kl_gap_is_that_of_torch_and_the_expected_gap_where_the_reference_is_calibrated():
    reference, plans, labels, _, _ = draw(200_000, seed=1)
    m = sums_of_batch(reference, plans, labels, None, None).metrics(0, confidence=0.95)
    p, q = (torch.distributions.Bernoulli(logits=torch.tensor(z)) for z in (reference, plans[0]))
    kl = torch.distributions.kl_divergence(p, q).numpy()
    assert m.kl_pct == pytest.approx(100 * kl.mean() / p.entropy().numpy().mean(), rel=1e-6)
    # Labels were drawn from the reference, so both estimate the same number; the labelled one with far more noise.
    assert abs(m.gap_pct - m.kl_pct) < 3 * m.standard_error_pct
    width = {name: getattr(m, f"{name}_interval_pct") for name in ("gap", "kl")}
    assert width["kl"].upper - width["kl"].lower < (width["gap"].upper - width["gap"].lower) / 5


def brute_auc(logits, labels, weights):
    positive, negative = labels == 1, labels == 0
    greater = (logits[positive, None] > logits[None, negative]) + 0.5 * (
        logits[positive, None] == logits[None, negative]
    )
    w = weights[positive, None] * weights[None, negative]
    return (greater * w).sum() / w.sum()


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 300), st.integers(0, 10_000), st.floats(0.1, 30))
def test_auc_is_within_its_stated_error(n, seed, spread):
    reference, plans, labels, weights, _ = draw(n, seed)
    labels[:2] = 0, 1
    m = sums_of_batch(reference * spread, plans, labels, weights, None).metrics(0, confidence=0.95)
    slack = 1e-12
    assert abs(m.auc_ref - brute_auc(reference * spread, labels, weights)) <= m.auc_error + slack
    assert abs(m.auc_plan - brute_auc(plans[0], labels, weights)) <= m.auc_error + slack


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.booleans(), st.integers(0, 99))
def test_merging_is_associative_and_equals_one_batch(a, b, c, grouped, seed):
    reference, plans, labels, weights, groups = draw(a + b + c, seed)
    pieces = [
        sums_of_batch(reference[s], plans[:, s], labels[s], weights[s], groups[s] if grouped else None)
        for s in (slice(0, a), slice(a, a + b), slice(a + b, None))
    ]
    whole = sums_of_batch(reference, plans, labels, weights, groups if grouped else None)
    left, right = (pieces[0] + pieces[1]) + pieces[2], pieces[0] + (pieces[1] + pieces[2])
    for sums in (left, right):
        assert (sums.num_rows, sums.num_plans) == (whole.num_rows, whole.num_plans)
        for name in ("loss", "prediction", "histogram", "moments"):
            np.testing.assert_allclose(getattr(sums, name), getattr(whole, name), rtol=1e-9, atol=1e-12)
        if grouped:
            np.testing.assert_array_equal(sums.groups.buckets, whole.groups.buckets)
            np.testing.assert_allclose(sums.groups.values, whole.groups.values, rtol=1e-9, atol=1e-12)


def test_a_group_is_one_unit_of_evidence():
    reference, plans, labels, _, _ = draw(2000)
    again = [np.tile(v, 5) for v in (reference, labels)]
    single = sums_of_batch(reference, plans, labels, None, np.arange(2000)).metrics(0, confidence=0.95)
    copies = sums_of_batch(again[0], np.tile(plans, 5), again[1], None, np.tile(np.arange(2000), 5))
    five = copies.metrics(0, confidence=0.95)
    # Every row five times over in the same group is no more evidence than once; hashing may merge a few groups.
    assert five.num_units == single.num_units
    assert 2000 * (1 - 2000 / GROUP_BUCKETS) <= five.num_units <= 2000
    assert five.gap_interval_pct.upper == pytest.approx(single.gap_interval_pct.upper, rel=1e-9)
    naive = sums_of_batch(again[0], np.tile(plans, 5), again[1], None, None).metrics(0, confidence=0.95)
    assert naive.gap_interval_pct.upper < five.gap_interval_pct.upper


def test_rows_without_a_label_are_left_out_and_counted():
    reference, plans, labels, weights, groups = draw(100)
    missing = np.arange(100) % 3 == 0
    holes = np.where(missing, np.nan, labels)
    sums = sums_of_batch(reference, plans, holes, weights, groups)
    keep = ~missing
    expected = sums_of_batch(reference[keep], plans.compress(keep, axis=1), labels[keep], weights[keep], groups[keep])
    assert sums.num_unlabelled == missing.sum()
    assert sums.metrics(0, confidence=0.9) == expected.metrics(0, confidence=0.9)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_sums_of_a_plan_are_the_same_bits_in_any_company(missing):
    reference, plans, labels, weights, _ = draw(342, num_plans=8)
    holes = np.where(np.random.default_rng(1).random(342) < missing, np.nan, labels)
    together = sums_of_batch(reference, plans, holes, weights, None)
    for k in range(8):
        alone = sums_of_batch(reference, plans[k : k + 1], holes, weights, None)
        for name in ("loss", "prediction", "moments"):
            assert getattr(together.only([k]), name).tobytes() == getattr(alone, name).tobytes()


def test_one_class_has_a_gap_but_neither_ne_nor_auc():
    reference, plans, labels, _, _ = draw(500)
    m = sums_of_batch(reference, plans, np.zeros_like(labels), None, None).metrics(0, confidence=0.95)
    assert math.isfinite(m.gap_pct) and math.isnan(m.ne_ref) and math.isnan(m.auc_ref)
    assert m.to_dict()["ne_ref"] is None


def test_extreme_logits_stay_exact():
    m = sums_of_batch(
        np.array([800.0, -800.0] * 60), np.array([[790.0, -790.0] * 60]), np.array([0.0, 1.0] * 60), None, None
    )
    assert m.metrics(0, confidence=0.95).gap_pct == pytest.approx(100 * (790 / 800 - 1))


def test_metrics_survive_a_round_trip_through_plain_numbers():
    reference, plans, labels, _, _ = draw(150)
    m = sums_of_batch(reference, plans, labels, None, None).metrics(1, confidence=0.95)
    assert PlanMetrics.from_dict(m.to_dict()) == m
    few = sums_of_batch(reference[:5], plans[:, :5], labels[:5], None, None).metrics(1, confidence=0.95)
    assert few.to_dict()["gap_upper_pct"] is None
    assert PlanMetrics.from_dict(few.to_dict()).gap_interval_pct.upper == math.inf


@pytest.mark.parametrize("groups", [None, 7])
def test_the_kl_gap_is_relative_to_the_entropy_of_the_reference(groups):
    """The same as the gap where each label is replaced by the reference's own prediction, whatever the labels say."""
    rng = np.random.default_rng(5)
    z, w = rng.normal(size=3000), rng.exponential(size=3000)
    plan = z + 0.05 * rng.normal(size=3000)
    y = (rng.random(3000) < 0.1).astype(float)  # far from calibrated
    p = 1 / (1 + np.exp(-z))
    keys = None if groups is None else rng.integers(0, groups * 100, 3000)
    found = sums_of_batch(z, plan[None], y, w, keys).metrics(0, confidence=0.95)
    entropy = -p * np.log(p) - (1 - p) * np.log1p(-p)
    cross = -p * -np.logaddexp(0, -plan) - (1 - p) * -np.logaddexp(0, plan)
    assert found.kl_pct == pytest.approx(100 * (w * (cross - entropy)).sum() / (w * entropy).sum(), rel=1e-9)
    assert found.kl_interval_pct.lower < found.kl_pct < found.kl_interval_pct.upper
