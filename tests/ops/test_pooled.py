"""Lookups and scores from fp32 rows: the reference, and FBGEMM on the quantized table, on every CPU path."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lowprec import _native, ops
from lowprec.core.errors import ModelError, TrafficError
from lowprec.ops import reference
from lowprec.plan import Precision, RowRange

PATHS = ops.cpu_paths()
LOW = list(ops.SCORED)
WAYS = [("sum", False), ("mean", False), ("sum", True)]
IDS, OFFSETS = np.array([0, 19, 3, 3]), np.array([0, 2, 2, 4])


def some_table(num_rows: int, dim: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Rows that need clamps and rows that do not: small, large, far from zero, constant, zero. Rows lie apart."""
    table = rng.standard_normal((num_rows, dim)) * rng.choice([1e-7, 1e-3, 1, 100], (num_rows, 1))
    table += rng.choice([0, 0, 0, 1, 1000], (num_rows, 1))
    table[0], table[1] = 0, 1.2345
    table[2, 0] = -0.0
    apart = np.full((num_rows, dim + 3), np.nan, np.float32)  # NaN beside the rows must not be read
    apart[:, 2 : dim + 2] = table
    return apart[:, 2 : dim + 2]


def some_bags(num_rows: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids with repeats, offsets with empty bags, the first and last among them, and a bag longer than a block."""
    lengths = np.array([0, 1, 7, 0, 0, *rng.integers(0, 4, 20), 35, 0])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(0, num_rows, offsets[-1])
    ids[2:5] = ids[1]
    return ids, offsets


@pytest.mark.parametrize("row_range", RowRange)
@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize(("mode", "weighted"), WAYS)
@settings(max_examples=60)
@given(num_rows=st.sampled_from([12, 300]), dim=st.integers(1, 257), seed=st.integers(0, 2**32 - 1))
def test_lookups_and_scores_are_those_of_the_reference_and_of_fbgemm(
    precision: Precision, mode: ops.Pooling, weighted: bool, row_range: RowRange, num_rows: int, dim: int, seed: int
) -> None:
    """Given ranges are taken as they are."""
    rng = np.random.default_rng(seed)
    table = some_table(num_rows, dim, rng)
    ids, offsets = some_bags(len(table), rng)
    weights = rng.standard_normal(len(ids), dtype=np.float32) if weighted else None
    g = rng.standard_normal((len(offsets) - 1, dim), dtype=np.float32)
    defined: dict[str, Any] = {"mean": mode == "mean", "weights": weights, "row_range": row_range}
    pooled = reference.pooled_as(table, precision.bits, ids, offsets, **defined)
    scores = reference.scores(table, precision.bits, ids, offsets, g, **defined)
    way: dict[str, Any] = {"mode": mode, "weights": weights}
    stored = ops.quantize(table, precision, row_range=row_range)
    np.testing.assert_array_equal(pooled, ops.pooled_lookup(stored, precision, dim, ids, offsets, **way).numpy())
    ranges = ops.row_ranges(table, precision, row_range)[ids] if precision.is_rowwise else None
    ways = [(ranges, {} if ranges is None else {precision: ranges})]
    if row_range is RowRange.MINMAX:
        ways.append((None, {}))
    for path in PATHS:
        with ops.using_cpu_path(path):
            for for_lookup, for_scores in ways:
                found = ops.pooled_as(table, precision, ids, offsets, ranges=for_lookup, **way)
                np.testing.assert_array_equal(found, pooled, err_msg=path)
                for precisions in ([precision], LOW):
                    some = ops.scores(table, precisions, ids, offsets, g, ranges=for_scores, **way)
                    np.testing.assert_array_equal(some[precision], scores, err_msg=path)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize(("mode", "weighted"), WAYS)
def test_scores_are_what_lookups_differ_by(precision: Precision, mode: ops.Pooling, weighted: bool) -> None:
    for dim in (1, 7, 16, 40, 100):
        rng = np.random.default_rng(dim)
        table = rng.standard_normal((50, dim), dtype=np.float32)
        ids, offsets = some_bags(50, rng)
        weights = rng.standard_normal(len(ids), dtype=np.float32) if weighted else None
        g = rng.standard_normal((len(offsets) - 1, dim), dtype=np.float32)
        found = ops.scores(table, [precision], ids, offsets, g, mode=mode, weights=weights)[precision]
        # In float64, from the restored rows.
        restored = ops.dequantize(ops.quantize(table, precision), precision, dim).astype(np.float64)
        w = np.ones(len(ids)) if weights is None else weights.astype(np.float64)
        bag_of_id = np.repeat(np.arange(len(g)), np.diff(offsets))
        count = np.maximum(np.diff(offsets), 1) if mode == "mean" else 1
        change = w * ((restored - table)[ids] * g[bag_of_id]).sum(axis=1)
        expected = np.bincount(bag_of_id, change, minlength=len(g)) / count
        # A term (a row's g * code * scale, or g * (x - bias)) is at most the row's range; it meets dim / 16 + 4
        # roundings in its lane and fold, one for each row of the bag, and 6 of its own (code, scale, weight, mean);
        # restored values are rounded to fp32 once.
        size = np.ptp(table, axis=1) + np.abs(table).max(axis=1) * 2
        terms = (
            np.bincount(bag_of_id, np.abs(w) * size[ids] * np.abs(g[bag_of_id]).sum(axis=1), minlength=len(g)) / count
        )
        bound = (dim / 16 + 4 + 35 + 6 + 1) * 2.0**-24 * 2 * terms
        assert (np.abs(found - expected) <= bound).all(), f"dim {dim}"
        assert (found[np.diff(offsets) == 0] == 0).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("precision", LOW)
def test_results_do_not_depend_on_the_number_of_threads(precision: Precision, path: str) -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((300, 40), dtype=np.float32)
    lengths = rng.integers(0, 9, 3000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids, g = rng.integers(0, 300, offsets[-1]), rng.standard_normal((3000, 40), dtype=np.float32)
    with ops.using_cpu_path(path):
        pooled, scores = (
            [
                ops.pooled_as(table, precision, ids, offsets, mode="mean", num_threads=n),
                ops.scores(table, [precision], ids, offsets, g, mode="mean", num_threads=n)[precision],
            ]
            for n in (1, 7)
        )
    np.testing.assert_array_equal(pooled[0], scores[0])
    np.testing.assert_array_equal(pooled[1], scores[1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e9])
def test_a_bad_row_shows_in_its_bags_alone(precision: Precision, bad: float, path: str) -> None:
    rng = np.random.default_rng(1)
    for dim in (1, 5, 16, 33, 128):
        for column in {0, dim // 2, dim - 1}:
            table = rng.standard_normal((20, dim), dtype=np.float32)
            table[7] = 1e9 if bad == 1e9 else table[7]
            table[7, column] = bad
            ids, offsets, g = np.array([1, 7, 3, 4, 7]), np.array([0, 2, 4, 5]), np.ones((3, dim), np.float32)
            with ops.using_cpu_path(path):
                pooled = ops.pooled_as(table, precision, ids, offsets, mode="sum")
                score = ops.scores(table, LOW, ids, offsets, g, mode="sum")[precision]
            assert np.isfinite(pooled).all(axis=1).tolist() == [False, True, False]
            assert np.isfinite(score).tolist() == [False, True, False]


def test_lookups_of_every_half_are_exact() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves)][:, None]
    ids = np.arange(len(halves))
    found = ops.pooled_as(halves, Precision.FP16, ids, np.arange(len(halves) + 1), mode="sum")
    np.testing.assert_array_equal(found, halves)
    g = np.ones_like(halves)
    assert not ops.scores(halves, [Precision.FP16], ids, np.arange(len(halves) + 1), g, mode="sum")[
        Precision.FP16
    ].any()


def lookup(ids: Any = IDS, offsets: Any = OFFSETS, *, mode: ops.Pooling = "sum", weights: Any = None) -> Any:
    return ops.pooled_as(np.ones((20, 7), np.float32), Precision.INT4, ids, offsets, mode=mode, weights=weights)


def score(ids: Any = IDS, offsets: Any = OFFSETS, *, mode: ops.Pooling = "sum", weights: Any = None) -> Any:
    table, g = np.ones((20, 7), np.float32), np.ones((3, 7), np.float32)
    return ops.scores(table, [Precision.INT4], ids, offsets, g, mode=mode, weights=weights)


@pytest.mark.parametrize("call", [lookup, score])
@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        ([0, 2, 2, 5], "offsets.3. is 5"),
        ([0, 2, 1, 4], "offsets.2. is 1"),
        ([1, 2, 2, 4], "offsets.0. is 1"),
        ([0, 2, 2, 3], "offsets.3. is 3"),
        ([0, -1, 2, 4], "offsets.1. is -1"),
        ([0, 2**62, 2, 4], "offsets.2. is 2"),
    ],
)
def test_offsets_that_do_not_fit_are_refused(call: Any, offsets: list[int], said: str) -> None:
    with pytest.raises(TrafficError, match=said):
        call(offsets=np.array(offsets))


@pytest.mark.parametrize("call", [lookup, score])
@pytest.mark.parametrize("outside", [-1, 20, 2**62, -(2**63)])
def test_an_id_that_is_no_row_is_refused(call: Any, outside: int) -> None:
    with pytest.raises(TrafficError, match=rf"ids\[2\] is {outside}, outside the 20 rows"):
        call(np.array([0, 1, outside, 3]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("position", [0, 1, 255, 256, 700, 998, 999])
def test_the_first_wrong_id_or_offset_of_many_is_named(position: int, path: str) -> None:
    table, g = np.ones((20, 7), np.float32), np.ones((1000, 7), np.float32)
    ids, offsets = np.full(1000, 19), np.arange(1001)
    wrong_ids, falling = ids.copy(), offsets.copy()
    wrong_ids[position:] = -7
    falling[position + 1] = -1
    with ops.using_cpu_path(path):
        ops.scores(table, LOW, ids, offsets, g, mode="sum")
        with pytest.raises(TrafficError, match=rf"ids\[{position}\] is -7, outside the 20 rows"):
            ops.scores(table, LOW, wrong_ids, offsets, g, mode="sum")
        with pytest.raises(TrafficError, match=rf"offsets\[{position + 1}\] is -1"):
            ops.scores(table, LOW, ids, falling, g, mode="sum")


@pytest.mark.parametrize("call", [lookup, score])
def test_arrays_of_another_form_are_refused(call: Any) -> None:
    for wrong in ({"ids": IDS.astype(np.int32)}, {"ids": np.repeat(IDS, 2)[::2]}, {"offsets": OFFSETS.astype(float)}):
        with pytest.raises(TypeError, match="ids must be|offsets must be"):
            call(**wrong)
    with pytest.raises(TypeError, match="weights"):
        call(weights=np.ones(4))
    with pytest.raises(TrafficError, match="4 ids and 3 weights"):
        call(weights=np.ones(3, np.float32))
    with pytest.raises(ModelError, match="sum pooling"):
        call(weights=np.ones(4, np.float32), mode="mean")
    with pytest.raises(TrafficError, match="one more than the bags"):
        call(offsets=np.empty(0, np.int64))


def test_gradients_of_another_form_are_refused() -> None:
    table, ones = np.ones((20, 7), np.float32), np.ones((3, 14), np.float32)
    for g in (ones[:, ::2], ones[:, :7], ones[:, :7].astype(np.float64), ones[0, :7], ones[:, :0], ones):
        with pytest.raises(TypeError, match="gradients"):
            ops.scores(table, LOW, IDS, OFFSETS, g, mode="sum")
    with pytest.raises(TrafficError, match="2 gradients need 3 offsets; got 4"):
        ops.scores(table, LOW, IDS, OFFSETS, np.ones((2, 7), np.float32), mode="sum")
    with pytest.raises(ValueError, match="scores knows fp16, int8, int4, int2; got fp32"):
        ops.scores(table, [Precision.FP32], IDS, OFFSETS, np.ones((3, 7), np.float32), mode="sum")
    with pytest.raises(ValueError, match="model itself"):
        ops.pooled_as(table, Precision.FP32, IDS, OFFSETS, mode="sum")


def test_no_bags_and_no_precisions() -> None:
    none, table = np.empty(0, np.int64), np.ones((20, 7), np.float32)
    assert ops.pooled_as(table, Precision.INT4, none, np.zeros(1, np.int64), mode="sum").shape == (0, 7)
    assert not ops.pooled_as(table, Precision.INT4, none, np.zeros(4, np.int64), mode="mean").any()
    assert ops.scores(table, [], IDS, OFFSETS, np.ones((3, 7), np.float32), mode="sum") == {}
    empty = ops.scores(table, LOW, none, np.zeros(1, np.int64), np.empty((0, 7), np.float32), mode="sum")
    assert [value.shape for value in empty.values()] == [(0,)] * 4


def test_the_native_module_copies_no_argument_and_checks_it() -> None:
    table, out = np.ones((20, 7), np.float32), np.empty((3, 7), np.float32)
    ranges = np.ones((4, 2), np.uint16)
    good = {"table": table, "bits": 4, "ids": IDS, "offsets": OFFSETS, "out": out, "mean": False, "ranges": ranges}
    _native.pooled(**good)
    read_only = np.empty((3, 7), np.float32)
    read_only.flags.writeable = False
    bad_ids = [IDS.astype(np.int32), np.repeat(IDS, 2)[::2], IDS[:3], np.array([0, 1, 2, 20]), np.array([0, 1, 2, -1])]
    others: dict[str, list[Any]] = {
        "table": [table.astype(float), np.ones((20, 14), np.float32)[:, ::2], table[:, :6]],
        "bits": [3, 32],
        "ids": bad_ids,
        "offsets": [OFFSETS[:3], np.repeat(OFFSETS, 2)[::2], OFFSETS.astype(np.int32), OFFSETS + 1, OFFSETS[:0]],
        "out": [out.astype(float), out[:2], np.empty((3, 14), np.float32)[:, ::2], read_only],
        "weights": [np.ones(4), np.ones(3, np.float32)],
        "ranges": [ranges[:3], ranges.astype(np.int16), np.ones((4, 4), np.uint16)[:, ::2]],
    }
    for name, wrong in others.items():
        for value in wrong:
            with pytest.raises((TypeError, ValueError, IndexError)):
                _native.pooled(**{**good, name: value})

    g, vector = np.ones((3, 7), np.float32), np.empty(3, np.float32)
    fine = {"table": table, "ids": IDS, "offsets": OFFSETS, "gradients": g, "mean": False}
    fine |= {"out": [None, None, vector, None], "ranges": [None, ranges, None]}
    _native.scores(**fine)
    others = {
        "ids": bad_ids,
        "gradients": [g.astype(float), g[:2], np.ones((7, 3), np.float32).T],
        "out": [[None, None, np.empty(2, np.float32), None], [vector], [None, None, np.empty(3), None]],
        "ranges": [[None, ranges], [None, ranges[:2], None], [None, ranges.astype(np.int16), None]],
    }
    for name, wrong in others.items():
        for value in wrong:
            with pytest.raises((TypeError, ValueError, IndexError)):
                _native.scores(**{**fine, name: value})


@settings(max_examples=300)
@given(
    data=st.data(),
    num_rows=st.integers(0, 6),
    dim=st.integers(1, 40),
    num_ids=st.integers(0, 40),
    bits=st.sampled_from([16, 8, 4, 2]),
)
def test_no_shapes_ids_or_offsets_crash(data: st.DataObject, num_rows: int, dim: int, num_ids: int, bits: int) -> None:
    """What is malformed raises; what is not gives the sum of what serving would give."""
    wild = st.integers(-3, 9) | st.sampled_from([-(2**63), 2**63 - 1, 2**40])
    ids = np.array(data.draw(st.lists(wild, min_size=num_ids, max_size=num_ids)), np.int64)
    offsets = np.array(data.draw(st.lists(wild, max_size=8) | st.just([0, num_ids])), np.int64)
    table = np.ones((num_rows, dim), np.float32)
    well_formed = (
        len(offsets) > 0
        and offsets[0] == 0
        and offsets[-1] == num_ids
        and (np.diff(offsets.astype(object)) >= 0).all()
        and ((ids >= 0) & (ids < num_rows)).all()
    )
    precision = next(p for p in LOW if p.bits == bits)
    for path in PATHS:
        with ops.using_cpu_path(path):
            if not well_formed:
                with pytest.raises(TrafficError):
                    ops.pooled_as(table, precision, ids, offsets, mode="sum")
                continue
            found = ops.pooled_as(table, precision, ids, offsets, mode="sum")
            np.testing.assert_array_equal(found, np.repeat(np.diff(offsets), dim).reshape(-1, dim))
