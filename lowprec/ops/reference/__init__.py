"""The kernels in NumPy: the definition that the native ones must agree with, bit for bit.

Rows quantized by their minimum and maximum agree with FBGEMM bit for bit as well, and so do pooled lookups.
"""

from lowprec.ops.reference.arithmetic import fma
from lowprec.ops.reference.changes import row_changes, scores_of_changes
from lowprec.ops.reference.optimum import least_squared_error
from lowprec.ops.reference.pooled import pooled_as, scores
from lowprec.ops.reference.rows import dequantize_rows, quantize_rows, row_ranges

__all__ = [
    "dequantize_rows",
    "fma",
    "least_squared_error",
    "pooled_as",
    "quantize_rows",
    "row_changes",
    "row_ranges",
    "scores",
    "scores_of_changes",
]
