"""Rows to stored rows and back, and sums over them, by the compiled kernels.

fp32 and fp16, which are plain values, are stored and restored by NumPy.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lowprec
from lowprec.errors import KernelError, ModelError, TrafficError, WeightError
from lowprec.ops.fbgemm import Pooling
from lowprec.ops.layout import row_bytes
from lowprec.plan import Precision

_import_error: ImportError | None = None
try:
    from lowprec import _native
except ImportError as error:  # said by check_kernels: costs and plans need this package, but no kernel
    _import_error = error

__all__ = ["check_kernels", "dequantize", "first_overflow", "pooled_dots", "quantize", "quantize_gathered"]

_HOW_TO_BUILD = "build it with `make setup` (or `pip install .`), which needs a C++17 compiler"


def quantize(
    rows: NDArray[np.float32],
    precision: Precision,
    *,
    num_threads: int = 1,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """The stored form of `rows`: uint8[n, row_bytes(dim, precision)], as FBGEMM serves it.

    rows: float32[n, dim]; rows may lie any distance apart, the values of one row are contiguous. `out`, when given, is
    filled and returned. Rounding, constant rows and fp16 overflow: see `lowprec.ops.reference`. The result does not
    depend on `num_threads` or the CPU. Raises `WeightError` naming the first row that holds NaN or Inf, for every
    precision; `out` is then unspecified.
    """
    _check_matrix(rows, np.float32, "rows")
    out = _output(out, (len(rows), row_bytes(rows.shape[1], precision)), np.uint8)
    if precision.is_rowwise:
        check_kernels()
        bad = _native.quantize_rows(rows, precision.bits, out, num_threads)
    else:
        bad = _store_plain(rows, precision, out)
    if bad >= 0:
        raise _not_finite(rows[bad], bad)
    return out


def quantize_gathered(
    table: NDArray[np.float32],
    ids: NDArray[np.int64],
    precision: Precision,
    *,
    num_threads: int = 1,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """`quantize(table[ids], precision)` without the fp32 copy of those rows.

    table: float32[num_rows, dim]; ids: int64[n], in any order, repeats allowed. Raises `WeightError` when an id is not
    a row of the table, or when a row that an id picks holds NaN or Inf; the message names the row of the table.
    """
    _check_matrix(table, np.float32, "table")
    if ids.ndim != 1 or ids.dtype != np.int64:
        raise TypeError(f"ids must be int64[n]; got {_described(ids)}")
    ids = np.ascontiguousarray(ids)
    out = _output(out, (len(ids), row_bytes(table.shape[1], precision)), np.uint8)
    if len(ids) and not (0 <= ids.min() and ids.max() < len(table)):
        position = int(np.flatnonzero((ids < 0) | (ids >= len(table)))[0])
        raise WeightError(f"ids[{position}] is {ids[position]}, outside the {len(table)} rows of the table")
    if precision.is_rowwise:
        check_kernels()
        bad = _native.quantize_gathered(table, ids, precision.bits, out, num_threads)
    else:
        bad = _store_plain(table[ids], precision, out)
    if bad >= 0:
        raise _not_finite(table[ids[bad]], int(ids[bad]))
    return out


def dequantize(
    stored: NDArray[np.uint8],
    precision: Precision,
    dim: int,
    *,
    num_threads: int = 1,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """The float32[n, dim] that stored rows uint8[n, row_bytes(dim, precision)] stand for."""
    _check_matrix(stored, np.uint8, "stored")
    if stored.shape[1] != row_bytes(dim, precision):
        raise ValueError(
            f"stored {precision} rows of dim {dim} have {row_bytes(dim, precision)} bytes; got {stored.shape[1]}"
        )
    out = _output(out, (len(stored), dim), np.float32)
    if precision.is_rowwise:
        check_kernels()
        _native.dequantize_rows(stored, precision.bits, out, num_threads)
    else:
        out[...] = np.ascontiguousarray(stored).view(_plain_dtype(precision))
    return out


def pooled_dots(
    stored: NDArray[np.uint8],
    precision: Precision,
    ids: NDArray[np.int64],
    offsets: NDArray[np.int64],
    gradients: NDArray[np.float32],
    *,
    mode: Pooling,
    weights: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """`gradients[b] . pooled[b]` for every bag, float32[B], where `pooled` is what `pooled_lookup` returns.

    stored: uint8[num_rows, row_bytes(dim, precision)]; ids: int64[num_ids]; offsets: int64[B + 1]; weights:
    float32[num_ids], with `sum` only; gradients: float32[B, dim]; all but `stored` contiguous. An empty bag gives 0.
    The order of the sums is that of `lowprec.ops.reference`, on every CPU; it is not FBGEMM's, so results agree up to
    rounding. One thread. fp32 rows are not taken.

    Raises `TrafficError` when an id is not a row of the table or the offsets do not fit, `ModelError` for a weighted
    mean, `TypeError` for arrays of another form.
    """
    if precision is Precision.FP32:
        raise ValueError("pooled_dots takes low-precision rows; fp32 rows have no kernel here")
    check_kernels()
    _check_matrix(stored, np.uint8, "stored")
    _check_matrix(gradients, np.float32, "gradients")
    num_bags, dim = gradients.shape
    if stored.shape[1] != row_bytes(dim, precision):
        expected = row_bytes(dim, precision)
        raise ValueError(f"stored {precision} rows of dim {dim} have {expected} bytes; got {stored.shape[1]}")
    vectors = {"ids": (ids, np.int64), "offsets": (offsets, np.int64), "weights": (weights, np.float32)}
    for name, (array, dtype) in vectors.items():
        if array is not None and (array.ndim != 1 or array.dtype != dtype or not array.flags.c_contiguous):
            raise TypeError(f"{name} must be contiguous {np.dtype(dtype)}[n]; got {_described(array)}")
    if not gradients.flags.c_contiguous:
        raise TypeError(f"gradients must be contiguous; got strides {gradients.strides}")
    if weights is not None and mode == "mean":
        raise ModelError("weights need sum pooling: a weighted mean is not defined by PyTorch; use mode sum")
    if weights is not None and len(weights) != len(ids):
        raise TrafficError(f"every id needs one weight; got {len(ids)} ids and {len(weights)} weights")
    if len(offsets) != num_bags + 1:
        raise TrafficError(f"{num_bags} gradients need {num_bags + 1} offsets; got {len(offsets)}")
    out = np.empty(num_bags, np.float32)
    try:
        _native.pooled_dots(stored, precision.bits, ids, offsets, gradients, out, mode == "mean", weights)
    except (IndexError, ValueError) as error:  # the ids, the offsets: all else was checked above
        raise TrafficError(str(error)) from None
    return out


def first_overflow(stored: NDArray[np.uint8], precision: Precision) -> int:
    """The first stored row that does not restore to finite values, or -1.

    That is a row beyond the range of fp16: a row-wise scale or bias, or an fp16 value, became infinite.
    """
    if precision is Precision.FP32 or not len(stored):
        return -1
    halves = np.ascontiguousarray(stored[:, :4] if precision.is_rowwise else stored).view(np.float16)
    bad = np.flatnonzero(~np.isfinite(halves).all(axis=1))
    return int(bad[0]) if bad.size else -1


@cache
def check_kernels() -> None:
    """Raise `KernelError` when the native module is missing, or older than the sources that lie beside it."""
    if _import_error is not None:
        raise KernelError(
            f"the native module lowprec._native does not load ({_import_error}); {_HOW_TO_BUILD}"
        ) from _import_error
    sources = Path(lowprec.__file__).parent.parent / "kernels"
    if (sources / "CMakeLists.txt").is_file() and _source_digest(sources) != _native.SOURCE_DIGEST:
        raise KernelError(f"{_native.__file__} was built from other sources than those in {sources}; {_HOW_TO_BUILD}")


def _source_digest(sources: Path) -> str:
    """What kernels/CMakeLists.txt computes when it is configured."""
    files = [sources / "CMakeLists.txt", *sources.glob("*.cc"), *sources.glob("*.h")]
    files.sort(key=lambda path: path.name)
    lines = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _store_plain(rows: NDArray[np.float32], precision: Precision, out: NDArray[np.uint8]) -> int:
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        return int(bad[0])
    with np.errstate(over="ignore"):  # beyond fp16 becomes infinity, see first_overflow
        out.view(_plain_dtype(precision))[...] = rows
    return -1


def _plain_dtype(precision: Precision) -> Any:
    return np.float32 if precision is Precision.FP32 else np.float16


def _not_finite(row: NDArray[np.float32], index: int) -> WeightError:
    column = int(np.flatnonzero(~np.isfinite(row))[0])
    return WeightError(
        f"row {index} holds {row[column]} in column {column}; every weight must be finite: repair the checkpoint"
    )


def _check_matrix(array: NDArray[Any], dtype: Any, name: str) -> None:
    if array.ndim != 2 or array.dtype != dtype or array.shape[1] == 0:
        raise TypeError(f"{name} must be {np.dtype(dtype)}[n, dim] with dim >= 1; got {_described(array)}")
    row_stride, stride = array.strides
    if len(array) and ((array.shape[1] > 1 and stride != array.itemsize) or row_stride % array.itemsize):
        raise TypeError(f"{name}: the values of a row must be contiguous; got strides {array.strides}")


def _output(out: NDArray[Any] | None, shape: tuple[int, int], dtype: Any) -> NDArray[Any]:
    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous or not out.flags.writeable:
        raise TypeError(f"out must be a writable, contiguous {np.dtype(dtype)}{list(shape)}; got {_described(out)}")
    return out


def _described(array: NDArray[Any]) -> str:
    return f"{array.dtype}{list(array.shape)}"
