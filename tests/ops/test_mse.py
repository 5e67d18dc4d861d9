"""The range `mse`: against `minmax`, the proven least error of a row, and PyTorch's own optimizer."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lowprec import ops
from lowprec.ops import reference
from lowprec.plan import TABLE_PRECISIONS, Precision, RowRange

Floats = NDArray[np.float32]
ROWWISE = [p for p in TABLE_PRECISIONS if p.is_rowwise]
KINDS = ("normal", "uniform", "laplace", "t3", "far", "outlier")


def rows_like(kind: str, num_rows: int, dim: int, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    shape = (num_rows, dim)
    rows = {
        "normal": lambda: rng.standard_normal(shape),
        "uniform": lambda: rng.uniform(-1, 1, shape),
        "laplace": lambda: rng.laplace(0, 1, shape),
        "t3": lambda: rng.standard_t(3, shape),
        "far": lambda: 10 + rng.standard_normal(shape),
        "outlier": lambda: rng.standard_normal(shape) * np.where(rng.random(shape) < 0.03, 8, 1),
    }[kind]()
    return np.asarray(rows, np.float32)


def squared_errors(rows: Floats, precision: Precision, row_range: RowRange) -> NDArray[np.float64]:
    """Of each row, by what its stored form restores to."""
    stored = ops.quantize(rows, precision, row_range=row_range)
    values = ops.dequantize(stored, precision, rows.shape[1]).astype(np.float64)
    squared: NDArray[np.float64] = np.square(values - rows).sum(axis=1)
    return squared


@pytest.mark.parametrize("precision", ROWWISE)
@settings(max_examples=60)
@given(
    dim=st.integers(1, 257),
    kind=st.sampled_from(KINDS),
    log_scale=st.integers(-7, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_row_is_worse_than_minmax(precision: Precision, dim: int, kind: str, log_scale: int, seed: int) -> None:
    rows = rows_like(kind, 40, dim, seed) * np.float32(10.0**log_scale)
    minmax, mse = (squared_errors(rows, precision, row_range) for row_range in RowRange)
    # The two were compared by sums in fp32.
    assert (mse <= minmax * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", ["normal", "laplace", "far", "outlier"])
@pytest.mark.parametrize("precision", [Precision.INT4, Precision.INT2])
def test_the_error_is_near_the_least_that_any_range_has(precision: Precision, kind: str) -> None:
    tolerance = 0.01
    rows = rows_like(kind, 3, 64)
    reached, minmax = (squared_errors(rows, precision, row_range) for row_range in (RowRange.MSE, RowRange.MINMAX))
    least = [
        reference.least_squared_error(row, precision.bits, reached=float(error), tolerance=tolerance)
        for row, error in zip(rows, reached, strict=True)
    ]
    assert (reached >= least).all()
    assert reached.sum() <= 1.05 * sum(least)
    assert minmax.sum() > 1.1 * sum(least)


def test_the_proven_least_error_is_that_of_the_best_pair_of_a_grid() -> None:
    """Pairs of a fine grid, one by one, against the bound, which may be below the least error by its tolerance."""
    row = rows_like("normal", 1, 6, seed=3)[0]
    sizes = np.arange(np.float16(2**-6).view(np.uint16), np.float16(4).view(np.uint16), 4, dtype=np.uint16)
    halves = sizes.view(np.float16).astype(np.float64)
    bias = np.concatenate([-halves, halves])
    best = np.inf
    for scale in halves[halves > 0.1]:
        for sign in (1, -1):
            levels = [bias + sign * scale * code for code in range(4)]
            nearest = [np.min([np.abs(level - x) for level in levels], axis=0) for x in row.astype(np.float64)]
            best = min(best, np.sum(np.square(nearest), axis=0).min())
    reached = float(squared_errors(row[None], Precision.INT2, RowRange.MINMAX)[0])
    bound = reference.least_squared_error(row, 2, reached=reached, tolerance=0.001)
    assert 0.99 * best <= bound <= best < reached


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("kind", ["normal", "uniform", "laplace", "t3", "outlier"])
def test_the_error_is_not_above_that_of_pytorch(kind: str, dim: int) -> None:
    # Not the kind "far": there PyTorch's optimizer leaves its row range far behind, and may not come to an end.
    rows = rows_like(kind, 300, dim)
    stored = torch.ops.quantized.embedding_bag_4bit_prepack(torch.from_numpy(rows), optimized_qparams=True)
    values = torch.ops.quantized.embedding_bag_4bit_unpack(stored).numpy().astype(np.float64)
    theirs = np.square(values - rows).sum(axis=1)
    ours = squared_errors(rows, Precision.INT4, RowRange.MSE)
    assert (ours / theirs).mean() <= 1.0


@pytest.mark.parametrize("precision", ROWWISE)
def test_rows_that_minmax_restores_exactly_or_not_at_all_keep_its_range(precision: Precision) -> None:
    dim = 7
    rows = np.zeros((5, dim), np.float32)
    rows[1], rows[2], rows[3] = 1.5, -0.0, np.linspace(-7e4, 7e4, dim)
    rows[4, 0] = 65520.0 * (2**precision.bits - 1)
    stored = [ops.quantize(rows, precision, row_range=row_range) for row_range in RowRange]
    np.testing.assert_array_equal(stored[0], stored[1])
    assert ops.first_overflow(stored[1], precision) == 3


@pytest.mark.parametrize("precision", ROWWISE)
def test_a_constant_row_between_fp16_numbers_comes_back_almost_exactly(precision: Precision) -> None:
    rows = np.repeat(np.float32([1 + 2**-12, 1000.3, -3.14159, 6e-8])[:, None], 9, axis=1)
    values = ops.dequantize(ops.quantize(rows, precision, row_range=RowRange.MSE), precision, 9)
    np.testing.assert_allclose(values, rows, rtol=2**-20, atol=2**-26)
