"""The kernels in NumPy: the definition that the native ones must agree with, bit for bit.

Row-wise quantization agrees with FBGEMM bit for bit as well, dot products of pooled rows up to rounding.

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

__all__ = ["dequantize_rows", "pooled_dots", "quantize_rows"]

_LANES = 8
_SUM_LANES = 16


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


def pooled_dots(
    stored: NDArray[np.uint8],
    bits: int,
    ids: NDArray[np.int64],
    offsets: NDArray[np.int64],
    gradients: NDArray[np.float32],
    *,
    mean: bool,
    weights: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """float32[B]: `gradients[b]` times the sum or mean of the stored rows of bag b; `bits` 16 for rows of fp16 values.

    A row-wise row counts as scale * (codes . g) + bias * sum(g), in fp32. Sums over the row are `_in_lanes`; rows are
    added in the order of the bag, each after its weight; a mean divides last. An empty bag gives 0.
    """
    dim = gradients.shape[1]
    bag_of_id = np.repeat(np.arange(len(gradients)), np.diff(offsets))
    rows, g = np.ascontiguousarray(stored[ids]), gradients[bag_of_id]
    if bits == 16:
        values = _in_lanes(rows.view(np.float16).astype(np.float32) * g)
    else:
        halves = np.ascontiguousarray(rows[:, :4]).view(np.float16).astype(np.float32)
        codes = _unpack(rows[:, 4:], bits, dim).astype(np.float32)
        values = halves[:, 0] * _in_lanes(codes * g) + halves[:, 1] * _in_lanes(g)
    if weights is not None:
        values = weights * values
    out = np.zeros(len(gradients), np.float32)
    for bag, value in zip(bag_of_id, values, strict=True):
        out[bag] += value
    if mean:
        out /= np.maximum(np.diff(offsets), 1).astype(np.float32)
    return out


def _in_lanes(products: NDArray[np.float32]) -> NDArray[np.float32]:
    """Row sums of float32[n, dim]: column i goes to lane i % 16 in the order of i, then lanes are added in halves."""
    num_rows, dim = products.shape
    blocks = np.pad(products, ((0, 0), (0, -dim % _SUM_LANES))).reshape(num_rows, -1, _SUM_LANES)
    lanes = np.zeros((num_rows, _SUM_LANES), np.float32)
    for block in range(blocks.shape[1]):
        lanes = lanes + blocks[:, block]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


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
