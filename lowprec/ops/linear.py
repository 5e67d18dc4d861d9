"""FC layers as serving computes them: PyTorch's low-precision operators, or an emulation where it has none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from lowprec.errors import KernelError, WeightError
from lowprec.layer_form import Arithmetic, LayerForm, WeightScale
from lowprec.ops.clip import weight_bound
from lowprec.ops.reference.linear import WEIGHT_CODES, emulated_linear, quantize_weights
from lowprec.plan import Precision

__all__ = ["LowLinear", "low_linear", "outlier_positions", "safe_input_bits", "weight_scales"]

# y = f(x): float32[B, in] to float32[B, out].
LowLinear = Callable[[Tensor], Tensor]

_ENGINE = "fbgemm"
FP16_MAX = 65504.0


def low_linear(
    weight: Tensor, bias: Tensor | None, precision: Precision, form: LayerForm | Arithmetic | None = None
) -> LowLinear:
    """The layer with weight float32[out, in] and bias float32[out] at a precision, ready to be called.

    fp16: weights fp16, sums fp32 (`quantized::linear_dynamic_fp16`). bf16: inputs, weights and outputs bf16.
    int8_dynamic: `quantized::linear_dynamic`, one input scale for each batch: a row's output depends on its company.
    int8_static: inputs quantized as they were calibrated, fp32 outputs
    (`quantized::linear_with_input_q_dq_qweight_dq_output_fp32`). emulated: the definition in `ops.reference`, slowly.

    Raises `KernelError` where PyTorch has no such operator on this CPU, `WeightError` for a weight beyond fp16.
    """
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    if precision is Precision.FP32:
        return lambda x: linear(x, weight, bias)
    if precision is Precision.BF16:
        low, low_bias = weight.bfloat16(), None if bias is None else bias.bfloat16()
        return lambda x: linear(x.bfloat16(), low, low_bias).float()
    if precision is Precision.FP16:
        return _fp16(weight, bias)
    if precision is Precision.EMULATED:
        assert isinstance(form, Arithmetic), "an emulated layer has an arithmetic"
        return _emulated(weight, bias, form)
    assert isinstance(form, LayerForm), "an int8 layer has a form"
    return _int8(weight, bias, form)


@cache
def safe_input_bits() -> int:
    """8 where this CPU adds products of int8 codes exactly, 7 where they overflow 16 bits on the way (no VNNI)."""
    x, weight = torch.ones(1, 64), torch.ones(8, 64)
    form = LayerForm(input_scale=1 / 255, input_zero_point=0)
    found = low_linear(weight, None, Precision.INT8_STATIC, form)(x)
    return 8 if bool((found - 64).abs().max() < 0.1) else 7


def weight_scales(weight: Tensor, form: LayerForm) -> Tensor:
    """The scale of every output channel's codes, float32[out, 1]: those of a tensor are equal.

    weight: float32[out, in], without the outliers.
    """
    values = weight.numpy() if form.weights is WeightScale.CHANNEL else weight.reshape(1, -1).numpy()
    bound = weight_bound(values, form.range) / np.float32(WEIGHT_CODES)
    return torch.from_numpy(bound).expand(len(weight), 1).contiguous()


def outlier_positions(weight: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Rows and columns of the largest `share` of the weights by magnitude, at least one; of equal ones the first."""
    if share == 0:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    count = max(1, round(share * weight.numel()))
    flat = weight.abs().reshape(-1).numpy()
    chosen = np.sort(np.argsort(-flat, kind="stable")[:count])
    return torch.from_numpy(chosen // weight.shape[1]), torch.from_numpy(chosen % weight.shape[1])


def _fp16(weight: Tensor, bias: Tensor | None) -> LowLinear:
    largest = float(weight.abs().max())
    if largest > FP16_MAX:
        raise WeightError(f"a weight of {largest:g} is beyond fp16 (65504)")
    with _engine():
        packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    op = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda x: op(x, packed)


def _int8(weight: Tensor, bias: Tensor | None, form: LayerForm) -> LowLinear:
    rows, columns = outlier_positions(weight, form.outliers)
    outliers = weight[rows, columns]
    main = weight.clone()
    main[rows, columns] = 0.0
    packed = _packed(main, bias, form)
    low: LowLinear
    if form.is_static:
        scale, zero_point, top = form.input_scale, form.input_zero_point, 2**form.input_bits - 1
        assert scale is not None and zero_point is not None
        static = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        lower, upper = -zero_point * scale, (top - zero_point) * scale
        if form.input_bits == 8:
            low = lambda x: static(x, scale, zero_point, packed)  # noqa: E731
        else:
            # PyTorch quantizes to 8 bits here whatever the range.
            low = lambda x: static(x.clamp(lower, upper), scale, zero_point, packed)  # noqa: E731
    else:
        dynamic, is_reduced = torch.ops.quantized.linear_dynamic.default, form.input_bits == 7
        low = lambda x: dynamic(x, packed, is_reduced)  # noqa: E731
    if not len(outliers):
        return low
    return lambda x: low(x).index_add_(1, rows, x[:, columns] * outliers)


def _packed(weight: Tensor, bias: Tensor | None, form: LayerForm) -> Any:
    scale = weight_scales(weight, form)
    codes = torch.from_numpy(quantize_weights(weight.numpy(), scale.numpy()))
    # A row of zeros has scale 0, which PyTorch refuses; with codes of zero any scale says the same.
    usable = torch.where(scale > 0, scale, 1.0)[:, 0].double()
    zeros = torch.zeros(len(codes), dtype=torch.int64)
    with warnings.catch_warnings(), _engine():
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor")  # deprecated, and nothing in its place yet
        if form.weights is WeightScale.CHANNEL:
            quantized = torch._make_per_channel_quantized_tensor(codes, usable, zeros, 0)
        else:
            quantized = torch._make_per_tensor_quantized_tensor(codes, float(usable[0]), 0)
        return torch.ops.quantized.linear_prepack(quantized, bias)


def _emulated(weight: Tensor, bias: Tensor | None, arithmetic: Arithmetic) -> LowLinear:
    w, b = weight.numpy(), None if bias is None else bias.numpy()
    return lambda x: torch.from_numpy(emulated_linear(x.numpy(), w, b, arithmetic))


@contextmanager
def _engine() -> Iterator[None]:
    """FBGEMM packs the weights within; whoever packs decides who computes."""
    if _ENGINE not in torch.backends.quantized.supported_engines:
        raise KernelError(
            f"PyTorch has no {_ENGINE} engine on this CPU, which int8 and fp16 layers need; leave them fp32 or bf16"
        )
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = _ENGINE
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
