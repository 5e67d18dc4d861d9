"""Sums of a race: the same for any split, and what is exact in them is what an exact evaluation gives."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowprec.core.byte_lru import ByteLru
from lowprec.evaluation.profile.profile import logit_changes
from lowprec.evaluation.race.race_sums import RaceTask, Residuals
from lowprec.evaluation.workers.worker import LocalWorkers, evaluator_of
from lowprec.plan import TABLE_PRECISIONS, Plan, Precision
from lowprec.search import open_job


@pytest.fixture
def job(small_config):
    return open_job(small_config())


def random_plans(units, count, seed=0):
    picks = np.random.default_rng(seed).integers(0, 5, (count, len(units)))
    return [Plan({u.name: TABLE_PRECISIONS[k] for u, k in zip(units, row, strict=True)}) for row in picks]


def lap(job, plans, batches, parts, num_parts, *, workers=None):
    workers = workers or LocalWorkers(job.spec, job.adapter)
    task = RaceTask(tuple(plans), job.columns, batches, parts, (num_parts,) * len(batches), "here")
    return next(workers.run(job.window("search"), [task])).sums


def arrays(sums):
    found = [sums.changed, sums.predicted]
    found += [*vars(sums.gap).values(), *vars(sums.kl).values(), sums.exact.loss, sums.exact.moments]
    return [np.asarray(v) for v in found]


def losses(logits, y):
    return np.logaddexp(0, logits) - y * logits


def test_sums_are_those_of_their_definitions(job):
    plans = random_plans(job.units, 5)
    sums = lap(job, plans, (1,), ((2,),), 4)
    batch, evaluator = (
        job.window("search").batch(1).part(2, 4),
        evaluator_of(job.spec, job.adapter),
    )
    logits = evaluator.logits(batch, plans)
    z, changed = logits.reference.astype(float), logits.plans.astype(float)
    s = logit_changes(evaluator, batch, job.columns)[1].astype(float)
    chosen = np.array([[plan[unit] is p for unit, p in job.columns] for plan in plans], dtype=float)
    y, p, moved = batch.labels.astype(float), 1 / (1 + np.exp(-z)), chosen @ s
    loss, change = losses(z, y), losses(changed, y) - losses(z, y)
    kl = losses(changed, p) - losses(z, p)
    linear, curved = (p - y) * moved, 0.5 * p * (1 - p) * moved**2
    e, f = change - linear - curved, kl - curved
    tolerance = {"rtol": 1e-3, "atol": 1e-4}  # s is of float32
    np.testing.assert_allclose(sums.gap.e, e.sum(axis=1), **tolerance)
    np.testing.assert_allclose(sums.gap.ee_rows, (e**2).sum(axis=1), **tolerance)
    np.testing.assert_allclose(sums.gap.ey_rows, e @ loss, **tolerance)
    np.testing.assert_allclose(sums.gap.ee_slices, e.sum(axis=1) ** 2, **tolerance)
    np.testing.assert_allclose(sums.gap.ey_slices, e.sum(axis=1) * loss.sum(), **tolerance)
    np.testing.assert_allclose(sums.kl.e, f.sum(axis=1), **tolerance)
    np.testing.assert_allclose(sums.changed, (change**2).sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(sums.predicted, (linear**2).sum(axis=1), **tolerance)
    entropy = losses(z, p)
    np.testing.assert_allclose(sums.kl.ey_rows, f @ entropy, **tolerance)
    for residuals, below in ((sums.gap, loss), (sums.kl, entropy)):
        assert (residuals.y, residuals.yy_rows, residuals.yy_slices) == pytest.approx(
            (below.sum(), (below**2).sum(), below.sum() ** 2), rel=1e-9
        )
    assert sums.num_slices == 1 and sums.exact.num_rows == 256


def test_all_parts_of_all_batches_are_the_whole_evaluation(job):
    plans = random_plans(job.units, 4)
    every = tuple(range(6))
    sums = lap(job, plans, every, ((0, 1, 2),) * 6, 3)
    evaluator = evaluator_of(job.spec, job.adapter)
    whole = evaluator.sums(job.window("search").batch(0), plans)
    for k in every[1:]:
        whole = whole + evaluator.sums(job.window("search").batch(k), plans)
    assert sums.num_slices == 18 and sums.exact.num_rows == whole.num_rows == 6000
    # The dense part sees 342 rows instead of 1,024 at once: fp32 logits differ in their last bits.
    np.testing.assert_allclose(sums.exact.loss, whole.loss, rtol=1e-6)
    np.testing.assert_allclose(sums.exact.label, whole.label)


def test_the_order_of_adding_does_not_matter_beyond_rounding(job):
    plans = random_plans(job.units, 4)
    parts = [lap(job, plans, (k,), ((k % 3,),), 3) for k in range(4)]
    a, b, c, d = parts
    for left, right in ((a + b) + (c + d), ((d + c) + b) + a), (a + b, b + a):
        for x, y in zip(arrays(left), arrays(right), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
    one = lap(job, plans, (0, 1, 2, 3), ((0,), (1,), (2,), (0,)), 3)
    for x, y in zip(arrays(one), arrays(a + b + c + d), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


def test_plans_that_race_together_get_what_they_get_alone(job):
    plans = random_plans(job.units, 8)
    together = lap(job, plans, (0, 3), ((1,), (0, 2)), 3)
    for k, plan in enumerate(plans):
        alone = lap(job, [plan], (0, 3), ((1,), (0, 2)), 3)
        for x, y in zip(arrays(together.only([k])), arrays(alone), strict=True):
            assert x.tobytes() == y.tobytes()


def test_only_keeps_the_plans_asked_for_in_that_order(job):
    plans = random_plans(job.units, 5)
    sums = lap(job, plans, (2,), ((0,),), 4)
    some = sums.only([3, 0])
    np.testing.assert_array_equal(some.gap.e, sums.gap.e[[3, 0]])
    np.testing.assert_array_equal(some.kl.ee_rows, sums.kl.ee_rows[[3, 0]])
    np.testing.assert_array_equal(some.exact.loss, sums.exact.loss[[0, 4, 1]])
    np.testing.assert_array_equal(some.changed, sums.changed[[3, 0]])
    assert (some.gap.y, some.kl.y, some.num_slices) == (sums.gap.y, sums.kl.y, sums.num_slices)
    assert some.exact.metrics(0, confidence=0.9) == sums.exact.metrics(3, confidence=0.9)
    # A lap of those that are left adds to them.
    more = lap(job, [plans[3], plans[0]], (4,), ((1,),), 4)
    np.testing.assert_allclose((some + more).gap.e, sums.gap.e[[3, 0]] + more.gap.e)


def test_only_keeps_the_groups_of_the_plans_asked_for(small_config):
    job = open_job(small_config("traffic.group=user"))
    plans = random_plans(job.units, 4)
    sums = lap(job, plans, (2, 3), ((0,), (1,)), 2)
    some = sums.only([2])
    alone = lap(job, [plans[2]], (2, 3), ((0,), (1,)), 2)
    np.testing.assert_array_equal(some.exact.groups.buckets, alone.exact.groups.buckets)
    np.testing.assert_allclose(some.exact.groups.values, alone.exact.groups.values, rtol=1e-12)


def test_what_is_kept_changes_no_bit(job):
    plans = random_plans(job.units, 6)
    workers = LocalWorkers(job.spec, job.adapter)
    first = lap(job, plans[:3], (0, 1), ((0, 2), (1,)), 3, workers=workers)
    again = lap(job, plans[:3], (0, 1), ((0, 2), (1,)), 3, workers=workers)
    fresh = lap(job, plans[:3], (0, 1), ((0, 2), (1,)), 3)
    for x, y, z in zip(arrays(first), arrays(again), arrays(fresh), strict=True):
        assert x.tobytes() == y.tobytes() == z.tobytes()
    # Another cut of the same batches is another slice.
    other = lap(job, plans[:3], (0,), ((0,),), 2, workers=workers)
    np.testing.assert_allclose(other.gap.e, lap(job, plans[:3], (0,), ((0,),), 2).gap.e)


def test_the_fp32_plan_leaves_no_residual(job):
    sums = lap(job, [Plan.uniform(job.units, Precision.FP32)], (0,), ((0,),), 1)
    of_plans = ("e", "ee_slices", "ey_slices", "ee_rows", "ey_rows")
    residuals = [getattr(part, name) for part in (sums.gap, sums.kl) for name in of_plans]
    assert not any(np.any(v) for v in (*residuals, sums.changed, sums.predicted))


def test_weights_multiply_and_rows_without_a_label_are_left_out(job):
    plans = random_plans(job.units, 3)
    evaluator, batch = evaluator_of(job.spec, job.adapter), job.window("search").batch(0)
    rng = np.random.default_rng(1)
    holes = np.where(rng.random(batch.num_rows) < 0.3, np.nan, batch.labels).astype(np.float32)
    rows = np.flatnonzero(~np.isnan(holes))

    def sums(changed, name):
        return RaceTask(tuple(plans), job.columns, (0,), ((0,),), (1,), name).sums(evaluator, changed)

    some = sums(replace(batch, labels=holes), "holes")
    ones = sums(replace(batch, labels=holes, weights=np.ones(batch.num_rows)), "ones")
    assert some.exact.num_rows == len(rows)
    for x, y in zip(arrays(some), arrays(ones), strict=True):
        np.testing.assert_array_equal(x, y)
    # A weight of 0 is as good as no label, but the row counts.
    zeros = sums(replace(batch, weights=(~np.isnan(holes)).astype(float)), "zeros")
    np.testing.assert_allclose(zeros.gap.e, some.gap.e, rtol=1e-9)
    np.testing.assert_allclose(zeros.gap.y, some.gap.y, rtol=1e-9)
    twos = sums(replace(batch, labels=holes, weights=np.full(batch.num_rows, 2.0)), "twos")
    np.testing.assert_allclose(twos.gap.ee_rows, 4 * some.gap.ee_rows)


def test_a_slice_without_rows_counts_as_a_slice(job):
    sums = lap(job, random_plans(job.units, 2), (5,), ((1500,),), 2000)
    assert sums.num_slices == 1 and sums.exact.num_rows in (0, 1)
    empty = job.window("search").batch(0).part(0, 5000)
    task = RaceTask(tuple(random_plans(job.units, 2)), job.columns, (0,), ((0,),), (1,), "empty")
    nothing = task.sums(evaluator_of(job.spec, job.adapter), empty)
    assert nothing.gap.y == nothing.kl.y == 0 and not nothing.gap.e.any() and nothing.num_slices == 1


@given(st.lists(st.integers(1, 30), min_size=2, max_size=6), st.integers(0, 999))
def test_residuals_of_slices_add_up(sizes, seed):
    rng = np.random.default_rng(seed)
    slices = [(rng.normal(size=(3, n)), rng.exponential(size=n)) for n in sizes]
    total = Residuals.of_slice(*slices[0])
    for e, y in slices[1:]:
        total = total + Residuals.of_slice(e, y)
    e, y = (np.concatenate([part[k] for part in slices], axis=-1) for k in (0, 1))
    np.testing.assert_allclose(total.e, e.sum(axis=1), atol=1e-9)
    np.testing.assert_allclose(total.ee_rows, (e**2).sum(axis=1))
    np.testing.assert_allclose(total.ey_rows, e @ y, atol=1e-9)
    sums = [(part.sum(axis=1), loss.sum()) for part, loss in slices]
    np.testing.assert_allclose(total.ee_slices, sum(t**2 for t, _ in sums))
    np.testing.assert_allclose(total.ey_slices, sum(t * loss for t, loss in sums), atol=1e-9)
    np.testing.assert_array_equal(total.only([2, 0]).e, total.e[[2, 0]])


def test_kept_values_stay_under_their_bound_and_those_used_last_stay():
    made = []

    def get(kept, key, size=10):
        return kept.get(key, lambda: made.append(key) or f"value of {key}", lambda _: size)

    kept = ByteLru(30)
    for key in "abc":
        assert get(kept, key) == f"value of {key}"
    get(kept, "a")
    get(kept, "d")  # drops b, which was used longest ago
    assert made == list("abcd")
    get(kept, "a"), get(kept, "c"), get(kept, "d")
    assert made == list("abcd")
    assert get(kept, "b") == "value of b" and made[-1] == "b"
    # What is larger than the bound is made every time, and is no error.
    assert get(kept, "huge", 100) == get(kept, "huge", 100) == "value of huge"
    assert made[-2:] == ["huge", "huge"]
