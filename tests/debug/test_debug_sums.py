"""Sums of errors against formulas written out in float64."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowprec.debug.sums import MAX_ROWS, ErrorSums


def outputs(seed, num_rows=200, num_channels=5):
    rng = np.random.default_rng(seed)
    y = rng.normal(0, 2, (num_rows, num_channels)).astype(np.float32)
    return y, (y + rng.normal(0.05, 0.1, y.shape)).astype(np.float32)


def sums_of(y, x):
    return ErrorSums.of(torch.from_numpy(y), torch.from_numpy(x))


def test_every_measure_is_its_formula():
    y, x = outputs(0)
    sums, e = sums_of(y, x), x.astype(np.float64) - y
    found, wide = sums.to_dict(), y.astype(np.float64)
    # Sums of a thousand fp32 numbers are off by less than a part in a hundred thousand.
    assert found["sqnr_db"] == pytest.approx(10 * math.log10((wide**2).sum() / (e**2).sum()), abs=1e-4)
    assert found["cosine"] == pytest.approx(
        (wide * x).sum() / np.linalg.norm(wide) / np.linalg.norm(x.astype(float)), abs=1e-6
    )
    assert found["max_error"] == pytest.approx(np.abs(e).max(), rel=1e-5)
    assert found["mean_error"] == pytest.approx(np.abs(e).mean(), rel=1e-5)
    assert found["bias"] == pytest.approx(e.mean(), rel=1e-4)
    assert found["num_not_finite"] == 0 and sums.num_values == y.size
    by_channel = 10 * np.log10((wide**2).sum(axis=0) / (e**2).sum(axis=0))
    np.testing.assert_allclose(sums.sqnr_db_by_channel, by_channel, atol=1e-4)
    np.testing.assert_allclose(sums.largest, np.abs(e).max(axis=0), rtol=1e-5)


@given(st.lists(st.integers(1, 40), min_size=3, max_size=3), st.integers(0, 2**32 - 1))
def test_adding_is_associative_and_the_sum_of_parts_is_that_of_the_whole(sizes, seed):
    y, x = outputs(seed, sum(sizes))
    ends = np.cumsum([0, *sizes])
    a, b, c = (sums_of(y[i:j], x[i:j]) for i, j in pairwise(ends))
    for found in (a + (b + c), sums_of(y, x)):
        for name, value in vars((a + b) + c).items():
            # A sum of signed errors may be far smaller than what was added.
            np.testing.assert_allclose(getattr(found, name), value, rtol=1e-5, atol=1e-4, err_msg=name)
    assert np.array_equal(((a + b) + c).largest, (a + (b + c)).largest)


def test_equal_outputs_have_no_error():
    y, _ = outputs(1)
    for sums in (sums_of(y, y), sums_of(y, y.copy())):
        assert math.isinf(sums.sqnr_db) and sums.cosine == 1
        document = sums.to_dict()
        assert document["sqnr_db"] is None and document["max_error"] == document["mean_error"] == 0


def test_opposite_outputs_have_the_opposite_angle():
    y, _ = outputs(2)
    assert sums_of(y, -y).cosine == pytest.approx(-1, abs=1e-5)
    assert sums_of(y, np.zeros_like(y)).cosine == 0
    assert sums_of(np.zeros_like(y), y).sqnr_db == -math.inf


def test_values_that_are_not_finite_are_counted_and_left_out():
    """Also what the reference has in their place, or one huge row would make the rest look exact."""
    y, x = outputs(3)
    y[7] = 1e8
    x[7], x[11, 2], x[12, 3] = np.inf, np.nan, -np.inf
    sums = sums_of(y, x)
    kept = np.isfinite(x)
    e = np.where(kept, x.astype(np.float64) - y, 0)
    assert sums.num_not_finite == 7 == (~kept).sum()
    assert sums.sqnr_db == pytest.approx(
        10 * math.log10(np.square(y[kept], dtype=float).sum() / (e**2).sum()), abs=1e-4
    )
    np.testing.assert_allclose(sums.magnitude, np.abs(e).sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(sums.largest, np.abs(e).max(axis=0), rtol=1e-5)


def test_the_first_rows_are_summed_and_all_are_looked_through():
    y, x = outputs(4, MAX_ROWS + 300)
    x[MAX_ROWS:] += 1000
    sums = sums_of(y, x)
    assert sums.num_summed == MAX_ROWS < sums.num_rows and sums.num_not_finite == 0 and sums.largest.max() < 1
    assert sums.sqnr_db == pytest.approx(sums_of(y[:MAX_ROWS], x[:MAX_ROWS]).sqnr_db, abs=1e-6)
    x[MAX_ROWS + 5, 1] = np.nan
    wrong = sums_of(y, x)
    assert wrong.num_not_finite == 1 and wrong.error2 == pytest.approx(sums.error2)
    assert sums_of(y[:MAX_ROWS], x).num_not_finite == 1


@pytest.mark.parametrize("size", [1e20, 1e30, 3e38])
def test_values_whose_squares_are_beyond_fp32_are_summed_all_the_same(size):
    """As an fp32 table of random bytes has them."""
    y, x = outputs(5)
    x[3, 1] = size
    e = x.astype(np.float64) - y
    assert sums_of(y, x).sqnr_db == pytest.approx(
        10 * math.log10(np.square(y, dtype=float).sum() / (e**2).sum()), abs=1e-4
    )
    found = sums_of(x, y).to_dict()
    assert found["sqnr_db"] == pytest.approx(0, abs=1e-4) and found["cosine"] == pytest.approx(0, abs=1e-6)
    json.dumps([found, sums_of(x, -x).to_dict(), sums_of(x, x).to_dict()], allow_nan=False)
