"""What is called drift: the test against windows whose blocks vary, and what is counted of new ids."""

import math

import numpy as np
import pytest

from lowprec.monitor.inputs.counts import IdCounts, InputCounts, Inputs, Touched
from lowprec.monitor.inputs.drift import DriftRule, Novelty, block_test, discoveries, feature_drift, js_distance
from lowprec.monitor.inputs.normal_drift import History
from lowprec.traffic import Schema, SparseFeature

RULE = DriftRule(false_discovery_rate=0.01, min_distance=0.1)


def blocks(rng, shares, num_blocks=20, size=4000, varies=0.0):
    """Counts of blocks, whose own shares vary around `shares` by a Dirichlet law."""
    alike = np.broadcast_to(shares, (num_blocks, len(shares)))
    own = rng.dirichlet(shares / varies, num_blocks) if varies else alike
    return np.array([rng.multinomial(size, p) for p in own])


def zipf(num, exponent=1.1):
    weights = 1 / np.arange(1, num + 1) ** exponent
    return weights / weights.sum()


@pytest.mark.parametrize("varies", [0.0, 0.002])
@pytest.mark.parametrize("after, size", [(20, 4000), (7, 4000), (20, 300), (5, 300), (20, 40_000)])
def test_p_values_are_uniform_where_blocks_are_alike(varies, after, size):
    rng = np.random.default_rng(0)
    p_values = [
        block_test(
            blocks(rng, zipf(64), varies=varies),
            blocks(rng, zipf(64), num_blocks=after, size=size, varies=varies),
        )
        for _ in range(300)
    ]
    for level in (0.01, 0.05, 0.2, 0.5):
        share = np.mean(np.array(p_values) <= level)
        assert abs(share - level) <= 3.5 * math.sqrt(level * (1 - level) / 300) + 0.003


def test_a_naive_test_would_take_the_variation_of_blocks_for_drift():
    # The same blocks by a chi-squared test that takes rows for independent: nearly always "drift".
    rng = np.random.default_rng(1)
    rejected = 0
    for _ in range(50):
        a, b = (blocks(rng, zipf(64), varies=0.002).sum(axis=0) for _ in range(2))
        used = (a + b) > 0
        expected = (a + b)[used] / 2
        statistic = ((a[used] - expected) ** 2 / expected + (b[used] - expected) ** 2 / expected).sum()
        rejected += statistic > used.sum() + 4 * math.sqrt(2 * used.sum())
    assert rejected >= 45


def test_drift_is_found():
    rng = np.random.default_rng(2)
    moved = zipf(64)[::-1] * 0.2 + zipf(64) * 0.8
    assert block_test(blocks(rng, zipf(64), varies=0.002), blocks(rng, moved, varies=0.002)) < 1e-4


def test_few_blocks_cannot_say_much():
    rng = np.random.default_rng(3)
    before, after = blocks(rng, zipf(64)), blocks(rng, zipf(64)[::-1], num_blocks=1)
    assert block_test(before, after) == pytest.approx(1 / 21, rel=0.15)
    assert block_test(before, np.zeros((20, 64), np.int64)) == 1


def test_js_distance_of_equal_laws_is_near_zero_whatever_the_sizes():
    rng = np.random.default_rng(4)
    shares = zipf(1000)
    found = [js_distance(rng.multinomial(50_000, shares), rng.multinomial(n, shares)) for n in (2000, 20_000, 200_000)]
    assert max(found) < 0.06
    assert js_distance(np.array([5, 0]), np.array([0, 9])) == pytest.approx(1, abs=0.15)
    assert math.isnan(js_distance(np.array([0, 0]), np.array([1, 1])))


def test_false_discoveries_keep_their_rate():
    rng = np.random.default_rng(5)
    shares = []
    for _ in range(400):
        null, real = rng.uniform(size=80), rng.uniform(size=20) * 1e-4
        found = discoveries([*null, *real], 0.1)
        shares.append(sum(found[:80]) / max(sum(found), 1))
        assert sum(found[80:]) >= 18
    assert np.mean(shares) <= 0.1 * 80 / 100 + 3 * np.std(shares) / 20
    assert discoveries([], 0.1) == []


def test_unseen_ids_are_estimated_without_bias_where_ids_share_bits(monkeypatch):
    monkeypatch.setattr("lowprec.monitor.inputs.counts.TOUCHED_BITS", 4096)
    schema = Schema(label="label", dense=(), sparse=(SparseFeature("item", "item", 10**9),))
    known, touched = Inputs(schema, 4), {"item": Touched(10**9)}
    old = IdCounts(np.arange(2000), np.full(2000, 5))
    known.add(0, InputCounts({"item": old}, {}))
    touched["item"].add(old.ids)
    assert 0.3 < touched["item"].fill < 0.5
    novelty = Novelty(known, touched, {"item": "table:item"})
    novelty.add({"item": IdCounts(np.arange(10**6, 10**6 + 3000), np.ones(3000, np.int64))})
    novelty.add({"item": IdCounts(np.arange(1000), np.full(1000, 9))})
    assert novelty.unseen("item") == pytest.approx(3000 / 12_000, abs=0.02)


def test_rows_that_another_feature_of_the_table_touched_are_not_new():
    schema = Schema(label="l", dense=(), sparse=(SparseFeature("a", "a", 100), SparseFeature("b", "b", 100)))
    known, touched = Inputs(schema, 1), {"a": Touched(100), "b": Touched(100)}
    touched["a"].add(np.array([1, 2]))
    novelty = Novelty(known, touched, {"a": "table:t", "b": "table:t"})
    novelty.add({"b": IdCounts(np.array([1, 50]), np.array([3, 1])), "a": IdCounts(np.array([1]), np.array([4]))})
    assert novelty.unseen("b") == 1
    assert novelty.untouched() == {"table:t": 1 / 8}
    # Id 1 is cold for a: touched, with hardly any lookup counted.
    assert novelty.cold("a") == 1


def test_features_are_named_that_moved_far_enough_and_no_others():
    rng = np.random.default_rng(6)
    schema = Schema(label="l", dense=("x",), sparse=tuple(SparseFeature(f"f{k}", f"f{k}", 200) for k in range(8)))
    certified, now = Inputs(schema, 20), Inputs(schema, 20)
    moved = zipf(200)[::-1] * 0.5 + zipf(200) * 0.5
    for k in range(8):
        certified.coarse[f"f{k}"] += blocks(rng, zipf(200), varies=0.001)
        now.coarse[f"f{k}"] += blocks(rng, moved if k == 3 else zipf(200), varies=0.001)
    certified.histograms["x"][:, 300] += 100
    now.histograms["x"][:, 300] += 100
    novelty = Novelty(certified, {f.name: Touched(200) for f in schema.sparse}, {})
    found = feature_drift(certified, now, novelty, RULE, History([], certified))
    assert [f.feature for f in found if f.is_warning] == ["f3"]
    assert found[0].feature == "f3" and found[0].distance > 0.3
    nothing = feature_drift(certified, now, novelty, DriftRule(0.01, 0.99), History([], certified))
    assert not any(f.is_warning for f in nothing)
    known = feature_drift(certified, now, novelty, DriftRule(0.01, 0.1, frozenset({"f3"})), History([], certified))
    assert [f.feature for f in known if f.is_expected] == ["f3"] and not any(f.is_warning for f in known)
    assert {f.feature for f in found} == {"x", *(f"f{k}" for k in range(8))}
    assert all("feature" in f.to_dict() for f in found)
