"""Which rows of a made-up table hurt most, and what is said of them."""

import numpy as np
import pytest

from lowprec import ops
from lowprec.debug.causes.differences import table_difference
from lowprec.debug.causes.rows import seen_rows, worst_rows
from lowprec.plan import Precision, RowRange

DIM = 8


@pytest.fixture
def table():
    return np.random.default_rng(0).normal(0, 0.3, (60, DIM)).astype(np.float32)


def seen(table, precision, asked, stored=None):
    stored = ops.quantize(table, precision, row_range=RowRange.MINMAX) if stored is None else stored
    return seen_rows("table:t", precision, [np.asarray(ids, np.int64) for ids in asked], table, lambda ids: stored[ids])


def why(table, precision, row):
    (found,) = worst_rows(seen(table, precision, [[row] * 3, range(20, 40)]), 60)[:1]
    if found.id != row:
        (found,) = [w for w in worst_rows(seen(table, precision, [[row] * 3, range(20, 40)]), 60) if w.id == row]
    return found.why


def test_rows_are_counted_and_ranked_by_their_error_over_lookups(table):
    rng = np.random.default_rng(1)
    calls = [rng.integers(0, 60, 200), rng.integers(10, 20, 50)]
    found = worst_rows(seen(table, Precision.INT4, calls), 5)
    error = ops.dequantize(ops.quantize(table, Precision.INT4), Precision.INT4, DIM) - table
    hits = np.bincount(np.concatenate(calls), minlength=60)
    weighed = hits * np.square(error, dtype=float).sum(axis=1)
    order = np.argsort(-weighed)[:5]
    assert [w.id for w in found] == order.tolist()
    assert [w.hits for w in found] == hits[order].tolist()
    np.testing.assert_allclose([w.share for w in found], weighed[order] / weighed.sum(), rtol=1e-5)
    np.testing.assert_allclose([w.max_error for w in found], np.abs(error).max(axis=1)[order], rtol=1e-5)


@pytest.mark.parametrize("num_rows", [60, 6000])
def test_what_was_asked_for_is_the_same_for_small_and_large_tables(num_rows):
    table = np.random.default_rng(2).normal(size=(num_rows, DIM)).astype(np.float32)
    rows = seen(table, Precision.INT8, [[5, 3, 5], [], [59, 5]])
    assert rows.ids.tolist() == [3, 5, 59] and rows.hits.tolist() == [1, 3, 1]
    assert np.array_equal(rows.exact, table[[3, 5, 59]])


def test_exact_rows_are_not_listed(table):
    assert worst_rows(seen(table, Precision.FP32, [range(60)]), 5) == []
    table[:] = np.float32(0.5)
    assert worst_rows(seen(table, Precision.INT2, [range(60)]), 5) == []


@pytest.mark.parametrize(
    ("precision", "row", "said"),
    [
        (Precision.INT8, np.full(DIM, 0.1234567), "constant row"),
        (Precision.INT8, 1e-8 * np.arange(DIM), "spans 7e-08, so little that its fp16 scale underflows to zero"),
        (Precision.INT2, 1e-9 * np.arange(DIM), "spans 7e-09, so little that its fp16 scale underflows to zero"),
        (Precision.INT8, 1e-4 * np.arange(DIM), "spans 0.0007, so little that its fp16 scale has few digits left"),
        (Precision.INT4, 0.1 * np.cos(np.arange(DIM)) + 40 * (np.arange(DIM) == 2), "value 2 is 39.9584; without it"),
        (Precision.INT4, 4 * np.cos(np.arange(DIM)), "times the median row"),
        (Precision.INT4, 0.5 * np.cos(np.arange(DIM)), "rounding to int4: spans 0.994996"),
        (Precision.INT8, 1e8 * np.arange(DIM), "spans 0 to 7e+08, which overflows the fp16 parts of int8"),
        (Precision.FP16, 1e5 * np.arange(DIM), "which overflows the fp16 parts of fp16"),
        (Precision.FP16, 1e-8 * np.arange(DIM), "values below the smallest fp16 numbers"),
        (Precision.FP16, 0.1 * np.arange(DIM), "rounding to fp16"),
    ],
)
def test_why_a_row_is_restored_badly(table, precision, row, said):
    table[7] = row
    assert said in why(table, precision, 7)


def test_values_beyond_codes_and_values_that_are_lost_are_counted(table):
    whole = seen(table, Precision.INT8, [range(60)])
    assert (whole.num_saturated, whole.num_underflowed) == (0, 0)
    table[7], table[9] = 1e-8 * np.arange(DIM), 0.25
    assert seen(table, Precision.INT8, [range(60)]).num_underflowed == DIM
    table[7] = 1e-8 * np.arange(1, DIM + 1)  # half of the smallest fp16 number, 2^-24, is near 3e-8
    assert seen(table, Precision.FP16, [range(60)]).num_underflowed == 2
    table[7] = 1e8
    assert seen(table, Precision.FP16, [range(60)]).num_saturated == DIM
    stored = ops.quantize(table[20:], Precision.INT4)
    stored[5, :2] = np.array([0.01], np.float16).view(np.uint8)  # codes end far below the row's largest value
    restored = ops.dequantize(stored, Precision.INT4, DIM)[5]
    beyond = (np.abs(restored - table[25]) > 0.0051 + 1e-3 * np.abs(table[25]).max()).sum()
    assert seen(table[20:], Precision.INT4, [range(40)], stored).num_saturated == beyond > 0


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4, Precision.INT2])
def test_what_is_said_of_rows_that_differ(table, precision):
    planned = ops.quantize(table, precision)

    def said(change, rows=slice(10, 20)):
        stored = planned.copy()
        stored[rows] = change(stored[rows])
        return table_difference(seen(table, precision, [range(60)], stored), planned)

    assert said(lambda s: s) is None
    flipped = said(lambda s: np.concatenate([s[:, :4], s[:, 4:] ^ 255], axis=1))
    assert flipped.startswith("rows 10 to 19, all 10 that traffic asked for, and no other are not what the plan makes")
    assert flipped.endswith("codes are others, scales and biases are the same")
    assert said(lambda s: np.roll(s, 1, axis=1)[:, :], slice(3, 4)).startswith("row 3 of those")
    heads = said(lambda s: np.concatenate([s[::-1, :4], s[:, 4:]], axis=1), slice(0, 60, 2))
    assert heads.startswith("30 of 60 rows") and heads.endswith("scales and biases are others, codes are the same")
    swapped = said(lambda s: np.concatenate([s[:, 2:4], s[:, :2], s[:, 4:]], axis=1))
    assert swapped.endswith("scale and bias are swapped")


def test_rows_of_another_version_are_told_by_their_angle(table):
    planned = ops.quantize(table, Precision.INT8)
    newer = ops.quantize(
        table + np.float32(0.15) * np.random.default_rng(3).normal(size=table.shape).astype("f"), Precision.INT8
    )
    said = table_difference(seen(table, Precision.INT8, [range(60)], newer), planned)
    restored = ops.dequantize(newer, Precision.INT8, DIM)
    cosine = (restored * table).sum() / np.linalg.norm(restored) / np.linalg.norm(table)
    assert "60 of 60 rows that traffic asked for are not what" in said
    assert f"another version of the table (cosine {cosine:.3f} with the checkpoint's)" in said
