"""native = reference = FBGEMM, bit for bit, on every CPU path: stored rows and restored values."""

import fbgemm_gpu  # noqa: F401  (registers the operators)
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from lowprec import ops
from lowprec.ops import reference
from lowprec.plan import TABLE_PRECISIONS, Precision, RowRange

PATHS = ops.cpu_paths()
ROWWISE = [p for p in TABLE_PRECISIONS if p.is_rowwise]
SCALES = (1e-42, 1e-9, 1e-7, 1e-5, 1e-3, 1.0, 1e3, 6e4, 1e6, 1e30)


def rows_of_every_kind(dim: int, seed: int, num_each: int = 3) -> NDArray[np.float32]:
    """Finite rows: normal, constant, nearly constant, zeros of both signs, subnormal, huge, any bits."""
    rng = np.random.default_rng(seed)
    shape = (num_each, dim)
    zeros = rng.choice(np.array([0.0, -0.0], np.float32), shape)
    kinds = [np.zeros(shape), np.full(shape, -0.0), zeros, np.where(rng.random(shape) < 0.5, zeros, rng.random(shape))]
    for scale in SCALES:
        constant = np.repeat(rng.standard_normal((num_each, 1)) * scale, dim, axis=1).astype(np.float32)
        steps = rng.integers(0, 3, shape) * rng.choice([1, 7, 4000])
        kinds += [rng.standard_normal(shape) * scale, constant, constant * (1 + steps * np.float32(2**-23))]
    any_bits = rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)
    kinds.append(np.where(np.isfinite(any_bits), any_bits, np.float32(1)))
    return np.concatenate([np.asarray(kind, np.float32) for kind in kinds])


def fbgemm_rows(rows: NDArray[np.float32], bits: int) -> NDArray[np.uint8]:
    """FBGEMM's stored rows, scale and bias moved from the end, where its quantizer puts them, to the front."""
    stored = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(torch.tensor(rows), bits).numpy()
    return np.concatenate([stored[:, -4:], stored[:, :-4]], axis=1)


def fbgemm_values(stored: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    scale_bias_last = torch.from_numpy(np.concatenate([stored[:, 4:], stored[:, :4]], axis=1))
    values: NDArray[np.float32] = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(scale_bias_last, bits).numpy()
    return values


def assert_same_floats(left: NDArray[np.float32], right: NDArray[np.float32]) -> None:
    """The same bits, but that any NaN equals any other."""
    both_nan = np.isnan(left) & np.isnan(right)
    left_bits, right_bits = (np.where(both_nan, 0, side.view(np.uint32)) for side in (left, right))
    np.testing.assert_array_equal(left_bits, right_bits)


def assert_native_is_reference(
    rows: NDArray[np.float32], precision: Precision, row_range: RowRange, num_threads: int = 1
) -> None:
    expected = reference.quantize_rows(rows, precision.bits, row_range)
    for path in PATHS:
        with ops.using_cpu_path(path):
            stored = ops.quantize(rows, precision, row_range=row_range, num_threads=num_threads)
            np.testing.assert_array_equal(stored, expected, err_msg=path)
            ranges = ops.row_ranges(rows, precision, row_range)
            np.testing.assert_array_equal(ranges.view(np.uint8), expected[:, :4], err_msg=path)
    restored = ops.dequantize(stored, precision, rows.shape[1], num_threads=num_threads)
    assert_same_floats(restored, reference.dequantize_rows(stored, precision.bits, rows.shape[1]))


@pytest.mark.parametrize("row_range", RowRange)
@pytest.mark.parametrize("precision", ROWWISE)
@settings(max_examples=150)
@given(
    dim=st.integers(1, 257), seed=st.integers(0, 2**32 - 1), gap=st.integers(0, 3), num_threads=st.sampled_from([1, 3])
)
def test_native_is_reference_for_any_dim_and_stride(
    precision: Precision, row_range: RowRange, dim: int, seed: int, gap: int, num_threads: int
) -> None:
    rows = rows_of_every_kind(dim, seed)
    padded = np.full((len(rows), dim + gap), np.nan, np.float32)  # NaN beside the rows must not be read
    padded[:, :dim] = rows
    assert_native_is_reference(padded[:, :dim], precision, row_range, num_threads)


@pytest.mark.parametrize("row_range", RowRange)
@pytest.mark.parametrize("precision", ROWWISE)
@settings(max_examples=150)
@given(
    rows=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 40)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
@example(rows=np.array([[65504.0, -65519.996], [65519.996, 65520.0], [-65520.0, 1.0], [0.0, 65520 * 15.0]], np.float32))
@example(rows=np.array([[1.0, 1.0 + 2**-11], [-1.0 - 2**-12, -1.0 - 2**-12], [2**-25, 2**-24]], np.float32))
def test_native_is_reference_for_any_floats(
    precision: Precision, row_range: RowRange, rows: NDArray[np.float32]
) -> None:
    assert_native_is_reference(rows, precision, row_range)


@pytest.mark.parametrize("precision", ROWWISE)
def test_native_is_fbgemm_where_fbgemm_takes_the_dim(precision: Precision) -> None:
    step = 16 // precision.bits  # FBGEMM refuses dims that leave half a byte pair
    for dim in [*range(step, 72, step), 128, 200]:
        rows = rows_of_every_kind(dim, seed=dim, num_each=10)
        theirs = fbgemm_rows(rows, precision.bits)
        for path in PATHS:
            with ops.using_cpu_path(path):
                stored = ops.quantize(rows, precision)
                np.testing.assert_array_equal(stored, theirs, err_msg=f"{path}, dim {dim}")
        assert_same_floats(ops.dequantize(stored, precision, dim), fbgemm_values(stored, precision.bits))


@pytest.mark.parametrize("precision", ROWWISE)
def test_native_is_fbgemm_on_rows_filled_up_to_a_dim_that_fbgemm_takes(precision: Precision) -> None:
    # Repeating the last value changes neither minimum nor maximum; it can change which zero is the minimum, so the sign
    # of a zero bias is left out.
    step = 16 // precision.bits
    for dim in (d for d in range(1, 40) if d % step):
        rows = rows_of_every_kind(dim, seed=dim)
        filled = np.concatenate([rows, np.repeat(rows[:, -1:], -dim % step, axis=1)], axis=1)
        ours, theirs = ops.quantize(rows, precision), fbgemm_rows(filled, precision.bits)
        np.testing.assert_array_equal(ours[:, :4].copy().view(np.float16), theirs[:, :4].copy().view(np.float16))
        values = ops.dequantize(ours, precision, dim)
        np.testing.assert_array_equal(values, fbgemm_values(theirs, precision.bits)[:, :dim], err_msg=f"dim {dim}")


@pytest.mark.parametrize("precision", ROWWISE)
def test_result_does_not_depend_on_the_number_of_threads(precision: Precision) -> None:
    rows = np.random.default_rng(5).standard_normal((9001, 13), dtype=np.float32)  # enough rows for 8 threads
    stored = ops.quantize(rows, precision)
    for num_threads in (2, 8):
        np.testing.assert_array_equal(ops.quantize(rows, precision, num_threads=num_threads), stored)
        again = ops.dequantize(stored, precision, 13, num_threads=num_threads)
        np.testing.assert_array_equal(again, ops.dequantize(stored, precision, 13))


def some_bags(num_rows: int, dim: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Ids with repeats, offsets with empty bags (the first and last among them), a vector for each bag."""
    rng = np.random.default_rng(seed)
    lengths = np.array([0, 1, 7, 0, *rng.integers(0, 4, 12), 0])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(0, num_rows, offsets[-1])
    ids[2:5] = ids[1]
    return ids, offsets, rng.standard_normal((len(lengths), dim), dtype=np.float32)


@pytest.mark.parametrize("path", PATHS)
def test_every_half_is_stored_as_numpy_rounds_it(path: str) -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    between = (halves + np.nextafter(halves, np.float32(np.inf))) / 2
    ties = (halves[:-1].astype(np.float64) + halves[1:]) / 2
    subnormal = np.random.default_rng(0).standard_normal(5000) * 2.0**-24
    values = np.concatenate([halves, between, ties, subnormal]).astype(np.float32)
    values = np.concatenate([values, np.zeros(-len(values) % 37, np.float32)]).reshape(-1, 37)
    with ops.using_cpu_path(path):
        stored = ops.quantize(values, Precision.FP16)
    np.testing.assert_array_equal(stored, values.astype(np.float16).view(np.uint8))
