"""First-order sums keep what the reference model gets wrong and lose what is label noise."""

import math

import numpy as np
import pytest

from lowprec.evaluation.profile.profile import BlockSums, Profile
from lowprec.evaluation.stats.second_moment import DenseMoment, SketchedMoment
from lowprec.plan import Precision
from lowprec.search.surrogate.shrinkage import shrunk_first_order

BUCKETS = 2048


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def profile_of(z, s, y, kind="dense", rng=None):
    """The profile of examples with logits z [N], logit changes s [K, N] and labels y [N]."""
    columns = tuple((f"table:{k}", Precision.INT4) for k in range(len(s)))
    p = sigmoid(z)
    loss = -np.where(y == 1, np.log(p), np.log1p(-p))
    v = np.concatenate([s, np.ones((1, len(z))), z[None]]).astype(np.float32)
    terms = np.concatenate([v * (p - y), loss[None]]).astype(np.float32)
    ones = np.ones(len(z))
    if kind == "dense":
        second, evidence = DenseMoment.of(v, p * (1 - p)), DenseMoment.of(terms, ones)
    else:
        keys = rng.integers(0, 2**63, len(z)).astype(np.uint64)
        second = SketchedMoment.of(v, p * (1 - p), keys, BUCKETS, by_group=False)
        evidence = SketchedMoment.of(terms, ones, keys, BUCKETS // 4, by_group=kind == "groups")
        if kind == "groups":
            second = DenseMoment.of(v, p * (1 - p))
    first = (v.astype(float) * (p - y)).sum(axis=1)
    entropy = float((-p * np.log(p) - (1 - p) * np.log1p(-p)).sum())
    sums = float(len(z)), float(y.sum()), float(p.sum()), float(loss.sum()), entropy
    block = BlockSums(len(z), 0, *sums, first, second)
    return Profile(columns, (block,), evidence)


def draw(rng, num_rows, num_columns, *, shift=0.0, scale=0.0, base=-1.0):
    """Logits that are too high by shift + scale z, changes that lean on logits, labels, and the true probabilities."""
    z = rng.normal(base, 1, num_rows)
    lean = rng.normal(size=(num_columns, 1))
    s = 0.03 * (rng.normal(size=(num_columns, num_rows)) + 0.5 + 0.3 * lean * (z - base))
    truth = sigmoid(z - shift - scale * z)
    return z, s, (rng.random(num_rows) < truth).astype(float), truth


@pytest.mark.parametrize("kind", ["dense", "sketch", "groups"])
@pytest.mark.parametrize("num_columns", [1, 25])
def test_of_a_calibrated_reference_nearly_nothing_is_kept(kind, num_columns):
    rng, runs = np.random.default_rng(0), 80
    rest, size, raw = [], [], []
    for _ in range(runs):
        z, s, y, _ = draw(rng, 2000, num_columns)
        profile = profile_of(z, s, y, kind, rng)
        found = shrunk_first_order(profile)
        rest.append(found.rest_kept)
        errors = np.sqrt(profile.second.diagonal[:num_columns])
        size.append(np.square(found.sums / errors).mean())
        raw.append(np.square(profile.first[:num_columns] / errors).mean())
        assert found.sums.shape == (num_columns,)
    # Three deviations of a chi-squared statistic: rarely passed, a little more often by its long tail.
    assert np.mean(np.array(rest) > 0) <= 0.03 + 3 * math.sqrt(0.03 * 0.97 / runs)
    assert np.mean(raw) == pytest.approx(1, abs=0.3)  # in the mean square of its own error
    assert np.mean(size) < 0.35 * np.mean(raw)


@pytest.mark.parametrize("kind", ["dense", "groups"])
@pytest.mark.parametrize(("shift", "scale"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.15), (-0.2, 0.1), (0.1, -0.1)])
def test_a_shift_and_a_scale_are_found_within_their_errors(kind, shift, scale):
    rng, runs, n = np.random.default_rng(1), 50, 5000
    deviations = []
    for _ in range(runs):
        z, s, y, truth = draw(rng, n, 6, shift=shift, scale=scale)
        found = shrunk_first_order(profile_of(z, s, y, kind, rng))
        h = sigmoid(z) * (1 - sigmoid(z))
        ahead = np.stack([np.ones(n), z])
        inverse = np.linalg.inv((ahead * h) @ ahead.T)
        # What one step of Newton's method would find without noise, with the covariance of that step.
        aim = inverse @ (ahead @ (sigmoid(z) - truth))
        covariance = inverse @ ((ahead * truth * (1 - truth)) @ ahead.T) @ inverse
        off = np.array([found.shift, found.scale]) - aim
        deviations.append(off / np.sqrt(np.diag(covariance)))
        assert 0 <= found.shift_kept <= 1 and 0 <= found.scale_kept <= 1
    # Where the truth is about 3 errors from zero, dropping what may be noise costs most: a mean square error of 5 (by
    # simulation of a normal value), known here to within about a fifth.
    assert np.square(deviations).mean() < 5.0 + 1.0
    if shift == scale == 0:
        assert np.square(deviations).mean() < 0.3  # without shrinkage it would be 1


def test_a_shift_and_a_scale_imply_the_first_order_sums():
    rng, num_columns, errors, raw = np.random.default_rng(2), 30, [], []
    for _ in range(30):
        z, s, y, truth = draw(rng, 20_000, num_columns, shift=0.2, scale=0.1)
        profile = profile_of(z, s, y)
        found, expected = shrunk_first_order(profile), s @ (sigmoid(z) - truth)
        implied = profile.second.columns(num_columns)[:num_columns] @ [found.shift, found.scale]
        if found.rest_kept == 0:
            np.testing.assert_allclose(found.sums, implied, rtol=1e-6, atol=1e-9)
        noise = np.sqrt(profile.evidence.diagonal[:num_columns])
        errors.append(np.square((found.sums - expected) / noise).mean())
        raw.append(np.square((profile.first[:num_columns] - expected) / noise).mean())
    # Thirty sums are told by two numbers, and the part of the noise that lies in their direction is all that is left.
    assert np.mean(raw) == pytest.approx(1, abs=0.25)
    assert np.mean(errors) < 0.5 * np.mean(raw)


def test_what_is_real_is_kept_the_more_the_more_data_says_so():
    """The reference misses something that the columns know of: no shift or scale explains it."""
    rng, kept = np.random.default_rng(3), []
    for n in (500, 4000, 32_000, 128_000):
        z, s, _, _ = draw(rng, n, 10)
        truth = sigmoid(z + 0.15 * (s - s.mean(axis=1)[:, None])[:5].sum(axis=0) / 0.03)
        profile = profile_of(z, s, (rng.random(n) < truth).astype(float))
        found = shrunk_first_order(profile)
        kept.append(found.rest_kept)
    assert kept[0] < 0.5 and kept == sorted(kept) and kept[-1] > 0.9
    # With much data the shrunk sums are the measured ones, also where they are negative.
    np.testing.assert_allclose(found.sums[:5], profile.first[:5], rtol=0.1)
    assert (found.sums[:5] < 0).all()


def test_too_little_is_kept_rather_than_too_much():
    """Between noise and certainty the share that is kept is below that of the best linear estimate."""
    rng, shares, best = np.random.default_rng(4), [], []
    for _ in range(60):
        z, s, _, _ = draw(rng, 3000, 40)
        effect = 0.06 * rng.normal(size=40)
        truth = sigmoid(z + effect @ (s - s.mean(axis=1)[:, None]) / 0.03)
        profile = profile_of(z, s, (rng.random(3000) < truth).astype(float))
        expected = s @ (sigmoid(z) - truth)
        shares.append(shrunk_first_order(profile).rest_kept)
        signal = np.square(expected / np.sqrt(profile.evidence.diagonal[:40])).mean()
        best.append(signal / (1 + signal))
    assert 0.05 < np.mean(shares) < np.mean(best)


@pytest.mark.parametrize("kind", ["dense", "sketch", "groups"])
def test_nothing_to_shrink(kind):
    rng = np.random.default_rng(5)
    z, s, y, _ = draw(rng, 500, 3)
    none = shrunk_first_order(profile_of(z, s[:0], y, kind, rng))
    assert none.sums.shape == (0,) and none.rest_kept == 0
    empty = shrunk_first_order(profile_of(z[:0], s[:, :0], y[:0], kind, rng))
    assert empty.sums.tolist() == [0, 0, 0] and empty.shift == empty.scale == empty.rest_kept == 0


@pytest.mark.parametrize("kind", ["dense", "sketch", "groups"])
def test_columns_that_were_never_looked_up_stay_zero(kind):
    rng = np.random.default_rng(6)
    z, s, y, _ = draw(rng, 3000, 6, shift=0.3)
    s[[1, 4]] = 0
    found = shrunk_first_order(profile_of(z, s, y, kind, rng))
    others = shrunk_first_order(profile_of(z, s[[0, 2, 3, 5]], y, kind, np.random.default_rng(7)))
    assert np.isfinite(found.sums).all() and found.sums[1] == found.sums[4] == 0
    if kind == "dense":
        np.testing.assert_allclose(found.sums[[0, 2, 3, 5]], others.sums, rtol=1e-4)
    nothing = shrunk_first_order(profile_of(z, 0 * s, y, kind, rng))
    assert not nothing.sums.any() and nothing.rest_kept == 0


def test_one_class_and_equal_logits_do_not_crash():
    rng = np.random.default_rng(8)
    z, s, _, _ = draw(rng, 2000, 4)
    for logits in (z, np.full(2000, -2.0)):
        found = shrunk_first_order(profile_of(logits, s, np.zeros(2000)))
        assert np.isfinite(found.sums).all() and math.isfinite(found.shift) and math.isfinite(found.scale)
    # No positive label at all: the reference is too high.
    assert shrunk_first_order(profile_of(z, s, np.zeros(2000))).shift_kept > 0.9


def test_copies_of_a_column_are_no_more_evidence():
    """Columns that are one and the same vary together: the statistic's own spread must say so."""
    rng, runs, kept = np.random.default_rng(9), 300, []
    for _ in range(runs):
        z, s, y, _ = draw(rng, 1000, 1)
        kept.append(shrunk_first_order(profile_of(z, np.repeat(s, 30, axis=0), y)).rest_kept)
    # One squared normal value above 1 + 3 sqrt(2) has a chance of 2.2 percent.
    assert np.mean(np.array(kept) > 0) <= 0.022 + 3 * math.sqrt(0.022 / runs)


@pytest.mark.parametrize("kind", ["dense", "sketch", "groups"])
@pytest.mark.parametrize("base", [-2.5, -4.5])
def test_a_low_label_rate_does_not_mix_shift_and_scale_into_wrong_sums(kind, base):
    """At a rate of some 2 percent shift and scale are nearly one direction, of which a sketch knows less."""
    rng, errors = np.random.default_rng(10), []
    for _ in range(6):
        z, s, y, truth = draw(rng, 40_000, 10, shift=0.3, base=base)
        expected = s @ (sigmoid(z) - truth)
        found = shrunk_first_order(profile_of(z, s, y, kind, rng))
        errors.append(np.abs(found.sums - expected).mean() / np.abs(expected).mean())
    assert np.mean(errors) < 0.2
