"""Counts of inputs: the same whoever adds them up, and read back as they were written."""

import numpy as np
import pytest

from lowprec.monitor.inputs.counts import (
    COARSE_BUCKETS,
    DENSE_BINS,
    FINE_BUCKETS,
    TOUCHED_BITS,
    Buckets,
    Inputs,
    Touched,
    counts_of,
    dense_quantile,
)
from lowprec.traffic import Schema, SparseFeature
from lowprec.traffic.batch import Bags, Batch

SCHEMA = Schema(
    label="label",
    dense=("age", "price"),
    sparse=(SparseFeature("item", "item", 500), SparseFeature("word", "word", 10**9)),
)


def batch(rng, num_rows=200):
    lengths = rng.integers(0, 4, num_rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Batch(
        index=0,
        labels=np.zeros(num_rows, np.float32),
        dense=rng.normal(size=(num_rows, 2)).astype(np.float32),
        sparse={
            "item": Bags(rng.integers(0, 500, num_rows), np.arange(num_rows + 1)),
            "word": Bags(rng.integers(0, 10**9, int(offsets[-1])), offsets),
        },
        times=np.arange(num_rows),
    )


def filled(batches, order):
    inputs = Inputs(SCHEMA, 4)
    for k in order:
        inputs.add(k % 4, counts_of(batches[k], SCHEMA.dense))
    return inputs


def same(a, b):
    left, right = a.to_arrays(), b.to_arrays()
    return left.keys() == right.keys() and all(np.array_equal(left[k], right[k]) for k in left)


def test_the_order_of_batches_changes_nothing():
    rng = np.random.default_rng(0)
    batches = [batch(rng) for _ in range(8)]
    assert same(filled(batches, range(8)), filled(batches, reversed(range(8))))


def test_counts_of_parts_add_up_to_those_of_the_whole():
    whole = batch(np.random.default_rng(1))
    parts = [counts_of(whole.part(k, 3), SCHEMA.dense) for k in range(3)]
    together, at_once = parts[0] + parts[1] + parts[2], counts_of(whole, SCHEMA.dense)
    for name, found in at_once.sparse.items():
        assert np.array_equal(found.ids, together.sparse[name].ids)
        assert np.array_equal(found.counts, together.sparse[name].counts)
        assert (found.num_bags, found.num_empty) == (together.sparse[name].num_bags, together.sparse[name].num_empty)
    assert found.num_empty == (np.diff(whole.sparse["word"].offsets) == 0).sum()
    for name, histogram in at_once.dense.items():
        assert np.array_equal(histogram.counts, together.dense[name].counts)


def test_ids_are_counted_in_full():
    rng = np.random.default_rng(2)
    one = batch(rng)
    inputs = filled([one], [0])
    assert np.array_equal(inputs.fine["item"], np.bincount(one.sparse["item"].values, minlength=500))
    assert inputs.fine["word"].sum() == inputs.coarse["word"].sum() == len(one.sparse["word"].values)
    assert inputs.fine["word"].shape == (FINE_BUCKETS,) and inputs.coarse["word"].shape == (4, COARSE_BUCKETS)


def test_what_is_written_reads_back_and_other_features_are_refused():
    written = filled([batch(np.random.default_rng(3))], [0])
    again = Inputs(SCHEMA, 4)
    again.fill(written.to_arrays())
    assert same(written, again) and again.num_bags == written.num_bags
    with pytest.raises(ValueError, match="shape"):
        Inputs(Schema(label="label", dense=("age", "price"), sparse=(SparseFeature("item", "item", 400),)), 4).fill(
            written.to_arrays()
        )
    with pytest.raises(KeyError):
        Inputs(Schema(label="label", dense=(), sparse=(SparseFeature("other", "other", 500),)), 4).fill(
            written.to_arrays()
        )


@pytest.mark.parametrize("sign", [1, -1])
def test_quantiles_are_near_those_of_the_values(sign):
    values = (sign * np.random.default_rng(4).lognormal(3, 2, 50_000)).astype(np.float32)
    histogram = counts_of(
        Batch(0, np.zeros(50_000, np.float32), np.stack([values, values], 1), {}, np.arange(50_000)), ("age", "price")
    ).dense["age"]
    for q in (0.05, 0.5, 0.95):
        assert dense_quantile(histogram.counts, q) == pytest.approx(np.quantile(values, q), rel=0.06)


def test_zero_and_the_largest_values_have_bins_of_their_own():
    values = np.array([[0.0], [1e30], [-1e30], [1e-30]], np.float32)
    found = counts_of(Batch(0, np.zeros(4, np.float32), values, {}, np.arange(4)), ("age",)).dense["age"].counts
    assert found.sum() == 4
    assert found[DENSE_BINS // 2] == 1 and found[-1] == 1 and found[0] == 1 and found[DENSE_BINS // 2 + 1] == 1
    assert dense_quantile(np.zeros(DENSE_BINS, np.int64), 0.5) != dense_quantile(found, 0.5)


def test_ids_of_small_tables_have_places_of_their_own():
    exact, shared = Buckets(500, FINE_BUCKETS), Buckets(10**9, FINE_BUCKETS)
    ids = np.arange(500)
    assert exact.is_exact and np.array_equal(exact.of(ids), ids) and len(exact) == 500
    assert not shared.is_exact and len(np.unique(shared.of(ids))) > 490


@pytest.mark.parametrize("num_rows", [5000, None])
def test_the_set_of_touched_ids_forgets_none_and_says_how_full_it_is(num_rows):
    touched = Touched(num_rows)
    touched.add(np.arange(0, 5000, 2))
    assert touched.holds(np.arange(0, 5000, 2)).all()
    wrong = touched.holds(np.arange(1, 5000, 2)).mean()
    assert touched.fill == (0 if num_rows else pytest.approx(2500 / TOUCHED_BITS, rel=0.01))
    assert wrong <= (0 if num_rows else 0.005)
