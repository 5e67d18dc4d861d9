"""Numeric kernels behind one face: stored rows, their restored values, pooled lookups.

Importing this package imports neither PyTorch nor the native module; the first call that needs one does.
"""

from lowprec.ops.fbgemm import Pooling, pooled_lookup
from lowprec.ops.layout import row_bytes
from lowprec.ops.native import dequantize, first_overflow, pooled_dots, quantize, quantize_gathered

__all__ = [
    "Pooling",
    "dequantize",
    "first_overflow",
    "pooled_dots",
    "pooled_lookup",
    "quantize",
    "quantize_gathered",
    "row_bytes",
]
