"""Row-wise quantization in NumPy: the definition that the native kernel and FBGEMM must agree with, bit for bit.

For a row x of `dim` floats and `bits` of 8, 4 or 2, with half(v) = v rounded to fp16, nearest even:

    bias  = half(min x)
    scale = half((max x - bias) / (2**bits - 1)),   1 where max x == bias, and 1 where that rounds to zero
    code  = clip(round_half_even((x - bias) * (1 / scale)), 0, 2**bits - 1)
    value = scale * code + bias

all in fp32. The source is `FloatToFusedNBitRowwiseQuantizedSBHalf` of FBGEMM 1.8 (which puts scale and bias last and
refuses some dims). Its vectorised body (AVX2) and its scalar loop give the same bytes on every finite row: the
quotient stays below 2**31, where the two would convert differently. What follows from the definition:

- A constant row whose value is an fp16 number, and so a zero row, has scale 1 and codes 0: it is exact.
- Any other constant row has a non-zero distance to its rounded bias, which becomes the top code. Where the bias was
  rounded up beyond the maximum, that distance and the scale are negative; the formula holds all the same.
- A value below a bias that was rounded up, in a row that reaches above it, gets code 0.
- Rows whose scale rounds to zero (a range up to 2**-25 * (2**bits - 1)) get scale 1: every value becomes the bias.
- Scales in the subnormal range of fp16 (below 6.1e-5) carry fewer bits, so codes saturate: such rows lose accuracy.
- fp16 overflow: where the minimum is below -65520 or above 65520, or the range exceeds 65520 * (2**bits - 1), bias or
  scale becomes infinite, all codes are 0, and the row restores as NaN or infinity. `first_overflow` finds such rows.
- NaN and infinity in a row have no code: they are refused (FBGEMM drops NaN without a word).
- The sign of a zero bias is the one that FBGEMM's scan in eight lanes leaves; it never shows in a restored value.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowprec.errors import WeightError

__all__ = ["dequantize_rows", "quantize_rows"]

_LANES = 8


def quantize_rows(rows: NDArray[np.float32], bits: int) -> NDArray[np.uint8]:
    """The stored form of float32[n, dim]: uint8[n, 4 + ceil(dim * bits / 8)], `[scale, bias, codes]` a row.

    Raises `WeightError` naming the first row that holds NaN or Inf.
    """
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise WeightError(f"row {bad[0]} holds NaN or Inf; every weight must be finite")
    max_code = np.float32(2**bits - 1)
    # Overflow to infinity and the NaN that follows are part of the definition.
    with np.errstate(over="ignore", invalid="ignore"):
        bias = _row_min(rows).astype(np.float16)
        width = rows.max(axis=1) - bias.astype(np.float32)
        scale = np.where(width == 0, np.float32(1), width / max_code).astype(np.float16)
        scale = np.where(scale == 0, np.float16(1), scale)
        inverse_scale = np.float32(1) / scale.astype(np.float32)
        quotient = (rows - bias.astype(np.float32)[:, None]) * inverse_scale[:, None]
    codes = np.rint(np.clip(np.where(np.isnan(quotient), 0, quotient), 0, max_code)).astype(np.uint8)
    header = np.stack([scale, bias], axis=1).view(np.uint8)
    return np.concatenate([header, _pack(codes, bits)], axis=1)


def dequantize_rows(stored: NDArray[np.uint8], bits: int, dim: int) -> NDArray[np.float32]:
    """The float32[n, dim] that uint8[n, 4 + ceil(dim * bits / 8)] stands for: scale * code + bias.

    The product is exact in fp32 (11 times 8 significant bits), so a fused multiply-add gives the same.
    """
    halves = np.ascontiguousarray(stored[:, :4]).view(np.float16).astype(np.float32)
    scale, bias = halves[:, :1], halves[:, 1:]
    with np.errstate(invalid="ignore"):
        return scale * _unpack(stored[:, 4:], bits, dim).astype(np.float32) + bias


def _row_min(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Row minima with the zero that FBGEMM finds: the newest of a lane, then the first lane, then the tail."""
    largest = np.finfo(np.float32).max
    num_rows, dim = rows.shape
    whole = dim // _LANES * _LANES
    lanes = np.full((num_rows, _LANES), largest, np.float32)
    for start in range(0, whole, _LANES):
        block = rows[:, start : start + _LANES]
        lanes = np.where(lanes < block, lanes, block)
    smallest = np.full(num_rows, largest, np.float32)
    for column in [*lanes.T, *rows[:, whole:].T]:
        smallest = np.where(column < smallest, column, smallest)
    return smallest


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes, one a byte, to codes packed low-order bits first; the last byte is filled up with zero bits."""
    per_byte = 8 // bits
    surplus = -codes.shape[1] % per_byte
    groups = np.pad(codes, ((0, 0), (0, surplus))).reshape(len(codes), -1, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(groups << shifts, axis=2)
    return packed


def _unpack(packed: NDArray[np.uint8], bits: int, dim: int) -> NDArray[np.uint8]:
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    codes = packed[:, :, None] >> shifts & np.uint8(2**bits - 1)
    return codes.reshape(len(packed), -1)[:, :dim]
