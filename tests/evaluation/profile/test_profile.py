"""What one batch adds to a profile, and what the sums predict."""

import math
from dataclasses import replace

import numpy as np
import pytest

from lowprec.evaluation.profile.profile import Profile, ProfilePart, ProfileTask, columns_of, logit_changes
from lowprec.evaluation.workers.worker import evaluator_of
from lowprec.plan import TABLE_PRECISIONS, Plan, Precision
from lowprec.search import open_job


@pytest.fixture
def job(small_config):
    return open_job(small_config())


@pytest.fixture
def evaluator(job):
    return evaluator_of(job.spec, job.adapter)


@pytest.fixture
def columns(job):
    return columns_of(job.units, TABLE_PRECISIONS)


def part_of(evaluator, columns, batch, num_blocks=20):
    return ProfileTask(columns, num_blocks, (batch.index,)).sums(evaluator, batch)


def profile_of(columns, parts):
    evidence = parts[0].evidence
    for part in parts[1:]:
        evidence = evidence + part.evidence
    return Profile(columns, tuple(part.block for part in parts), evidence)


def directions(evaluator, batch, columns):
    """s with the directions of calibration below it, float64[D, B], and the reference's probabilities."""
    logits, s = logit_changes(evaluator, batch, columns)
    logits = logits.astype(float)
    return np.concatenate([s.astype(float), np.ones((1, len(logits))), logits[None]]), 1 / (1 + np.exp(-logits))


def random_plans(units, count, precisions, seed=0):
    picks = np.random.default_rng(seed).integers(0, len(precisions), (count, len(units)))
    return [Plan({u.name: precisions[k] for u, k in zip(units, row, strict=True)}) for row in picks]


def test_columns_leave_fp32_out(job):
    columns = columns_of(job.units, [Precision.INT4, Precision.FP32, Precision.FP16])
    assert columns[:3] == (("table:c0", Precision.FP16), ("table:c0", Precision.INT4), ("table:c1", Precision.FP16))
    assert len(columns) == 2 * len(job.units)


def test_selected_says_which_columns_a_plan_takes_and_never_shifts_or_scales(job, columns):
    profile = profile_of(columns, [ProfilePart.zero(len(columns), 20, by_group=False)])
    plans = [Plan.uniform(job.units, Precision.FP32), *random_plans(job.units, 5, list(TABLE_PRECISIONS))]
    z = profile.selected(plans)
    assert z.shape == (6, len(columns) + 2) and not z[:, -2:].any() and not z[0].any()
    for row, plan in zip(z, plans, strict=True):
        low = {(unit, p) for unit, p in plan.items() if p is not Precision.FP32}
        assert {columns[k] for k in np.flatnonzero(row)} == low
    assert profile.selected([]).shape == (0, len(columns) + 2)


@pytest.mark.parametrize(("cheapest", "correlation"), [(Precision.INT4, 0.999), (Precision.INT2, 0.98)])
def test_gaps_of_random_plans_are_predicted(job, evaluator, columns, cheapest, correlation):
    """Small changes are predicted to a thousandth; int2 on these rough tables moves logits by 1 and more."""
    batches = list(job.window("search").batches())
    profile = profile_of(columns, [part_of(evaluator, columns, b) for b in batches])
    plans = random_plans(job.units, 40, TABLE_PRECISIONS[: list(TABLE_PRECISIONS).index(cheapest) + 1])
    exact = evaluator.sums(batches[0], plans)
    for batch in batches[1:]:
        exact = exact + evaluator.sums(batch, plans)
    found = [exact.metrics(k, confidence=0.95) for k in range(len(plans))]
    gap, kl = profile.gaps_pct(profile.selected(plans))
    assert np.corrcoef(gap, [m.gap_pct for m in found])[0, 1] > correlation
    assert np.corrcoef(kl, [m.kl_pct for m in found])[0, 1] > correlation
    assert profile.loss == pytest.approx(exact.loss[0], rel=1e-9)


def test_first_order_changes_are_those_of_a_small_step(job, evaluator, columns):
    """fp16 moves logits by some 1e-4: there a single swap's exact change is its first-order change but for rounding."""
    batch = job.window("search").batch(0)
    reference, s = logit_changes(evaluator, batch, columns)
    for k, (unit, precision) in enumerate(columns):
        if precision is Precision.FP16:
            plan = Plan.uniform(job.units, Precision.FP32).replace({unit: precision})
            exact = evaluator.logits(batch, [plan]).plans[0].astype(float) - reference
            assert np.abs(exact).max() > 1e-5
            # fp32 logits of order 1 carry errors of about 1e-6.
            np.testing.assert_allclose(s[k], exact, atol=5e-6 + 0.02 * np.abs(exact).max())


def test_sums_are_those_of_their_definitions(job, evaluator, columns):
    """Also of the shift and the scale, and of the reference loss in the last direction of the evidence."""
    batch = job.window("search").batch(0)
    part = part_of(evaluator, columns, batch)
    v, p = directions(evaluator, batch, columns)
    y = batch.labels.astype(float)
    loss = -np.where(y == 1, np.log(p), np.log1p(-p))
    terms = np.concatenate([v * (p - y), loss[None]])
    block = part.block
    # s is of float32, and so are products summed over a batch of 1,024.
    scale = np.sqrt(np.outer(*2 * [np.square(terms).sum(axis=1)]))
    assert np.abs(part.evidence.dense() - terms @ terms.T).max() < 1e-5 * scale.max()
    np.testing.assert_allclose(block.first, terms[:-1].sum(axis=1), rtol=1e-4, atol=1e-4 * np.abs(v).max())
    curvature = (v * p * (1 - p)) @ v.T
    np.testing.assert_allclose(block.second.dense(), curvature, rtol=1e-4, atol=1e-5 * np.abs(curvature).max())
    assert block.loss == pytest.approx(loss.sum(), rel=1e-6)
    assert block.prediction == pytest.approx(p.sum(), rel=1e-6)
    assert (block.num_rows, block.weight, block.label) == (1024, 1024.0, y.sum())


def test_moments_are_those_of_the_predicted_change_and_the_loss(job, evaluator, columns):
    """The same numbers that one would sum up example by example."""
    batch = job.window("search").batch(0)
    profile = profile_of(columns, [part_of(evaluator, columns, batch)])
    (plan,) = random_plans(job.units, 1, list(TABLE_PRECISIONS))
    z = profile.selected([plan])
    v, p = directions(evaluator, batch, columns)
    y = batch.labels.astype(float)
    linear, loss = (z[0] @ v) * (p - y), -np.where(y == 1, np.log(p), np.log1p(-p))
    (m,) = profile.moments(z)
    assert m.num_units == 1024
    assert m.x == pytest.approx(linear.sum() + 0.5 * (p * (1 - p) * (z[0] @ v) ** 2).sum(), rel=1e-4)
    assert m.xx == pytest.approx((linear**2).sum(), rel=1e-4)
    assert m.xy == pytest.approx((linear * loss).sum(), rel=1e-3, abs=1e-4 * math.sqrt(m.xx * m.yy))
    assert (m.y, m.yy) == pytest.approx((loss.sum(), (loss**2).sum()), rel=1e-5)


def test_profiles_over_other_columns_do_not_add(columns):
    zero = ProfilePart.zero(len(columns), 20, by_group=False)
    narrow = ProfilePart.zero(len(columns) - 1, 20, by_group=False)
    with pytest.raises(ValueError, match="same columns"):
        profile_of(columns, [zero]) + profile_of(columns[:-1], [narrow])
    with pytest.raises(ValueError, match="number of blocks"):
        profile_of(columns, [zero]) + profile_of(columns, [zero, zero])


@pytest.mark.parametrize("kind", ["dense", "sketch", "groups"])
def test_blocks_merge_in_any_order_and_equal_one_pass(job, evaluator, columns, kind, monkeypatch):
    if kind == "sketch":
        monkeypatch.setattr("lowprec.evaluation.profile.profile.MAX_DENSE_COLUMNS", 4)
    batches = [job.window("search").batch(k) for k in range(4)]
    if kind == "groups":
        batches = [replace(b, groups=b.times % 50) for b in batches]
    parts = [part_of(evaluator, columns, batch) for batch in batches]
    empty = ProfilePart.zero(len(columns), 20, by_group=kind == "groups")
    a = profile_of(columns, [parts[0], parts[1], empty])
    b = profile_of(columns, [parts[2], empty, parts[3]])
    c = profile_of(columns, [empty, parts[3], parts[0]])
    z = a.selected(random_plans(job.units, 6, list(TABLE_PRECISIONS)))
    pairs = [((a + b) + c, a + (b + c)), (a + b, b + a)]
    pairs.append((a + b, profile_of(columns, [parts[0] + parts[2], parts[1] + empty, parts[3]])))
    for left, right in pairs:
        assert left.num_rows == right.num_rows
        np.testing.assert_allclose(left.first, right.first, rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(left.gaps_pct(z), right.gaps_pct(z), rtol=1e-9)
        np.testing.assert_allclose(left.block_sums(z)[0], right.block_sums(z)[0], rtol=1e-9, atol=1e-9)
        xx = [[m.xx for m in profile.moments(z)] for profile in (left, right)]
        np.testing.assert_allclose(*xx, rtol=1e-9)
    assert (a + b).num_rows == 4 * 1024


def test_weights_count_like_repetition(job, evaluator, columns):
    batch = job.window("search").batch(0)
    w = np.random.default_rng(1).integers(0, 3, batch.num_rows).astype(float)
    found = part_of(evaluator, columns, replace(batch, weights=w))
    v, p = directions(evaluator, batch, columns)
    again = np.repeat(np.arange(batch.num_rows), w.astype(int))
    terms = (v * (p - batch.labels))[:, again]
    np.testing.assert_allclose(found.block.first, terms.sum(axis=1), rtol=1e-4, atol=1e-4 * np.abs(v).max())
    curvature = (v * p * (1 - p))[:, again] @ v[:, again].T
    np.testing.assert_allclose(found.block.second.dense(), curvature, rtol=1e-4, atol=1e-5 * np.abs(curvature).max())
    assert found.block.weight == w.sum() and found.block.num_rows == batch.num_rows
    # A row of weight 2 is one example, no two: its square counts fourfold.
    squares = np.square(v * (p - batch.labels) * w).sum(axis=1)
    np.testing.assert_allclose(found.evidence.diagonal[:-1], squares, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "sketch", "groups"])
def test_rows_without_a_label_are_counted_and_left_out(job, evaluator, columns, kind, monkeypatch):
    if kind == "sketch":
        monkeypatch.setattr("lowprec.evaluation.profile.profile.MAX_DENSE_COLUMNS", 4)
    batch = job.window("search").batch(0)
    if kind == "groups":
        batch = replace(batch, groups=batch.times % 50)
    holes = batch.labels.copy()
    holes[::2] = np.nan
    half = part_of(evaluator, columns, replace(batch, labels=holes))
    assert (half.block.num_rows, half.block.num_unlabelled) == (512, 512)
    v, p = directions(evaluator, batch, columns)
    expected = (v * (p - batch.labels))[:, 1::2].sum(axis=1)
    np.testing.assert_allclose(half.block.first, expected, rtol=1e-4, atol=1e-4 * np.abs(v).max())
    none = part_of(evaluator, columns, replace(batch, labels=np.full_like(holes, np.nan)))
    assert (none.block.num_rows, none.block.num_unlabelled, none.block.loss) == (0, 1024, 0.0)
    assert not none.block.first.any() and not none.evidence.diagonal.any()
    other = part_of(evaluator, columns, replace(batch, labels=np.where(np.isnan(holes), batch.labels, np.nan)))
    whole = part_of(evaluator, columns, batch)
    for name in ("first", "loss", "weight", "label", "prediction"):
        added = getattr((half + other).block, name)
        np.testing.assert_allclose(added, getattr(whole.block, name), rtol=1e-4, atol=1e-4 * np.abs(v).max())
    # The same examples under the same keys, so the same sketch too.
    np.testing.assert_allclose((half + other).evidence.dense(), whole.evidence.dense(), rtol=1e-3, atol=1e-3)


def test_a_batch_whose_rows_were_all_bad_adds_nothing(job, evaluator, columns):
    empty = job.window("search").batch(0).part(0, 5000)
    assert empty.num_rows == 0
    part = part_of(evaluator, columns, empty)
    assert part.block.num_rows == 0 and not part.block.first.any()
    logits, s = logit_changes(evaluator, empty, columns)
    assert logits.shape == (0,) and s.shape == (len(columns), 0)


def test_groups_are_the_units_of_evidence(job, evaluator, columns):
    """Every example twice, both in one group: the variance of a sum is four times that of one, not two."""
    batch = job.window("search").batch(0)
    profile = profile_of(columns, [part_of(evaluator, columns, batch)])
    paired = [replace(batch, groups=batch.times), replace(batch, groups=batch.times)]
    twice = profile_of(columns, [part_of(evaluator, columns, b) for b in paired])
    single = profile_of(columns, [part_of(evaluator, columns, paired[0])])
    z = profile.selected(random_plans(job.units, 8, list(TABLE_PRECISIONS)))
    for one, two in zip(single.moments(z), twice.moments(z), strict=True):
        assert two.xx == pytest.approx(4 * one.xx, rel=1e-9)


def test_where_labels_are_drawn_from_the_model_the_noise_is_the_curvature(job, evaluator):
    """E[r^2 | x] = h then: the variance of the first-order term is known without labels."""
    rng = np.random.default_rng(0)
    columns = columns_of(job.units, [Precision.INT2])
    parts = []
    for batch in job.window("search").batches():
        p = 1 / (1 + np.exp(-logit_changes(evaluator, batch, columns)[0].astype(float)))
        parts.append(part_of(evaluator, columns, replace(batch, labels=(rng.random(len(p)) < p).astype(np.float32))))
    profile = profile_of(columns, parts)
    noise = profile.evidence.diagonal[:-1]
    np.testing.assert_allclose(noise / profile.second.diagonal, 1, atol=0.15)
    deviations = profile.first / np.sqrt(noise)
    assert np.abs(deviations).max() < 4  # six columns, shift and scale, each a standard normal


@pytest.mark.parametrize("grouped", [False, True])
def test_intervals_hold_the_truth_and_their_errors_are_right(toy, grouped):
    """Labels drawn from the model: the expected gap of a plan is its second-order part, known without noise."""
    rng, alpha, num_plans, miss, deviations = np.random.default_rng(1), 0.05, 40, [], []
    for _ in range(12):
        world = toy(num_plans)
        n, num_groups = 4000, 400
        z = rng.normal(-1, 1, n)
        groups = rng.integers(0, num_groups, n) if grouped else None
        s = 0.05 * rng.standard_t(5, (num_plans, n))
        if grouped:
            s += 0.05 * rng.normal(size=(num_plans, num_groups))[:, groups]
        labels = rng.random(n) < 1 / (1 + np.exp(-z))
        profile = world.fill(z, s, labels, groups=groups, batch_size=200).measure()
        chosen = profile.selected([world.plan(k) for k in range(num_plans)])
        gap, kl = profile.gaps_pct(chosen)
        intervals = profile.intervals_pct(chosen, confidence=1 - alpha)
        miss += [not i.lower <= k <= i.upper for i, k in zip(intervals, kl, strict=True)]
        errors = np.sqrt([m.xx for m in profile.moments(chosen)]) / profile.loss * 100
        deviations += list((gap - kl) / errors)
    count = len(deviations)
    assert np.mean(miss) <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / count)
    # Fourth moments of t-distributed terms add some to the error of a variance.
    assert np.std(deviations) == pytest.approx(1, abs=4 * 1.5 / math.sqrt(2 * count))
    assert abs(np.mean(deviations)) < 4 / math.sqrt(count)
