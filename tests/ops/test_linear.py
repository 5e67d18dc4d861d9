"""FC layers at low precision: PyTorch's operators against the definition, and the definition against its words."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.core.errors import KernelError, PlanError, WeightError
from lowprec.ops import linear as linear_ops
from lowprec.ops.clip import PERCENTILE, input_bounds, input_code, weight_bound
from lowprec.ops.linear import low_linear, outlier_positions, safe_input_bits, weight_scales
from lowprec.ops.reference.linear import emulated_linear, int8_linear, quantize_inputs, quantize_weights, rounded
from lowprec.plan import Precision
from lowprec.plan.layer_form import Arithmetic, ClipRange, FloatFormat, LayerForm, WeightScale

FORMS = [(weights, clip) for weights in WeightScale for clip in ClipRange]
# Without VNNI inputs of 8 bits overflow, and are refused.
BITS = [7, 8] if safe_input_bits() == 8 else [7]
SHAPES = [(1, 1), (3, 7), (16, 33), (64, 128)]


def layer(num_out, num_in, *, rows=50, seed=0, shift=1.0):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((num_out, num_in)).astype(np.float32)
    bias = rng.standard_normal(num_out).astype(np.float32)
    x = (3 * rng.standard_normal((rows, num_in)) + shift).astype(np.float32)
    return torch.from_numpy(weight), torch.from_numpy(bias), torch.from_numpy(x)


def close_to(found, expected, weight, x):
    """Sums of integers are exact, so only the scaling and the bias round: a few ulp of the largest term."""
    largest = float(weight.abs().sum(dim=1).max() * x.abs().max()) + 10
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=4 * np.finfo(np.float32).eps * largest)


def calibrated(x, clip, bits):
    counts, edges = np.histogram(x.numpy(), 1024)
    return input_code(*input_bounds(edges.astype(np.float64), counts, clip, bits), bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("weights, clip", FORMS)
@pytest.mark.parametrize("num_out, num_in", SHAPES)
def test_static_int8_is_its_definition(num_out, num_in, weights, clip, bits):
    weight, bias, x = layer(num_out, num_in)
    scale, zero_point = calibrated(x, clip, bits)
    form = LayerForm(weights, clip, 0.0, bits, scale, zero_point)
    scales = weight_scales(weight, form).numpy()
    codes = quantize_weights(weight.numpy(), scales)
    expected = int8_linear(
        quantize_inputs(x.numpy(), scale, zero_point, bits), scale, zero_point, codes, scales, bias.numpy()
    )
    close_to(low_linear(weight, bias, Precision.INT8_STATIC, form)(x), expected, weight, x)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("weights, clip", FORMS)
@pytest.mark.parametrize("num_out, num_in", SHAPES)
def test_dynamic_int8_takes_the_range_of_each_batch(num_out, num_in, weights, clip, bits):
    weight, bias, x = layer(num_out, num_in, shift=-2.0)
    form = LayerForm(weights, clip, 0.0, bits)
    low = low_linear(weight, bias, Precision.INT8_DYNAMIC, form)
    scales = weight_scales(weight, form).numpy()
    codes = quantize_weights(weight.numpy(), scales)
    for batch in (x, 10 * x[:7]):
        scale, zero_point = input_code(min(float(batch.min()), 0), max(float(batch.max()), 0), bits)
        inputs = quantize_inputs(batch.numpy(), scale, zero_point, bits)
        close_to(low(batch), int8_linear(inputs, scale, zero_point, codes, scales, bias.numpy()), weight, batch)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-3, 10), st.integers(0, 2 ** BITS[-1] - 1), st.integers(0, 2**32 - 1))
def test_codes_of_inputs_are_those_of_fbgemm_also_where_they_tie(scale, zero_point, seed):
    rng = np.random.default_rng(seed)
    near_ties = (rng.integers(-300, 300, 400) + 0.5) * np.float32(scale)
    x = np.concatenate([near_ties, rng.uniform(-300, 300, 400) * scale]).astype(np.float32)[:, None]
    form = LayerForm(input_bits=BITS[-1], input_scale=float(np.float32(scale)), input_zero_point=zero_point)
    one = torch.ones(1, 1)
    y = low_linear(one, None, Precision.INT8_STATIC, form)(torch.from_numpy(x)).numpy()
    codes = np.rint(y / (np.float32(scale) * (np.float32(1) / 127) * 127)).astype(int) + zero_point
    np.testing.assert_array_equal(codes, quantize_inputs(x, form.input_scale, zero_point, BITS[-1]))


@pytest.mark.parametrize("num_out, num_in", SHAPES)
def test_fp16_and_bf16_round_what_they_say(num_out, num_in):
    weight, bias, x = layer(num_out, num_in)
    largest = float((x.abs() @ weight.abs().T).max() + 3)
    half = torch.nn.functional.linear(x.double(), weight.half().double(), bias.double())
    found = low_linear(weight, bias, Precision.FP16)(x)
    assert found.dtype is torch.float32
    # The order of num_in additions in fp32 is the operator's own.
    assert float((found - half).abs().max()) <= num_in * 2.0**-24 * largest
    plain = torch.nn.functional.linear(x.bfloat16().double(), weight.bfloat16().double(), bias.bfloat16().double())
    found = low_linear(weight, bias, Precision.BF16)(x)
    # The result is rounded to bf16, before the bias or after it: 8 bits each.
    assert float((found - plain).abs().max()) <= (2 * 2.0**-8 + num_in * 2.0**-24) * largest
    assert torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize("num_out, num_in", SHAPES)
@pytest.mark.parametrize("is_biased", [True, False])
def test_bf16_is_the_same_with_and_without_instructions_for_it(num_out, num_in, is_biased, monkeypatch):
    """PyTorch's operator, and the product in fp32 of what was rounded: but for the order of sums in fp32."""
    weight, bias, x = layer(num_out, num_in, rows=2000)
    bias = bias if is_biased else None
    found = []
    for has in (True, False):
        monkeypatch.setattr("lowprec.ops.linear.has_bf16_instructions", lambda has=has: has)
        found.append(low_linear(weight, bias, Precision.BF16)(x))
    exact = torch.nn.functional.linear(x.bfloat16().double(), weight.bfloat16().double())
    exact = exact if bias is None else exact + bias.bfloat16().double()
    one_step = 2.0**-7 * exact.abs() + num_in * 2.0**-24 * float((x.abs() @ weight.abs().T).max())
    for one in found:
        assert float((one == exact.bfloat16()).float().mean()) > 0.999
        assert bool(((one - exact).abs() <= one_step).all())
    assert float((found[0] == found[1]).float().mean()) > 0.999


@pytest.mark.parametrize("precision", [Precision.INT8_STATIC, Precision.INT8_DYNAMIC])
def test_outliers_are_kept_beside_the_int8_part(precision):
    weight, bias, x = layer(16, 40)
    weight[3, 5], weight[9, 1], weight[9, 2] = 60.0, -80.0, 70.0
    scale, zero_point = calibrated(x, ClipRange.MINMAX, BITS[-1])
    static = {"input_scale": scale, "input_zero_point": zero_point} if precision is Precision.INT8_STATIC else {}
    exact = torch.nn.functional.linear(x, weight, bias)
    error = {}
    for outliers in (0.0, 3 / weight.numel()):
        form = LayerForm(WeightScale.TENSOR, outliers=outliers, input_bits=BITS[-1], **static)
        error[outliers] = float((low_linear(weight, bias, precision, form)(x) - exact).square().mean())
    assert error[3 / weight.numel()] < error[0.0] / 50
    rows, columns = outlier_positions(weight, 3 / weight.numel())
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [(3, 5), (9, 1), (9, 2)]
    assert [len(part) for part in outlier_positions(weight, 1e-9)] == [1, 1]


def test_a_channel_of_zeros_gives_its_bias():
    weight, bias, x = layer(4, 6)
    weight[2] = 0.0
    for precision, form in (
        (Precision.INT8_DYNAMIC, LayerForm(input_bits=BITS[-1])),
        (Precision.INT8_STATIC, LayerForm(**static_of(x))),
    ):
        found = low_linear(weight, bias, precision, form)(x)
        assert torch.equal(found[:, 2], bias[2].expand(len(x)))


def static_of(x):
    scale, zero_point = calibrated(x, ClipRange.MINMAX, BITS[-1])
    return {"input_bits": BITS[-1], "input_scale": scale, "input_zero_point": zero_point}


def test_seven_bits_of_calibrated_inputs_are_clipped_to_seven_bits():
    weight, bias, x = layer(4, 6)
    scale, zero_point = calibrated(x, ClipRange.MINMAX, 7)
    form = LayerForm(input_bits=7, input_scale=scale, input_zero_point=zero_point)
    low = low_linear(weight, bias, Precision.INT8_STATIC, form)
    top = (127 - zero_point) * scale
    assert torch.equal(low(torch.full((1, 6), 100 * top)), low(torch.full((1, 6), top)))


@pytest.mark.parametrize("precision", [Precision.INT8_STATIC, Precision.INT8_DYNAMIC])
def test_inputs_of_more_bits_than_the_cpu_adds_exactly_are_refused(precision, monkeypatch):
    weight, bias, _ = layer(4, 6)
    static = {"input_scale": 0.1, "input_zero_point": 3} if precision is Precision.INT8_STATIC else {}
    monkeypatch.setattr(linear_ops, "safe_input_bits", lambda: 7)
    with pytest.raises(KernelError, match=r"8 bits would overflow on this CPU, which has no VNNI .*input_bits: 7"):
        low_linear(weight, bias, precision, LayerForm(**static))
    low_linear(weight, bias, precision, LayerForm(input_bits=7, **static))


def test_seven_bits_are_safe_whatever_the_weights_are():
    """64 products of the largest codes: what overflows is two of them, on a CPU that adds in 16 bits."""
    weight, x = torch.ones(8, 64), torch.ones(1, 64)
    for bits in BITS:
        form = LayerForm(input_bits=bits, input_scale=1 / (2**bits - 1), input_zero_point=0)
        found = low_linear(weight, None, Precision.INT8_STATIC, form)(x)
        torch.testing.assert_close(found, torch.full((1, 8), 64.0))


def test_a_weight_beyond_fp16_is_refused():
    weight, bias, _ = layer(2, 2)
    weight[0, 0] = 1e5
    with pytest.raises(WeightError, match="100000 is beyond fp16"):
        low_linear(weight, bias, Precision.FP16)


@pytest.mark.parametrize("clip", ClipRange)
def test_weight_bounds_do_what_they_are_called(clip):
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.standard_normal((5, 2000)), 40 * np.ones((5, 1))], axis=1).astype(np.float32)
    bound = weight_bound(values, clip)
    size = np.abs(values)

    def error(b):
        step = b / np.float32(127)
        return np.square(np.clip(np.rint(values / step), -127, 127) * step - values, dtype=np.float64).sum(axis=1)

    if clip is ClipRange.MINMAX:
        assert (bound[:, 0] == size.max(axis=1)).all()
    elif clip is ClipRange.PERCENTILE:
        assert ((size <= bound).mean(axis=1) >= PERCENTILE).all() and (bound < 10).all()
    else:
        assert (error(bound) <= error(size.max(axis=1, keepdims=True))).all()
        tried = [error(size.max(axis=1, keepdims=True) * np.float32(s)) for s in np.linspace(0.25, 1, 40)]
        assert (error(bound) <= 1.02 * np.min(tried, axis=0)).all()
    assert weight_bound(np.zeros((2, 3), np.float32), clip).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("bits", [7, 8])
def test_input_bounds_hold_zero_and_lose_least(bits):
    rng = np.random.default_rng(1)
    x = np.concatenate([np.maximum(rng.standard_normal(20_000), 0), [30.0]])
    counts, edges = np.histogram(x, 4096)

    def error(bounds):
        scale, zero_point = input_code(*bounds, bits)
        codes = np.clip(np.rint(x / scale) + zero_point, 0, 2**bits - 1)
        return np.square((codes - zero_point) * scale - x).sum()

    bounds = {clip: input_bounds(edges, counts, clip, bits) for clip in ClipRange}
    assert all(lower <= 0 <= upper for lower, upper in bounds.values())
    assert bounds[ClipRange.MINMAX] == (0.0, 30.0)
    assert bounds[ClipRange.PERCENTILE][1] < 5
    assert error(bounds[ClipRange.MSE]) <= 1.02 * min(error((0.0, 30.0 * s)) for s in np.linspace(0.25, 1, 40))
    positive = input_bounds(np.array([2.0, 3.0]), np.array([5]), ClipRange.MSE, bits)
    assert positive[0] == 0.0 and input_code(*positive, bits)[1] == 0


@pytest.mark.parametrize("to, dtype", [(FloatFormat.FP16, torch.float16), (FloatFormat.BF16, torch.bfloat16)])
def test_rounding_to_a_format_is_that_of_pytorch(to, dtype):
    rng = np.random.default_rng(2)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    halves = (np.arange(0, 2**16, dtype=np.uint32) << 16) + 0x8000
    x = np.concatenate([bits, halves]).view(np.float32)
    expected = torch.from_numpy(x).to(dtype).float().numpy()
    np.testing.assert_array_equal(rounded(x, to), expected)


def test_emulated_arithmetic_is_what_its_description_says():
    weight, bias, x = (part.numpy() for part in layer(3, 10, rows=4))
    arithmetic = Arithmetic(block=4)
    expected = np.empty((4, 3), np.float32)
    for i in range(4):
        for j in range(3):
            total = np.float16(0)
            for first in range(0, 10, 4):
                part = np.float32(0)
                for k in range(first, min(first + 4, 10)):
                    part += np.float32(np.float16(x[i, k])) * np.float32(np.float16(weight[j, k]))
                total = np.float16(np.float32(total) + part)
            expected[i, j] = np.float16(np.float32(total) + bias[j])
    np.testing.assert_array_equal(emulated_linear(x, weight, bias, arithmetic), expected)
    plain = Arithmetic(*[FloatFormat.FP32] * 4)
    np.testing.assert_allclose(emulated_linear(x, weight, bias, plain), x @ weight.T + bias, rtol=1e-5, atol=1e-5)
    low = low_linear(*map(torch.from_numpy, (weight, bias)), Precision.EMULATED, arithmetic)
    np.testing.assert_array_equal(low(torch.from_numpy(x)).numpy(), expected)


def test_coarser_sums_cost_accuracy():
    weight, bias, x = (part.numpy() for part in layer(8, 256, rows=64))
    exact = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
    error = [
        np.square(emulated_linear(x, weight, bias, Arithmetic(accumulate=to, block=block)) - exact).mean()
        for to, block in ((FloatFormat.FP32, 1), (FloatFormat.FP16, 32), (FloatFormat.FP16, 1), (FloatFormat.BF16, 1))
    ]
    assert error == sorted(error) and error[-1] > 10 * error[0]


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"outliers": 1.0}, "share from 0 to 1"),
        ({"input_bits": 4}, "must be 7 or 8"),
        ({"input_scale": 0.1}, "come together"),
        ({"outliers": "many"}, "share from 0 to 1; got 'many'"),
        ({"input_scale": -0.1, "input_zero_point": 3}, "finite number above 0; got -0.1"),
        ({"input_scale": float("inf"), "input_zero_point": 3}, "finite number above 0; got inf"),
        ({"input_scale": "x", "input_zero_point": 3}, "finite number above 0; got 'x'"),
        ({"input_bits": 6, "input_scale": 0.1, "input_zero_point": 100}, "must be 7 or 8; got 6"),
        ({"input_scale": 0.1, "input_zero_point": 3.5}, "code of 8 bits; got 3.5"),
        ({"input_scale": 0.1, "input_zero_point": 300}, "code of 8 bits"),
    ],
)
def test_forms_that_make_no_sense_are_refused(wrong, said):
    with pytest.raises(PlanError, match=said):
        LayerForm(**wrong)


def test_forms_come_back_from_their_documents():
    for form in (LayerForm(), LayerForm(WeightScale.TENSOR, ClipRange.MSE, 0.01, 7, 0.1, 5)):
        assert LayerForm.from_dict(form.to_dict(), where="here") == form
    arithmetic = Arithmetic(accumulate=FloatFormat.BF16, block=1)
    assert Arithmetic.from_dict(arithmetic.to_dict(), where="here") == arithmetic
    with pytest.raises(PlanError, match="here: is not the form of an int8 layer"):
        LayerForm.from_dict({"weights": "rows", "range": "mse"}, where="here")
    with pytest.raises(PlanError, match="here: misses 'range' of an int8 layer"):
        LayerForm.from_dict({"weights": "channel"}, where="here")
    with pytest.raises(PlanError, match="here: an int8 layer has no colour"):
        LayerForm.from_dict({**LayerForm().to_dict(), "colour": "red"}, where="here")
    with pytest.raises(PlanError, match="here: does not describe an arithmetic"):
        Arithmetic.from_dict({"inputs": "fp12", "block": 1}, where="here")
