"""FC layers at every precision, in NumPy: the definition of what they compute.

Integers are exact; PyTorch's operators (FBGEMM) agree up to the last bits of the fp32 numbers around them. The
arithmetic of an accelerator is defined here alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowprec.ops.reference.arithmetic import fma
from lowprec.plan.layer_form import Arithmetic, FloatFormat

__all__ = ["emulated_linear", "int8_linear", "quantize_inputs", "quantize_weights", "rounded"]

Floats = NDArray[np.float32]

WEIGHT_CODES = 127
"""The largest code of a symmetric int8 weight; -128 is not used."""


def rounded(values: Floats, to: FloatFormat) -> Floats:
    """Each value as the format holds it, to nearest even; beyond the largest one it is infinite."""
    if to is FloatFormat.FP32:
        return values
    if to is FloatFormat.FP16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    kept = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) & np.uint64(0xFFFF0000)
    found: Floats = np.where(np.isnan(values), values, kept.astype(np.uint32).view(np.float32))
    return found


def quantize_weights(weight: Floats, scale: Floats) -> NDArray[np.int8]:
    """Codes of a weight float32[out, in] by one scale for each row, float32[out, 1]; a scale of 0 gives 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(scale > 0, np.rint(weight * (np.float32(1) / scale)), 0)
    return np.clip(codes, -WEIGHT_CODES, WEIGHT_CODES).astype(np.int8)


def quantize_inputs(x: Floats, scale: float, zero_point: int, bits: int) -> NDArray[np.uint8]:
    """Codes of inputs: x / scale + zero point in one rounding to fp32, then to nearest even, clipped to `bits`.

    As FBGEMM's vector code does it: by the reciprocal of the scale, fused.
    """
    inverse = np.asarray(np.float32(1) / np.float32(scale))
    codes = np.rint(fma(x, inverse, np.asarray(zero_point, np.float32)))
    return np.clip(codes, 0, 2**bits - 1).astype(np.uint8)


def int8_linear(
    x: NDArray[np.uint8],
    input_scale: float,
    input_zero_point: int,
    weight: NDArray[np.int8],
    weight_scale: Floats,
    bias: Floats | None,
) -> Floats:
    """The layer on codes: float32[B, out] of x uint8[B, in] and weight int8[out, in] with scales float32[out, 1]."""
    sums = (x.astype(np.int64) - input_zero_point) @ weight.astype(np.int64).T
    scale = np.float32(input_scale) * weight_scale[:, 0].astype(np.float32)
    found: Floats = sums.astype(np.float32) * scale
    return found if bias is None else found + bias


def emulated_linear(x: Floats, weight: Floats, bias: Floats | None, arithmetic: Arithmetic) -> Floats:
    """The layer in the arithmetic of an accelerator: float32[B, out].

    x: float32[B, in]; weight: float32[out, in]; bias: float32[out].
    """
    x, weight = rounded(x, arithmetic.inputs), rounded(weight, arithmetic.weights)
    total = np.zeros((len(x), len(weight)), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, x.shape[1], arithmetic.block):
            part = np.zeros_like(total)
            for k in range(first, min(first + arithmetic.block, x.shape[1])):
                part += x[:, k, None] * weight[None, :, k]
            total = rounded(total + part, arithmetic.accumulate)
        return rounded(total if bias is None else total + bias, arithmetic.output)
