"""Sums of v v^T: exact where dense, and as far off as stated where sketched."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowprec.evaluation.stats.second_moment import DenseMoment, SketchedMoment, mixed

BUCKETS = 64


def draw(rng, num_directions, num_rows):
    """Directions that overlap a little, weights, and a key for each example."""
    common = rng.normal(size=num_rows)
    v = (rng.normal(size=(num_directions, num_rows)) + 0.3 * common).astype(np.float32)
    return v, rng.uniform(0, 2, num_rows), rng.integers(0, 2**63, num_rows).astype(np.uint64)


def moment(kind, v, weights, keys):
    if kind == "dense":
        return DenseMoment.of(v, weights)
    return SketchedMoment.of(v, weights, keys, BUCKETS, by_group=kind == "groups")


def arrays(found):
    if isinstance(found, DenseMoment):
        return [found.matrix]
    return [found.rows] if found.squares is None else [found.rows, found.squares]


def assert_same(left, right):
    assert type(left) is type(right) and len(arrays(left)) == len(arrays(right))
    for a, b in zip(arrays(left), arrays(right), strict=True):
        # Products of one batch are summed in float32: 300 terms of order 1 are good to about 1e-5.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@given(
    st.sampled_from(["dense", "examples", "groups"]),
    st.integers(1, 5),
    st.lists(st.integers(0, 100), min_size=3, max_size=3),
    st.integers(0, 10_000),
)
def test_adding_is_associative_and_commutative_and_parts_make_up_the_whole(kind, num_directions, sizes, seed):
    v, weights, keys = draw(np.random.default_rng(seed), num_directions, sum(sizes))
    if kind == "groups":
        keys = keys % np.uint64(7)  # groups that every part has
    ends = np.cumsum([0, *sizes])
    a, b, c = (moment(kind, v[:, i:j], weights[i:j], keys[i:j]) for i, j in pairwise(ends))
    assert_same((a + b) + c, a + (b + c))
    assert_same(a + b, b + a)
    assert_same(a + b + c, moment(kind, v, weights, keys))
    zero = (
        DenseMoment.zero(num_directions)
        if kind == "dense"
        else SketchedMoment.zero(num_directions, BUCKETS, by_group=kind == "groups")
    )
    assert_same(a + zero, a)


def test_dense_is_the_matrix():
    v, weights, _ = draw(np.random.default_rng(0), 4, 500)
    found, exact = DenseMoment.of(v, weights), (v * weights) @ v.T.astype(float)
    z = np.random.default_rng(1).normal(size=(3, 4))
    np.testing.assert_allclose(found.dense(), exact, rtol=1e-5)
    np.testing.assert_allclose(found.diagonal, np.diag(exact), rtol=1e-5)
    np.testing.assert_allclose(found.columns(2), exact[:, 2:], rtol=1e-5)
    np.testing.assert_allclose(found.quadratic(z), [row @ exact @ row for row in z], rtol=1e-5)
    correlations = exact / np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    among = np.array([True, False, True, True])
    kept = correlations[np.ix_(among, among)]
    assert found.squared_correlations(among) == pytest.approx((kept**2).sum(), rel=1e-5)
    assert found.relative_error == 0


@pytest.mark.parametrize(("by_group", "num_directions"), [(True, 6), (False, 6), (False, 40)])
def test_the_sketch_is_unbiased_with_its_stated_error(by_group, num_directions):
    """Many sketches of new examples under new keys, three random z for each."""
    rng, relative = np.random.default_rng(2), []
    for _ in range(200):
        v, weights, keys = draw(rng, num_directions, 2000)
        z = rng.normal(size=(3, num_directions))
        sketch = SketchedMoment.of(v, weights, keys, BUCKETS, by_group=by_group)
        relative += list(sketch.quadratic(z) / DenseMoment.of(v, weights).quadratic(z) - 1)
    stated = math.sqrt(2 / BUCKETS)
    assert sketch.relative_error == pytest.approx(stated)
    deviation = float(np.std(relative))
    # The three z of a sketch share its hashing, so the sketches are counted, not the z. The standard error of a
    # standard deviation over n draws is 1 / sqrt(2 n) of it.
    assert abs(np.mean(relative)) < 4 * deviation / math.sqrt(200)
    assert deviation < stated * (1 + 4 / math.sqrt(2 * 200))
    if by_group:
        assert deviation > stated * (1 - 4 / math.sqrt(2 * 200))
    else:
        assert deviation > stated / 4  # the diagonal alone does not make it exact


def test_the_diagonal_of_examples_is_exact_and_of_groups_estimated():
    v, weights, keys = draw(np.random.default_rng(3), 5, 3000)
    exact = DenseMoment.of(v, weights)
    by_example = SketchedMoment.of(v, weights, keys, BUCKETS, by_group=False)
    np.testing.assert_allclose(by_example.diagonal, exact.diagonal, rtol=1e-5)
    np.testing.assert_allclose(np.diag(by_example.dense()), exact.diagonal, rtol=1e-5)
    np.testing.assert_allclose(by_example.quadratic(np.eye(5)), exact.diagonal, rtol=1e-5)
    np.testing.assert_array_equal(by_example.columns(2), by_example.dense()[:, 2:])
    by_group = SketchedMoment.of(v, weights, keys, BUCKETS, by_group=True)
    assert np.abs(by_group.diagonal / exact.diagonal - 1).max() > 0.01
    np.testing.assert_array_equal(by_group.columns(3), by_group.dense()[:, 3:])


@pytest.mark.parametrize("one_group_share", [0.0, 0.5])
def test_groups_are_summed_before_they_are_squared(one_group_share):
    """The sum over groups of (sum v)(sum v)^T, also where one group has half of all examples."""
    rng, n, relative, of_examples = np.random.default_rng(4), 2000, [], []
    for _ in range(200):
        v, _, _ = draw(rng, 3, n)
        groups = np.where(rng.random(n) < one_group_share, 0, rng.integers(0, 500, n))
        v = (v + rng.normal(size=(3, 500))[:, groups]).astype(np.float32)
        keys = (groups + int(rng.integers(0, 2**40))).astype(np.uint64)
        sums = np.stack([np.bincount(groups, weights=row, minlength=500) for row in v])
        z = rng.normal(size=(1, 3))
        sketch = SketchedMoment.of(v, np.ones(n), keys, BUCKETS, by_group=True)
        exact = float(z[0] @ (sums @ sums.T) @ z[0])
        relative.append(sketch.quadratic(z)[0] / exact - 1)
        of_examples.append(DenseMoment.of(v, np.ones(n)).quadratic(z)[0] / exact - 1)
    deviation = float(np.std(relative))
    assert abs(np.mean(relative)) < 4 * deviation / math.sqrt(200)
    assert deviation < sketch.relative_error * (1 + 4 / math.sqrt(2 * 200))
    assert abs(np.mean(of_examples)) > 0.2  # counting examples would be far off


def test_a_single_group_is_known_exactly():
    v, _, _ = draw(np.random.default_rng(5), 3, 400)
    sketch = SketchedMoment.of(v, np.ones(400), np.full(400, 9, np.uint64), BUCKETS, by_group=True)
    total = v.sum(axis=1).astype(float)
    np.testing.assert_allclose(sketch.dense(), np.outer(total, total), rtol=1e-4)


def test_squared_correlations_are_too_high_by_what_is_stated():
    rng, d, excess = np.random.default_rng(6), 20, []
    for _ in range(100):
        v, weights, keys = draw(rng, d, 3000)
        sketch = SketchedMoment.of(v, weights, keys, BUCKETS, by_group=False)
        among = np.ones(d, dtype=bool)
        excess.append(sketch.squared_correlations(among) - DenseMoment.of(v, weights).squared_correlations(among))
    assert np.mean(excess) == pytest.approx(d**2 / BUCKETS, rel=0.3)


def test_the_stated_error_holds_where_directions_cancel():
    """Such as a scale of the logits made orthogonal to their shift: the diagonal part is then what the error is of."""
    rng, relative, z = np.random.default_rng(7), [], np.ones((1, 2))
    for _ in range(100):
        v, weights, keys = draw(rng, 2, 2000)
        v[1] = -v[0] + 0.1 * v[1]
        sketch = SketchedMoment.of(v, weights, keys, BUCKETS, by_group=False)
        exact = DenseMoment.of(v, weights)
        value = exact.quadratic(z)[0]
        relative.append((sketch.quadratic(z)[0] - value) / (value + np.square(z[0]) @ exact.diagonal))
    assert np.std(relative) < sketch.relative_error * (1 + 4 / math.sqrt(2 * 100))


def test_neighbouring_keys_give_unrelated_bits():
    hashed = mixed(np.arange(20_000, dtype=np.uint64))
    counts = np.bincount((hashed % np.uint64(BUCKETS)).astype(int), minlength=BUCKETS)
    expected = 20_000 / BUCKETS
    assert ((counts - expected) ** 2 / expected).sum() < BUCKETS + 5 * math.sqrt(2 * BUCKETS)
    signs = (hashed >> np.uint64(63)).astype(int)
    assert abs(signs.mean() - 0.5) < 4 * 0.5 / math.sqrt(20_000)
    # The sign says nothing of the bucket.
    assert abs(np.corrcoef(signs, (hashed % np.uint64(2)).astype(int))[0, 1]) < 4 / math.sqrt(20_000)
    assert len(np.unique(hashed)) == 20_000
