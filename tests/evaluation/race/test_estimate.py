"""What a race says of a plan holds for the whole window and for traffic like it, however often one looks."""

import math

import numpy as np
import pytest

from lowprec.evaluation.evaluate import evaluate_plans
from lowprec.evaluation.profile.window_profile import measure_profile
from lowprec.evaluation.race.estimate import MIN_SLICES, estimates, residual_radius
from lowprec.evaluation.race.race_sums import RaceSums, RaceTask, Residuals
from lowprec.evaluation.workers.worker import LocalWorkers
from lowprec.plan import TABLE_PRECISIONS, Plan, Precision
from lowprec.search import open_job
from lowprec.search.race_policy import laps
from lowprec.search.surrogate.shrinkage import shrunk_first_order


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softplus(z):
    return np.logaddexp(0, z)


def allowed(alpha, count):
    return alpha + 3 * math.sqrt(alpha * (1 - alpha) / count)


# The slices that were not seen.


def residual_world(rng, kind, num_slices, size, count):
    """Residuals float64[count, N] and losses [N] of one window, and the slice of each example."""
    sizes = rng.integers(1, 2 * size, num_slices) if kind == "unequal" else np.full(num_slices, size)
    slice_of = np.repeat(np.arange(num_slices), sizes)
    shape = (count, len(slice_of))
    e = rng.standard_t(2.5, shape) if kind == "heavy" else rng.normal(size=shape)
    if kind in ("correlated", "unequal"):
        e += rng.normal(size=(count, num_slices))[:, slice_of]
    return e, rng.exponential(0.5, len(slice_of)), slice_of


@pytest.mark.parametrize(
    ("kind", "num_slices", "size", "alpha"),
    [
        *((kind, *rest) for kind in ("normal", "correlated", "heavy") for rest in ((20, 60, 0.05), (64, 40, 0.05))),
        # RESIDUAL_SHARE of 5 percent.
        *((kind, 64, 40, 0.005) for kind in ("normal", "correlated", "heavy")),
        ("unequal", 20, 60, 0.05),
        ("unequal", 64, 40, 0.05),
    ],
)
def test_the_radius_covers_while_one_looks_after_every_lap_to_the_end(kind, num_slices, size, alpha):
    rng, worlds, count = np.random.default_rng(0), 20, 60
    missed, naive = [], []
    for _ in range(worlds):
        e, y, slice_of = residual_world(rng, kind, num_slices, size, count)
        starts = np.searchsorted(slice_of, np.arange(num_slices))
        totals = np.add.reduceat(e, starts, axis=1), np.add.reduceat(y, starts)
        rows = [np.add.reduceat(v, starts, axis=-1) for v in (e * e, e * y, y * y)]
        true = totals[0].sum(axis=1) / totals[1].sum()
        miss, miss_naive = np.zeros(count, bool), np.zeros(count, bool)
        for m in laps(num_slices):
            t, loss = totals[0][:, :m], totals[1][:m]
            of_plans = t.sum(axis=1), (t * t).sum(axis=1), t @ loss, *(v[:, :m].sum(axis=1) for v in rows[:2])
            residuals = Residuals(*of_plans, float(loss.sum()), float(loss @ loss), float(rows[2][:m].sum()))
            sums = RaceSums(m, None, residuals, residuals, 0, 0)
            radius = np.array(
                [residual_radius(residuals, sums, k, num_slices=num_slices, alpha=alpha) for k in range(count)]
            )
            off = np.abs(residuals.e / residuals.y - true)
            miss |= off > radius + 1e-12
            if m < num_slices:
                assert (radius > 0).all()
                miss_naive |= off > 1.96 * np.sqrt(residuals.ee_rows * (1 - m / num_slices)) / residuals.y
        missed.append(miss.mean())
        naive.append(miss_naive.mean())
        assert (radius == 0).all()  # everything was seen
    # The plans of a world share its slices, so the spread between worlds counts too.
    spread = 3 * np.std(missed) / math.sqrt(worlds)
    assert np.mean(missed) <= alpha + max(spread, 3 * math.sqrt(alpha / (worlds * count)))
    assert np.mean(naive) > alpha  # the simulation can tell a valid radius from an invalid one


def test_too_few_slices_say_nothing():
    one = Residuals.of_slice(np.array([[0.1, -0.1]]), np.ones(2))
    sums = RaceSums(MIN_SLICES - 1, None, one, one, 0, 0)
    assert residual_radius(one, sums, 0, num_slices=100, alpha=0.05) == math.inf


# A model: estimates against an exact evaluation of the whole window.


@pytest.fixture
def small(small_config):
    """A job in 32 slices with its profile, and a function that races plans on some of them."""
    job = open_job(small_config("traffic.batch_size=188"))
    workers, window = LocalWorkers(job.spec, job.adapter), job.window("search")
    profile = measure_profile(workers, window, job.columns, by_group=False, batches_per_task=4).profile

    def lap(plans, slices):
        slices = tuple(map(int, slices))
        task = RaceTask(tuple(plans), job.columns, slices, ((0,),) * len(slices), (1,) * len(slices), "small")
        return next(workers.run(window, [task])).sums

    return job, workers, window, profile, lap


def random_plans(job, count, precisions=TABLE_PRECISIONS, seed=0):
    picks = np.random.default_rng(seed).integers(0, len(precisions), (count, len(job.units)))
    return [Plan({u.name: precisions[k] for u, k in zip(job.units, row, strict=True)}) for row in picks]


def test_after_all_slices_an_estimate_is_the_exact_evaluation(small):
    job, workers, window, profile, lap = small
    plans = [*random_plans(job, 6), Plan.uniform(job.units, Precision.FP32)]
    exact = evaluate_plans(workers, window, plans, confidence=0.95, batches_per_task=3)
    order = np.random.default_rng(1).permutation(window.num_batches)
    found = estimates(lap(plans, order), profile, plans, num_slices=len(order), confidence=0.95)
    for estimate, metrics in zip(found, exact.metrics, strict=True):
        assert estimate.metrics.gap_pct == pytest.approx(metrics.gap_pct, rel=1e-6, abs=1e-9)
        assert estimate.metrics.kl_pct == pytest.approx(metrics.kl_pct, rel=1e-6, abs=1e-9)
        assert estimate.on_window.lower == estimate.on_window.upper == estimate.metrics.gap_pct
        assert estimate.metrics.num_exact == metrics.num_examples == window.num_rows
        assert (estimate.metrics.looks, metrics.looks) == ("repeated", "once")
        assert estimate.metrics.auc_plan == pytest.approx(metrics.auc_plan)
        # A sequence instead of bounds of one look; blocks are other blocks than the profile's.
        width = metrics.gap_interval_pct.upper - metrics.gap_interval_pct.lower
        own = estimate.metrics.gap_interval_pct
        assert own.upper - own.lower == pytest.approx(3.04 / 1.645 * width, rel=0.5)
    assert (found[-1].metrics.gap_interval_pct.lower, found[-1].metrics.gap_interval_pct.upper) == (0, 0)


def test_after_a_part_an_estimate_covers_the_gap_of_the_whole_window(small):
    job, workers, window, profile, lap = small
    plans = random_plans(job, 12)
    exact = evaluate_plans(workers, window, plans, confidence=0.95, batches_per_task=3).metrics
    single = [lap(plans, [k]) for k in range(window.num_batches)]
    rng, orders, missed, errors, naive_errors = np.random.default_rng(2), 40, [], [], []
    for _ in range(orders):
        order = rng.permutation(window.num_batches)
        sums = single[order[0]]
        for k in order[1:12]:
            sums = sums + single[k]
        for k, estimate in enumerate(estimates(sums, profile, plans, num_slices=len(order), confidence=0.95)):
            assert estimate.metrics.num_examples == window.num_rows > 2 * estimate.metrics.num_exact
            missed.append(not estimate.on_window.lower <= exact[k].gap_pct <= estimate.on_window.upper)
            errors.append(estimate.metrics.gap_pct - exact[k].gap_pct)
            naive_errors.append(sums.exact.metrics(k, confidence=0.95).gap_pct - exact[k].gap_pct)
    # RESIDUAL_SHARE of 5 percent is 0.5 percent; plans of one order are not independent, so orders are counted.
    assert np.mean(missed) <= allowed(0.005, orders)
    # Unbiased, plan by plan; a ratio has a bias, far smaller than its deviation.
    by_plan = np.reshape(errors, (orders, len(plans)))
    assert (np.abs(by_plan.mean(axis=0)) < 4.5 * by_plan.std(axis=0) / math.sqrt(orders)).all()
    assert np.std(errors) < np.std(naive_errors) / 3  # the profile helps


def test_the_kl_gap_is_estimated_like_the_gap(small):
    job, workers, window, profile, lap = small
    plans = random_plans(job, 8)
    exact = evaluate_plans(workers, window, plans, confidence=0.95, batches_per_task=3).metrics
    order = np.random.default_rng(3).permutation(window.num_batches)[:16]
    for estimate, metrics in zip(
        estimates(lap(plans, order), profile, plans, num_slices=window.num_batches, confidence=0.95),
        exact,
        strict=True,
    ):
        found = estimate.metrics
        assert found.kl_interval_pct.lower <= metrics.kl_pct <= found.kl_interval_pct.upper
        assert found.kl_pct == pytest.approx(metrics.kl_pct, rel=0.25)
        assert found.ne_ref == pytest.approx(metrics.ne_ref)
        assert found.ne_plan == pytest.approx(found.ne_ref * (1 + found.gap_pct / 100))
        assert found.calibration_ref == pytest.approx(metrics.calibration_ref)
        assert found.calibration_plan == pytest.approx(metrics.calibration_plan, rel=0.1)


# Traffic: how often a plan is certified whose true gap is right at the budget.


def drawn_window(rng, num_plans, n, *, kind, skew=0.6):
    """Examples of a kind of traffic, and their expected mean loss change over labels and signs of s."""
    scale, num_groups = 0.06, n // 15
    z = rng.normal(-1, 1, n)
    groups = None
    if kind == "groups":
        # A few users make most of the traffic, and a plan changes all examples of a user alike.
        share = rng.lognormal(0, skew, num_groups)
        groups = rng.choice(num_groups, n, p=share / share.sum())
    s = scale * rng.standard_t(4 if kind != "heavy" else 2.5, (num_plans, n))
    logit = z.copy()
    if kind == "groups":
        s = 0.3 * s + scale * rng.choice([-1.0, 1.0], (num_plans, num_groups))[:, groups]
        logit += 3 * rng.normal(size=num_groups)[groups]
    if kind == "shifted":
        logit -= 0.4 + 0.3 * z
    if kind == "blocks":
        block = np.arange(n) * 20 // n
        s = s * 0.3 + scale * rng.choice([-1.0, 1.0], (num_plans, 20))[:, block]
        logit += 1.5 * rng.normal(size=20)[block]
    labels = np.zeros(n) if kind == "one class" else (rng.random(n) < sigmoid(logit)).astype(float)
    exact = s + 0.05 * scale * rng.normal(size=s.shape)
    # s is symmetric and independent of the labels: half of exp. change at s and -s is its expectation, label or not.
    curved = 0.5 * (softplus(z + exact) + softplus(z - exact)) - softplus(z)
    return z, s, exact, labels, groups, float(curved.mean())


def loss_of_reference(rng, kind, n=400_000):
    """The expected loss of an example."""
    z = rng.normal(-1, 1, n)
    noise = rng.normal(size=n)
    logit = {"groups": z + 3 * noise, "shifted": z - 0.4 - 0.3 * z, "blocks": z + 1.5 * noise}.get(kind, z)
    p = np.zeros(n) if kind == "one class" else sigmoid(logit)
    return float((softplus(z) - p * z).mean())


def certified_rate(toy, kind, *, seed, windows=8, num_plans=30, use_groups=True, confidence=0.95):
    """The share of (window, plan) that are ever certified at their true gap, and that ever have an interval."""
    rng, n = np.random.default_rng(seed), 6000 if kind == "groups" else 2400
    drawn = [drawn_window(rng, num_plans, n, kind=kind) for _ in range(windows)]
    truth = 100 * np.mean([d[-1] for d in drawn]) / loss_of_reference(rng, kind)
    certified, known = [], []
    for z, s, exact, labels, groups, _ in drawn:
        world = toy(num_plans).fill(
            z, s, labels, exact=exact, groups=groups if use_groups else None, batch_size=n // 24
        )
        plans = [world.plan(k) for k in range(num_plans)]
        profile, order, sums, begun = world.measure(), rng.permutation(world.num_batches), None, 0
        ever, finite = np.zeros(num_plans, bool), np.zeros(num_plans, bool)
        for seen in laps(len(order)):
            lap = world.lap(plans, order[begun:seen])
            sums, begun = lap if sums is None else sums + lap, seen
            found = estimates(sums, profile, plans, num_slices=len(order), confidence=confidence)
            ever |= [e.metrics.verdict(truth) == "certified" for e in found]
            finite |= [math.isfinite(e.metrics.gap_interval_pct.upper) for e in found]
        certified += list(ever)
        known += list(finite)
    return np.mean(certified), np.mean(known)


@pytest.mark.parametrize("kind", ["plain", "groups", "heavy", "shifted", "blocks"])
def test_a_plan_right_at_the_budget_is_rarely_certified(toy, kind):
    alpha = 0.1
    rate, known = certified_rate(toy, kind, seed=4, confidence=1 - alpha)
    assert rate <= allowed(alpha, 8 * 30)
    assert known > 0.5  # there was an interval to certify by


def test_without_its_groups_grouped_traffic_would_be_certified_too_often(toy):
    rate, _ = certified_rate(toy, "groups", seed=4, confidence=0.9, use_groups=False)
    assert rate > allowed(0.1, 8 * 30)


def widths(world, plans, order, seen):
    found = estimates(world.lap(plans, order[:seen]), world.measure(), plans, num_slices=len(order), confidence=0.95)
    return np.array([e.metrics.gap_interval_pct.upper - e.metrics.gap_interval_pct.lower for e in found]), found


@pytest.mark.parametrize("seen", [16, 40])
def test_very_unequal_groups_widen_the_interval(toy, seen):
    rng, num_plans, n = np.random.default_rng(5), 10, 12_000
    z, s, exact, labels, groups, _ = drawn_window(rng, num_plans, n, kind="groups", skew=0.8)
    sizes = np.bincount(groups)
    assert sizes.max() > 8 * np.median(sizes[sizes > 0])
    order = rng.permutation(40)
    by = {}
    for name, key in {"rows": None, "each": np.arange(n), "groups": groups}.items():
        world = toy(num_plans).fill(z, s, labels, exact=exact, groups=key, batch_size=n // 40)
        by[name], _ = widths(world, [world.plan(k) for k in range(num_plans)], order, seen)
    assert np.isfinite(by["groups"]).all()
    assert (by["groups"] > 1.5 * by["rows"]).all()
    # A group for each row is no other evidence than rows.
    np.testing.assert_allclose(by["each"], by["rows"], rtol=0.25)


def test_a_change_that_few_examples_carry_has_no_interval(toy):
    """One example in 400 is changed: the sample of the first laps has too few of them to go by."""
    rng, n = np.random.default_rng(6), 4000
    z = rng.normal(-1, 1, n)
    s = np.where(rng.random((5, n)) < 1 / 400, 1.0, 0.0)
    world = toy(5).fill(z, s, rng.random(n) < sigmoid(z), batch_size=100)
    plans = [world.plan(k) for k in range(5)]
    for seen in (8, 18, 40):
        found, _ = widths(world, plans, rng.permutation(40), seen)
        assert np.isinf(found).all()


def test_a_window_with_one_class_has_a_gap_but_no_entropy(toy):
    rng = np.random.default_rng(7)
    z, s, exact, labels, _, _ = drawn_window(rng, 4, 4000, kind="one class")
    world = toy(4).fill(z, s, labels, exact=exact)
    plans, order = [world.plan(k) for k in range(4)], rng.permutation(40)
    whole = world.lap(plans, order).exact
    for seen in (12, 40):
        _, found = widths(world, plans, order, seen)
        for k, estimate in enumerate(found):
            m = estimate.metrics
            assert math.isnan(m.ne_ref) and math.isnan(m.ne_plan) and math.isnan(m.auc_ref)
            assert estimate.on_window.lower <= whole.metrics(k, confidence=0.9).gap_pct <= estimate.on_window.upper
            assert math.isfinite(m.gap_interval_pct.upper) and m.warnings()
            assert type(m).from_dict(m.to_dict()).gap_pct == m.gap_pct


def test_a_badly_calibrated_reference_is_found_out(toy):
    """All logits too high by 0.4 + 0.3 z: the shrinkage finds both, and its sums are nearer to the truth."""
    rng, num_plans, n = np.random.default_rng(8), 20, 8000
    z = rng.normal(-1, 1, n)
    labels = rng.random(n) < sigmoid(0.7 * z - 0.4)
    # Every column raises logits, and those of high ones more: which a reference that is too high does not forgive.
    s = 0.03 * (1 + 0.5 * z + rng.normal(size=(num_plans, n)))
    world = toy(num_plans).fill(z, s, labels, batch_size=200)
    profile = world.measure()
    first = shrunk_first_order(profile)
    assert first.shift == pytest.approx(0.4, abs=0.15) and first.scale == pytest.approx(0.3, abs=0.1)
    assert first.shift_kept > 0.9 and first.scale_kept > 0.9
    expected = s @ (sigmoid(z) - sigmoid(0.7 * z - 0.4))
    error = np.abs(first.sums - expected).mean()
    assert error < np.abs(expected).mean() / 5
    assert error < np.abs(profile.first[:num_plans] - expected).mean()


def test_slices_without_any_label_say_nothing(toy):
    """Labels that come late: the slices of the first lap may have none."""
    rng = np.random.default_rng(9)
    z, s, exact, labels, _, _ = drawn_window(rng, 3, 4000, kind="plain")
    labels[2000:] = np.nan
    world = toy(3).fill(z, s, labels, exact=exact, batch_size=100)
    plans = [world.plan(k) for k in range(3)]
    _, found = widths(world, plans, np.arange(40)[::-1], 12)
    for estimate in found:
        assert estimate.metrics.verdict(0.5) == "inconclusive"
