"""How a table row is stored: the layout that FBGEMM serves."""

from __future__ import annotations

from lowprec.plan.precision import Precision

__all__ = ["SCALE_BIAS_BYTES", "lookup_dim", "row_bytes"]

SCALE_BIAS_BYTES = 4
"""An fp16 scale and an fp16 bias stand before the codes of a row-wise precision."""


def row_bytes(dim: int, precision: Precision) -> int:
    """Bytes of one stored row of `dim` values, before any row alignment.

    fp32 and fp16 rows are the plain values. Row-wise rows are `[fp16 scale, fp16 bias, codes]`, codes packed low-order
    bits first; bits of the last byte that no value needs are zero.
    """
    codes = (dim * precision.bits + 7) // 8
    return codes + SCALE_BIAS_BYTES if precision.is_rowwise else codes


def lookup_dim(dim: int, precision: Precision) -> int:
    """`dim` rounded up to whole bytes of codes: the dim to give to FBGEMM for these rows.

    FBGEMM derives the length of a row from the dim and rounds it down; for an int4 dim that is odd, or an int2 dim
    that is not a multiple of 4, it then reads the wrong bytes without saying so. The stored row is the same for `dim`
    and for the rounded dim, so nothing is copied: only the surplus columns of the result are cut off.
    """
    per_byte = max(1, 8 // precision.bits)
    return -(-dim // per_byte) * per_byte
