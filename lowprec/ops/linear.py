"""FC layers as serving computes them: PyTorch operators, or an emulation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lowprec.core.errors import KernelError, WeightError
from lowprec.ops.clip import weight_bound
from lowprec.ops.reference.linear import WEIGHT_CODES, emulated_linear, quantize_weights
from lowprec.plan import Precision
from lowprec.plan.layer_form import Arithmetic, LayerForm, WeightScale

__all__ = [
    "LowLinear",
    "has_bf16_instructions",
    "low_linear",
    "outlier_positions",
    "restored_weight",
    "safe_input_bits",
    "served_linear",
    "stored_linear",
    "weight_scales",
]

# Called with float32[B, in], it returns float32[B, out].
LowLinear = nn.Module

_ENGINE = "fbgemm"
FP16_MAX = 65504.0


def low_linear(
    weight: Tensor, bias: Tensor | None, precision: Precision, form: LayerForm | Arithmetic | None = None
) -> LowLinear:
    """The layer with weight float32[out, in] and bias float32[out] at a precision, ready to be called.

    fp16: weights fp16, sums fp32 (`quantized::linear_dynamic_fp16`). bf16: inputs, weights and outputs bf16, sums fp32;
    by PyTorch's operator where the CPU has instructions for it, else as a product in fp32 of what was rounded.
    int8_dynamic: `quantized::linear_dynamic`, one input scale for each batch: a row's output depends on its company.
    int8_static: inputs quantized as they were calibrated, fp32 outputs
    (`quantized::linear_with_input_q_dq_qweight_dq_output_fp32`). emulated: the definition in `ops.reference`, slowly.

    Raises `KernelError` where PyTorch has no such operator on this CPU or it adds codes of so many bits wrongly (see
    `safe_input_bits`), `WeightError` for a weight beyond fp16.
    """
    return served_linear(stored_linear(weight, bias, precision, form), precision, form)


def stored_linear(
    weight: Tensor, bias: Tensor | None, precision: Precision, form: LayerForm | Arithmetic | None = None
) -> dict[str, Tensor]:
    """What serving stores of the layer: all that `served_linear` needs beside precision and form.

    weight: float32[out, in] (fp32, emulated), float16, bfloat16, or for int8 `codes` int8[out, in] and `scales`
    float32[out or 1], with `outlier_rows`, `outlier_columns` int32[n] and `outliers` float32[n] where the form has
    some. bias: float32[out] (bfloat16 at bf16) where there is one. Raises `WeightError` for a weight beyond fp16.
    """
    weight = weight.detach()
    biases = {} if bias is None else {"bias": bias.detach()}
    if precision in (Precision.FP32, Precision.EMULATED):
        return {"weight": weight, **biases}
    if precision is Precision.BF16:
        return {name: tensor.bfloat16() for name, tensor in {"weight": weight, **biases}.items()}
    if precision is Precision.FP16:
        largest = float(weight.abs().max())
        if largest > FP16_MAX:
            raise WeightError(f"a weight of {largest:g} is beyond fp16 (65504)")
        return {"weight": weight.half(), **biases}
    assert isinstance(form, LayerForm), "an int8 layer has a form"
    rows, columns = outlier_positions(weight, form.outliers)
    outliers = weight[rows, columns]
    main = weight.clone()
    main[rows, columns] = 0.0
    scale = weight_scales(main, form)
    codes = torch.from_numpy(quantize_weights(main.numpy(), scale.numpy()))
    scales = scale[:, 0] if form.weights is WeightScale.CHANNEL else scale[0]
    found = {"codes": codes, "scales": scales.clone(), **biases}
    return found | {"outlier_rows": rows, "outlier_columns": columns, "outliers": outliers} if form.outliers else found


def served_linear(
    stored: Mapping[str, Tensor], precision: Precision, form: LayerForm | Arithmetic | None = None
) -> LowLinear:
    """The layer that `stored_linear` stored, as a module: float32[B, in] to float32[B, out].

    Raises `KernelError` where PyTorch has no operator for it on this CPU, or the CPU adds inputs of so many bits
    wrongly.
    """
    bias = stored.get("bias")
    if precision is Precision.FP32:
        return _Plain(stored["weight"], bias)
    if precision is Precision.BF16:
        return (_Plain if has_bf16_instructions() else _WidenedBf16)(stored["weight"], bias)
    if precision is Precision.FP16:
        # Every fp16 number is an fp32 one, so that what is packed is what is stored.
        with _engine():
            return _Fp16(torch.ops.quantized.linear_prepack_fp16(stored["weight"].float(), bias))
    if precision is Precision.EMULATED:
        assert isinstance(form, Arithmetic), "an emulated layer has an arithmetic"
        return _Emulated(stored["weight"], bias, form)
    assert isinstance(form, LayerForm), "an int8 layer has a form"
    if form.input_bits > safe_input_bits():
        raise KernelError(
            f"an int8 layer with inputs of {form.input_bits} bits would overflow on this CPU, which has no VNNI "
            "instructions; run it on one that has, or search for a plan here or with space.layers.input_bits: 7, which "
            "both can do"
        )
    packed = _packed(stored["codes"], stored["scales"], bias)
    low = _Int8Static(packed, form) if form.is_static else _Int8Dynamic(packed, form)
    if "outliers" not in stored:
        return low
    return _WithOutliers(low, *(stored[name] for name in ("outlier_rows", "outlier_columns", "outliers")))


def restored_weight(stored: Mapping[str, Tensor]) -> Tensor:
    """The weight float32[out, in] that what `stored_linear` stored stands for."""
    if "codes" not in stored:
        return stored["weight"].float()
    weight = stored["codes"].float() * stored["scales"].reshape(-1, 1)
    if "outliers" in stored:
        # Their codes are zero.
        weight[stored["outlier_rows"], stored["outlier_columns"]] += stored["outliers"]
    return weight


@cache
def safe_input_bits() -> int:
    """8 where this CPU adds products of int8 codes exactly, 7 where they overflow 16 bits on the way (no VNNI)."""
    x, form = torch.ones(1, 64), LayerForm(input_scale=1 / 255, input_zero_point=0)
    codes = torch.full((8, 64), WEIGHT_CODES, dtype=torch.int8)
    found = _Int8Static(_packed(codes, torch.tensor([1 / WEIGHT_CODES]), None), form)(x)
    return 8 if bool((found - 64).abs().max() < 0.1) else 7


@cache
def has_bf16_instructions() -> bool:
    """Whether PyTorch multiplies bf16 matrices with instructions of this CPU; its loops take several times as long."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def weight_scales(weight: Tensor, form: LayerForm) -> Tensor:
    """The scale of every output channel's codes, float32[out, 1]: those of a tensor are equal.

    weight: float32[out, in], without the outliers.
    """
    values = weight.numpy() if form.weights is WeightScale.CHANNEL else weight.reshape(1, -1).numpy()
    bound = weight_bound(values, form.range) / np.float32(WEIGHT_CODES)
    return torch.from_numpy(bound).expand(len(weight), 1).contiguous()


def outlier_positions(weight: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Where the largest `share` of the weights by magnitude are, at least one; of equal ones the first.

    Their rows and columns, int32[n] each.
    """
    if share == 0:
        return torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    count = max(1, round(share * weight.numel()))
    flat = weight.abs().reshape(-1).numpy()
    chosen = np.sort(np.argsort(-flat, kind="stable")[:count])
    rows, columns = (part.astype(np.int32) for part in np.divmod(chosen, weight.shape[1]))
    return torch.from_numpy(rows), torch.from_numpy(columns)


class _Plain(nn.Module):
    """Computed in the format of the weight."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.to(self.weight.dtype), self.weight, self.bias).float()


class _WidenedBf16(_Plain):
    """The same numbers in fp32: products of two bf16 numbers are exact there, and sums are fp32 either way."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return linear(x.bfloat16().float(), self.weight.float(), bias).bfloat16().float()


class _Fp16(nn.Module):
    def __init__(self, packed: Any) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.quantized.linear_dynamic_fp16.default(x, self.packed))


class _Int8Dynamic(nn.Module):
    def __init__(self, packed: Any, form: LayerForm) -> None:
        super().__init__()
        self.packed, self.is_reduced = packed, form.input_bits == 7

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.quantized.linear_dynamic.default(x, self.packed, self.is_reduced))


class _Int8Static(nn.Module):
    def __init__(self, packed: Any, form: LayerForm) -> None:
        super().__init__()
        assert form.input_scale is not None and form.input_zero_point is not None
        self.packed, self.scale, self.zero_point = packed, form.input_scale, form.input_zero_point
        top = 2**form.input_bits - 1
        self.lower, self.upper = -self.zero_point * self.scale, (top - self.zero_point) * self.scale
        self.is_reduced = form.input_bits == 7

    def forward(self, x: Tensor) -> Tensor:
        if self.is_reduced:  # PyTorch quantizes to 8 bits here whatever the range
            x = x.clamp(self.lower, self.upper)
        op = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        return cast(Tensor, op(x, self.scale, self.zero_point, self.packed))


class _WithOutliers(nn.Module):
    """A layer and the few weights beside it that stay fp32."""

    rows: Tensor
    columns: Tensor
    outliers: Tensor

    def __init__(self, low: nn.Module, rows: Tensor, columns: Tensor, outliers: Tensor) -> None:
        super().__init__()
        self.low = low
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)
        self.register_buffer("outliers", outliers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.low(x)
        return y.index_add_(1, self.rows, x[:, self.columns] * self.outliers)


class _Emulated(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None, arithmetic: Arithmetic) -> None:
        super().__init__()
        self._weight, self._bias = weight.numpy(), None if bias is None else bias.numpy()
        self._arithmetic = arithmetic

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(emulated_linear(x.numpy(), self._weight, self._bias, self._arithmetic))


def _packed(codes: Tensor, scales: Tensor, bias: Tensor | None) -> Any:
    # A row of zeros has scale 0, which PyTorch refuses; with codes of zero any scale says the same.
    usable = torch.where(scales > 0, scales, 1.0).double()
    zeros = torch.zeros(len(codes), dtype=torch.int64)
    with warnings.catch_warnings(), _engine():
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor")  # deprecated, and nothing in its place yet
        if len(scales) == len(codes):
            quantized = torch._make_per_channel_quantized_tensor(codes, usable, zeros, 0)
        else:
            quantized = torch._make_per_tensor_quantized_tensor(codes, float(usable[0]), 0)
        return torch.ops.quantized.linear_prepack(quantized, bias)


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
