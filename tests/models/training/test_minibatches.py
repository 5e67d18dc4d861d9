"""Shuffling keeps every labelled row whole, and is decided by the seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.models.training import minibatches
from lowprec.models.training.minibatches import labelled, shuffled_minibatches, take_rows
from lowprec.traffic.batch import Bags, Batch


def batch_of(index, first, lengths, weighted=True):
    """Rows `first`, `first + 1`, ... whose every value tells the row; every fifth has no label."""
    rows = np.arange(first, first + len(lengths))
    values = np.repeat(rows, lengths).astype(np.int64)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    labels = np.where(rows % 5 == 4, np.nan, rows % 2).astype(np.float32)
    weights = values.astype(np.float32) / 2 if weighted else None
    return Batch(
        index=index,
        labels=labels,
        dense=np.stack([rows, -rows], axis=1).astype(np.float32),
        sparse={"a": Bags(values, offsets, weights)},
        times=rows,
        weights=rows.astype(np.float64) if weighted else None,
    )


def batches_of(lengths, size, weighted):
    parts = range(0, len(lengths), size)
    return [batch_of(i, first, lengths[first : first + size], weighted) for i, first in enumerate(parts)]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    read=st.integers(1, 20),
    size=st.integers(1, 20),
    weighted=st.booleans(),
    chunk_bytes=st.sampled_from([1, 400, 1 << 20]),
)
def test_every_labelled_row_comes_once_and_whole(lengths, read, size, weighted, chunk_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minibatches, "SHUFFLED_BYTES", chunk_bytes)
        given_batches = batches_of(lengths, read, weighted)
        got = list(shuffled_minibatches(given_batches, size, np.random.default_rng(0)))
    seen = []
    for batch in got:
        assert 1 <= batch.num_rows <= size
        bags = batch.sparse["a"]
        assert bags.offsets[0] == 0
        assert bags.offsets[-1] == len(bags.values)
        for i, row in enumerate(batch.times):
            bag = slice(bags.offsets[i], bags.offsets[i + 1])
            assert bags.values[bag].tolist() == [row] * lengths[row]
            assert batch.dense[i].tolist() == [row, -row]
            assert batch.labels[i] == row % 2
            if weighted:
                assert batch.weights[i] == row
                assert bags.weights[bag].tolist() == [row / 2] * lengths[row]
        seen += batch.times.tolist()
    assert sorted(seen) == [row for row in range(len(lengths)) if row % 5 != 4]


def order(seed):
    batches = batches_of([1] * 1000, 100, False)
    return [t for b in shuffled_minibatches(batches, 64, np.random.default_rng(seed)) for t in b.times.tolist()]


def test_the_order_is_random_and_the_seed_decides_it():
    assert order(1) == order(1)
    assert order(1) != order(2)
    # The mean distance of a random permutation's items from their place is n / 3, give or take 0.02 n for n = 800.
    n = len(order(1))
    distance = np.abs(np.argsort(np.argsort(order(1))) - np.arange(n)).mean()
    assert 0.25 * n < distance < 0.42 * n


def test_rows_with_labels_only_is_the_batch_itself():
    batch = batch_of(0, 0, [1, 2, 0])
    assert labelled(batch) is batch
    assert labelled(batch_of(0, 0, [1] * 5)).num_rows == 4


def test_take_rows_can_repeat_and_take_none():
    batch = batch_of(0, 0, [1, 2, 0])
    assert take_rows(batch, np.array([1, 1])).sparse["a"].values.tolist() == [1, 1, 1, 1]
    assert take_rows(batch, np.array([], dtype=np.int64)).sparse["a"].offsets.tolist() == [0]
