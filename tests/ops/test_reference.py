"""The definition, against hand-worked rows and its own laws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowprec.core.errors import WeightError
from lowprec.ops import reference


def stored_row(values: list[float], bits: int) -> tuple[float, float, list[int]]:
    stored = reference.quantize_rows(np.array([values], np.float32), bits)[0]
    scale, bias = stored[:4].view(np.float16)
    return float(scale), float(bias), stored[4:].tolist()


def test_codes_lie_low_order_bits_first_behind_scale_and_bias() -> None:
    assert stored_row([0.0, 1.0, 2.0, 3.0, 2.0], 2) == (1.0, 0.0, [0b11_10_01_00, 0b10])
    assert stored_row([0.0, 15.0, 7.0], 4) == (1.0, 0.0, [0xF0, 0x07])
    assert stored_row([-1.0, 254.0], 8) == (1.0, -1.0, [0, 255])


def test_ties_go_to_the_even_code() -> None:
    assert stored_row([0.0, 0.5, 1.5, 2.5, 15.0, 14.5], 4) == (1.0, 0.0, [0x00, 0x22, 0xEF])


def test_bias_is_rounded_before_the_range_is_taken() -> None:
    # 1 + 2**-12 rounds to 1; the range is taken from there, so the constant row gets the top code.
    scale, bias, codes = stored_row([1 + 2**-12] * 2, 4)
    assert (bias, codes) == (1.0, [0xFF])
    assert scale == float(np.float16(2**-12 / 15))


def test_scale_is_negative_where_the_bias_was_rounded_up_beyond_the_row() -> None:
    scale, bias, codes = stored_row([1 - 2**-13] * 2, 4)
    assert bias == 1.0
    assert scale == -float(np.float16(2**-13 / 15))
    assert codes == [0xFF]


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_constant_and_zero_rows_that_fp16_holds_are_exact(bits: int) -> None:
    for value in (0.0, -0.0, 1.0, -65504.0, 2.0**-24):
        assert stored_row([value] * 5, bits)[:2] == (1.0, value)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_fp16_overflow_gives_infinite_scale_or_bias_and_zero_codes(bits: int) -> None:
    max_code = 2**bits - 1
    for values in ([-65520.0, 0.0], [65520.0, 7e4], [0.0, 65520.0 * max_code]):
        scale, bias, codes = stored_row(values, bits)
        assert np.isinf(scale)
        assert np.isinf(bias) == (values[0] != 0)
        assert not any(codes)
    assert np.isfinite(stored_row([-65519.0, 0.0], bits)[:2]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_refused_by_its_number(bad: float) -> None:
    rows = np.ones((5, 3), np.float32)
    rows[3, 1] = rows[4, 0] = bad
    with pytest.raises(WeightError, match="row 3 "):
        reference.quantize_rows(rows, 8)


@pytest.mark.parametrize("bits", [8, 4, 2])
@given(
    dim=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
    log_scale=st.integers(-9, 2),  # with the offset, up to 1e4: below the range of fp16
    offset=st.floats(-100, 100),
)
def test_restored_values_are_within_half_a_step(bits: int, dim: int, seed: int, log_scale: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    rows = ((rng.standard_normal((20, dim)) + offset) * 10.0**log_scale).astype(np.float32)
    max_code = 2**bits - 1
    restored = reference.dequantize_rows(reference.quantize_rows(rows, bits), bits, dim).astype(np.float64)
    smallest = rows.min(axis=1).astype(np.float64)
    width = np.abs(rows.max(axis=1) - smallest.astype(np.float16).astype(np.float64))
    # Half a step; the bias is off by half an fp16 place (2**-11 relative, at least 2**-25), and values below it are cut
    # off there; a scale that was rounded down leaves the top of the range short by max_code such places; and the fp32
    # arithmetic, five roundings of numbers no larger than the row's largest.
    bias_error = np.maximum(np.abs(smallest) * 2**-11, 2**-25)
    top_error = np.maximum(width * 2**-11, max_code * 2**-25)
    fp32_error = 5 * 2**-24 * np.abs(rows).max(axis=1)
    bound = width / max_code / 2 * (1 + 2**-10) + bias_error + top_error + fp32_error
    assert (np.abs(restored - rows).max(axis=1) <= bound).all()
