"""Scores from the changes of rows: the reference to the bit on every CPU path, and exact scores within half a step."""

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
PAIRS = [(Precision.FP16, Precision.INT8), (Precision.INT4, Precision.INT2)]
WAYS = [("sum", False), ("mean", False), ("sum", True)]


def some_table(num_rows: int, dim: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Rows of all sizes, constant ones and such as fp16 keeps whole; their changes may be zero or tiny."""
    table = rng.standard_normal((num_rows, dim)) * rng.choice([1e-30, 1e-7, 1e-3, 1, 100], (num_rows, 1))
    table += rng.choice([0, 0, 0, 1, 1000], (num_rows, 1))
    table[0], table[1], table[2] = 0, 1.2345, rng.integers(-3, 4, dim)
    apart = np.full((num_rows, dim + 3), np.nan, np.float32)  # NaN beside the rows must not be read
    apart[:, 2 : dim + 2] = table
    return apart[:, 2 : dim + 2]


def some_bags(num_rows: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    lengths = np.array([0, 1, 7, 0, 0, *rng.integers(0, 4, rng.integers(0, 20)), 35, 0])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(0, num_rows, offsets[-1])
    ids[2:5] = ids[1]
    return ids, offsets


def changes_of(table: NDArray[np.float32], row_range: RowRange, **options: Any) -> ops.RowChanges:
    ranges = {p: ops.row_ranges(table, p, row_range) for p in LOW[1:]} if row_range is RowRange.MSE else None
    return ops.RowChanges(table, ranges=ranges, **options)


@pytest.mark.parametrize("row_range", RowRange)
@pytest.mark.parametrize(("mode", "weighted"), WAYS)
@settings(max_examples=60)
@given(dim=st.integers(1, 257), seed=st.integers(0, 2**32 - 1))
def test_scores_are_those_of_the_reference(
    mode: ops.Pooling, weighted: bool, row_range: RowRange, dim: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    table = some_table(int(rng.integers(3, 40)), dim, rng)
    ids, offsets = some_bags(len(table), rng)
    weights = rng.standard_normal(len(ids), dtype=np.float32) if weighted else None
    g = rng.standard_normal((len(offsets) - 1, dim), dtype=np.float32)
    defined: dict[Precision, NDArray[np.float32]] = {}
    for upper, lower in PAIRS:
        changes = reference.row_changes(table, upper.bits, lower.bits, row_range=row_range)
        defined[upper], defined[lower] = reference.scores_of_changes(
            changes, ids, offsets, g, mean=mode == "mean", weights=weights
        )
    for path in PATHS:
        with ops.using_cpu_path(path):
            found = changes_of(table, row_range)
            for wanted in (LOW, [LOW[0]], [LOW[3]], [LOW[1], LOW[2]]):
                scores = found.scores(wanted, ids, offsets, g, mode=mode, weights=weights)
                assert list(scores) == wanted
                for precision in wanted:
                    np.testing.assert_array_equal(
                        scores[precision], defined[precision], err_msg=f"{path} {precision} of {wanted}"
                    )


@pytest.mark.parametrize("row_range", RowRange)
@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize(("mode", "weighted"), WAYS)
def test_scores_are_exact_to_half_a_step(
    precision: Precision, mode: ops.Pooling, weighted: bool, row_range: RowRange
) -> None:
    """Against lookups of FBGEMM's stored rows in float64."""
    for dim in (1, 7, 16, 40, 100):
        rng = np.random.default_rng(dim)
        table = rng.standard_normal((50, dim), dtype=np.float32)
        table[::3] *= 1e-3
        ids, offsets = some_bags(50, rng)
        weights = rng.standard_normal(len(ids), dtype=np.float32) if weighted else None
        g = rng.standard_normal((len(offsets) - 1, dim), dtype=np.float32)
        found = changes_of(table, row_range).scores([precision], ids, offsets, g, mode=mode, weights=weights)[precision]
        stored = ops.quantize(table, precision, row_range=row_range)
        changes = ops.dequantize(stored, precision, dim).astype(np.float64) - table
        w = np.ones(len(ids)) if weights is None else weights.astype(np.float64)
        bag_of_id = np.repeat(np.arange(len(g)), np.diff(offsets))
        count = np.maximum(np.diff(offsets), 1) if mode == "mean" else 1

        def per_bag(of_ids: NDArray[np.float64], bags: Any = bag_of_id, size: int = len(g), by: Any = count) -> Any:
            return np.bincount(bags, of_ids, minlength=size) / by

        expected = per_bag(w * (changes[ids] * g[bag_of_id]).sum(axis=1))
        # Half a step a value, and a little for the rounding of steps and quotients. Values are rounded to fp32 by those
        # who restore them. Sums of words reach twice the largest change a row (lower halves are moved up by half).
        largest = np.abs(changes).max(axis=1)
        in_row = 0.505 * largest / 32767 + np.abs(table).max(axis=1) * 2.0**-23
        sums = 3 * largest * 2.0**-24 * (35 + dim / 16 + 8)
        bound = per_bag(np.abs(w) * (in_row + sums * 2)[ids] * np.abs(g[bag_of_id]).sum(axis=1))
        assert (np.abs(found - expected) <= bound).all(), f"dim {dim}"
        assert (found[np.diff(offsets) == 0] == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_results_do_not_depend_on_the_number_of_threads(path: str) -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((9000, 40), dtype=np.float32)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 9, 5000))])
    ids, g = rng.integers(0, len(table), offsets[-1]), rng.standard_normal((5000, 40), dtype=np.float32)
    with ops.using_cpu_path(path):
        one, many = (
            changes_of(table, RowRange.MINMAX, num_threads=n).scores(LOW, ids, offsets, g, mode="mean", num_threads=n)
            for n in (1, 7)
        )
    for precision in LOW:
        np.testing.assert_array_equal(one[precision], many[precision])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e9])
def test_a_bad_row_shows_in_its_bags_alone(bad: float, path: str) -> None:
    rng = np.random.default_rng(1)
    for dim in (1, 5, 16, 33, 128):
        for column in {0, dim // 2, dim - 1}:
            table = rng.standard_normal((20, dim), dtype=np.float32)
            table[7] = 1e9 if bad == 1e9 else table[7]
            table[7, column] = bad
            ids, offsets, g = np.array([1, 7, 3, 4, 7]), np.array([0, 2, 4, 5]), np.ones((3, dim), np.float32)
            with ops.using_cpu_path(path):
                scores = ops.RowChanges(table).scores(LOW, ids, offsets, g, mode="sum")
            for precision in LOW:
                assert np.isfinite(scores[precision]).tolist() == [False, True, False], (precision, dim)


def test_what_they_take_in_memory_is_known_beforehand() -> None:
    for num_rows, dim in ((0, 1), (1, 1), (7, 16), (5, 17), (9, 64)):
        changes = ops.RowChanges(np.ones((num_rows, dim), np.float32))
        assert changes.num_bytes == ops.RowChanges.bytes_for(num_rows, dim)
    assert ops.RowChanges.bytes_for(1000, 64) == 1000 * (64 * 8 + 16)
    nothing = changes.scores(
        [], np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros((0, 64), np.float32), mode="sum"
    )
    assert nothing == {}


def test_ids_offsets_and_arrays_of_another_form_are_refused() -> None:
    changes = ops.RowChanges(np.ones((4, 8), np.float32))
    ids, offsets, g = np.array([0, 3]), np.array([0, 1, 2]), np.ones((2, 8), np.float32)

    def call(**other: Any) -> None:
        given: dict[str, Any] = {"ids": ids, "offsets": offsets, "gradients": g, "mode": "sum", **other}
        changes.scores(LOW, **given)

    call()
    for outside in (-1, 4, 2**62, -(2**63)):
        with pytest.raises(TrafficError, match=rf"ids\[1\] is {outside}, outside the 4 rows"):
            call(ids=np.array([0, outside]))
    for wrong in ([0, 2, 1], [1, 1, 2], [0, 1, 1]):
        with pytest.raises(TrafficError, match=r"offsets must rise from 0 to the 2 ids; offsets\["):
            call(offsets=np.array(wrong))
    for other in ({"ids": ids.astype(np.int32)}, {"gradients": g.astype(float)}, {"gradients": np.ones((2, 9), "f")}):
        with pytest.raises(TypeError, match="must be"):
            call(**other)
    with pytest.raises(TrafficError, match="gradients need"):
        call(gradients=g[:1])
    with pytest.raises(ModelError, match="weighted mean"):
        call(mode="mean", weights=np.ones(2, np.float32))
    with pytest.raises(ValueError, match="scores knows fp16"):
        changes.scores([Precision.FP32], ids, offsets, g, mode="sum")
    with pytest.raises(TypeError, match="rows must be float32"):
        ops.RowChanges(np.ones((4, 8)))


def test_the_native_module_checks_shapes_itself() -> None:
    words, steps, table = np.zeros((4, 32), np.int32), np.zeros((4, 4), np.float32), np.ones((4, 8), np.float32)
    ids, offsets, g, out = np.array([0]), np.array([0, 1]), np.ones((1, 8), np.float32), [np.zeros(1, np.float32)] * 4
    _native.row_changes(table, [None] * 3, words, steps)
    _native.scores_of_changes(words, steps, ids, offsets, g, out, False)
    for args in ((words[:, :31].copy(), steps), (words, steps[:, :3].copy()), (words[:3].copy(), steps)):
        with pytest.raises(ValueError, match=r"must be \["):
            _native.row_changes(table, [None] * 3, *args)
        with pytest.raises(ValueError, match=r"must be \["):
            _native.scores_of_changes(*args, ids, offsets, g, out, False)
    with pytest.raises(ValueError, match="a value for each bag"):
        _native.scores_of_changes(words, steps, ids, offsets, g, [np.zeros(2, np.float32)] * 4, False)
    with pytest.raises(TypeError):
        _native.scores_of_changes(words.astype(np.int64), steps, ids, offsets, g, out, False)
