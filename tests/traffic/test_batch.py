"""A batch cut into parts is the same rows, each once and in order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowprec.traffic import Schema, SparseFeature
from lowprec.traffic.batch import BadRow, Bags, Batch


def draw(num_rows, seed=0, *, optional=True):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 4, num_rows)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    values = rng.integers(0, 100, int(offsets[-1]))
    single = Bags(rng.integers(0, 9, num_rows), np.arange(num_rows + 1))
    return Batch(
        index=3,
        labels=rng.integers(0, 2, num_rows).astype(np.float32),
        dense=rng.normal(size=(num_rows, 2)).astype(np.float32),
        sparse={
            "many": Bags(values, offsets, rng.random(len(values)).astype(np.float32) if optional else None),
            "one": single,
        },
        times=np.arange(num_rows),
        weights=rng.random(num_rows) if optional else None,
        groups=rng.integers(0, 5, num_rows) if optional else None,
        bad_rows=(BadRow("f", 1, "r", "v"),),
        out_of_range={"many": 2},
    )


def bags_of(bags):
    return [bags.values[i:j].tolist() for i, j in zip(bags.offsets[:-1], bags.offsets[1:], strict=True)]


@given(st.integers(0, 40), st.integers(1, 9), st.booleans(), st.integers(0, 999))
def test_parts_hold_every_row_once_and_in_order(num_rows, num_parts, optional, seed):
    batch = draw(num_rows, seed, optional=optional)
    parts = [batch.part(k, num_parts) for k in range(num_parts)]
    for name in ("labels", "dense", "times", *(("weights", "groups") if optional else ())):
        np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(batch, name))
    if not optional:
        assert all(p.weights is None and p.groups is None for p in parts)
    for name, bags in batch.sparse.items():
        pieces = [p.sparse[name] for p in parts]
        assert [bag for piece in pieces for bag in bags_of(piece)] == bags_of(bags)
        for part, piece in zip(parts, pieces, strict=True):
            assert piece.offsets[0] == 0 and piece.offsets[-1] == len(piece.values)
            assert len(piece.offsets) == part.num_rows + 1
        if bags.weights is None:
            assert all(piece.weights is None for piece in pieces)
        else:
            np.testing.assert_array_equal(np.concatenate([piece.weights for piece in pieces]), bags.weights)
    sizes = [p.num_rows for p in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(p.index == batch.index for p in parts)


def test_bad_rows_and_ids_out_of_range_are_told_once():
    parts = [draw(10).part(k, 3) for k in range(3)]
    assert [len(p.bad_rows) for p in parts] == [1, 0, 0]
    assert [dict(p.out_of_range) for p in parts] == [{"many": 2}, {}, {}]


def test_one_part_is_the_batch():
    batch = draw(17)
    (whole,) = (batch.part(k, 1) for k in range(1))
    np.testing.assert_array_equal(whole.labels, batch.labels)
    assert bags_of(whole.sparse["many"]) == bags_of(batch.sparse["many"])


@pytest.mark.parametrize("optional", [True, False])
def test_bytes_grow_with_the_rows(optional):
    small, large = draw(100, optional=optional), draw(1000, optional=optional)
    assert small.nbytes * 5 < large.nbytes < small.nbytes * 20
    held = large.labels.nbytes + large.dense.nbytes + large.times.nbytes
    held += sum(b.values.nbytes + b.offsets.nbytes for b in large.sparse.values())
    assert large.nbytes > held / 2  # about


def test_parts_read_as_the_rows_that_they_are(columns, write, joined):
    """Batches from a file: parts of all of them are all rows."""
    from lowprec.traffic import Window, open_traffic

    schema = Schema(
        label="label",
        dense=("d",),
        sparse=(SparseFeature("a", "a", 50), SparseFeature("l", "l", 9, weights="w")),
        time="ts",
    )
    window = open_traffic(write(columns(24)), schema, batch_size=10).window(Window())
    batches = list(window.batches())
    assert joined([b.part(k, 4) for b in batches for k in range(4)]) == joined(batches)
