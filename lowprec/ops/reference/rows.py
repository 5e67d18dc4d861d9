"""Quantizes and dequantizes rows.

For a row x of `dim` floats and `bits` of 8, 4 or 2, with the scale and bias of its range (fp16 numbers):

    code  = clip(round_half_even((x - bias) * (1 / scale)), 0, 2**bits - 1)
    value = scale * code + bias

all in fp32. The source is `FloatToFusedNBitRowwiseQuantizedSBHalf` of FBGEMM 1.8 (which puts scale and bias last and
refuses some dims). Its vectorised body (AVX2) and its scalar loop give the same bytes on every finite row: the
quotient stays below 2**31, where the two would convert differently. NaN and infinity in a row have no code: they are
refused (FBGEMM drops NaN without a word).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowprec.core.errors import WeightError
from lowprec.ops.reference.arithmetic import Floats
from lowprec.ops.reference.mse import mse_range
from lowprec.ops.reference.ranges import minmax_range
from lowprec.plan import RowRange

__all__ = ["codes_of", "dequantize_rows", "quantize_rows", "row_ranges", "unpack"]


def row_ranges(rows: Floats, bits: int, row_range: RowRange = RowRange.MINMAX) -> tuple[Floats, Floats]:
    """Scale and bias of float32[n, dim]: float32[n] each, all of them fp16 numbers.

    Raises `WeightError` naming the first row that holds NaN or Inf.
    """
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise WeightError(f"row {bad[0]} holds NaN or Inf; every weight must be finite")
    return minmax_range(rows, bits) if row_range is RowRange.MINMAX else mse_range(rows, bits)


def quantize_rows(rows: Floats, bits: int, row_range: RowRange = RowRange.MINMAX) -> NDArray[np.uint8]:
    """The stored form of float32[n, dim]: uint8[n, 4 + ceil(dim * bits / 8)], `[scale, bias, codes]` a row.

    Raises what `row_ranges` raises.
    """
    scale, bias = row_ranges(rows, bits, row_range)
    header = np.stack([scale, bias], axis=1).astype(np.float16).view(np.uint8)
    return np.concatenate([header, _pack(codes_of(rows, scale, bias, bits), bits)], axis=1)


def codes_of(rows: Floats, scale: Floats, bias: Floats, bits: int) -> NDArray[np.uint8]:
    """Codes, uint8[n, dim], of float32[n, dim] with ranges float32[n]; 0 in rows that overflow fp16."""
    with np.errstate(over="ignore", invalid="ignore"):
        quotient = (rows - bias[:, None]) * (np.float32(1) / scale)[:, None]
    codes: Floats = np.rint(np.clip(np.where(np.isnan(quotient), 0, quotient), 0, np.float32(2**bits - 1)))
    return codes.astype(np.uint8)


def dequantize_rows(stored: NDArray[np.uint8], bits: int, dim: int) -> Floats:
    """The float32[n, dim] that uint8[n, 4 + ceil(dim * bits / 8)] stands for: scale * code + bias.

    The product is exact in fp32 (11 times 8 significant bits), so a fused multiply-add gives the same.
    """
    halves = np.ascontiguousarray(stored[:, :4]).view(np.float16).astype(np.float32)
    scale, bias = halves[:, :1], halves[:, 1:]
    with np.errstate(invalid="ignore"):
        return scale * unpack(stored[:, 4:], bits, dim).astype(np.float32) + bias


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes, one a byte, to codes packed low-order bits first; the last byte is filled up with zero bits."""
    per_byte = 8 // bits
    surplus = -codes.shape[1] % per_byte
    groups = np.pad(codes, ((0, 0), (0, surplus))).reshape(len(codes), -1, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(groups << shifts, axis=2)
    return packed


def unpack(packed: NDArray[np.uint8], bits: int, dim: int) -> NDArray[np.uint8]:
    """Codes, uint8[n, dim], that lie packed in uint8[n, ceil(dim * bits / 8)]."""
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    codes = packed[:, :, None] >> shifts & np.uint8(2**bits - 1)
    return codes.reshape(len(packed), -1)[:, :dim]
