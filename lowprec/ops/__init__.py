"""Numeric kernels: stored rows, their restored values, pooled lookups.

Importing this package imports neither PyTorch nor the native module; the first call that needs one does.
"""

from lowprec.ops.changes import RowChanges
from lowprec.ops.fbgemm import Pooling, pooled_lookup
from lowprec.ops.native import check_kernels, cpu_path, cpu_paths, using_cpu_path
from lowprec.ops.pooled import SCORED, pooled_as, scores
from lowprec.ops.rows import (
    check_overflow,
    check_rows,
    dequantize,
    first_overflow,
    not_finite,
    overflow,
    quantize,
    row_ranges,
)
from lowprec.plan.row_layout import row_bytes

__all__ = [
    "SCORED",
    "Pooling",
    "RowChanges",
    "check_kernels",
    "check_overflow",
    "check_rows",
    "cpu_path",
    "cpu_paths",
    "dequantize",
    "first_overflow",
    "not_finite",
    "overflow",
    "pooled_as",
    "pooled_lookup",
    "quantize",
    "row_bytes",
    "row_ranges",
    "scores",
    "using_cpu_path",
]
