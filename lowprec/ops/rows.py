"""Quantizes and dequantizes rows with the compiled kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.core.errors import WeightError
from lowprec.ops.native import kernels
from lowprec.plan import Precision, RowRange
from lowprec.plan.row_layout import row_bytes

__all__ = [
    "check_overflow",
    "check_rows",
    "dequantize",
    "first_overflow",
    "not_finite",
    "overflow",
    "quantize",
    "row_ranges",
]

_ROWS_AT_ONCE = 16_384
# All ones in an fp16 number that is infinite or NaN.
_FP16_EXPONENT = np.uint16(0x7C00)

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


def quantize(
    table: Floats,
    precision: Precision,
    *,
    row_range: RowRange = RowRange.MINMAX,
    ids: Ids | None = None,
    num_threads: int = 1,
    first_row: int = 0,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """The stored form of rows: uint8[n, row_bytes(dim, precision)], as FBGEMM serves it.

    table: float32[num_rows, dim]; rows may lie any distance apart, the values of one row are contiguous. All of them
    are taken, or `table[ids]` without a copy of it; ids: int64[n], in any order, repeats allowed. `out`, when given, is
    filled and returned. Rounding, ranges, constant rows and fp16 overflow: see `lowprec.ops.reference`. The result does
    not depend on `num_threads` or the CPU.

    Raises `WeightError` when an id is not a row of the table, or naming the first row that holds NaN or Inf, for every
    precision; `out` is then unspecified. It counts rows from `first_row`, for a table that is a part of a larger one.
    """
    check_matrix(table, np.float32, "rows")
    ids = _checked_ids(ids, len(table))
    num_rows = len(table) if ids is None else len(ids)
    out = _output(out, (num_rows, row_bytes(table.shape[1], precision)), np.uint8)
    if precision is Precision.FP32:
        bad = _store_plain(table if ids is None else table[ids], out)
    else:
        bad = kernels().quantize(table, ids, precision.bits, row_range.value, out, num_threads)
    if bad >= 0:
        raise not_finite(table, bad if ids is None else int(ids[bad]), first_row=first_row)
    return out


def row_ranges(
    table: Floats,
    precision: Precision,
    row_range: RowRange,
    *,
    ids: Ids | None = None,
    num_threads: int = 1,
    first_row: int = 0,
) -> NDArray[np.uint16]:
    """The fp16 scale and bias of rows as bits, uint16[n, 2]: the first four bytes of what `quantize` stores.

    Arguments and errors are those of `quantize`; `precision` is a row-wise one.
    """
    if not precision.is_rowwise:
        raise ValueError(f"rows of {precision} have no range")
    check_matrix(table, np.float32, "rows")
    ids = _checked_ids(ids, len(table))
    out = np.empty((len(table) if ids is None else len(ids), 2), np.uint16)
    bad = kernels().row_ranges(table, ids, precision.bits, row_range.value, out, num_threads)
    if bad >= 0:
        raise not_finite(table, bad if ids is None else int(ids[bad]), first_row=first_row)
    return out


def dequantize(
    stored: NDArray[np.uint8],
    precision: Precision,
    dim: int,
    *,
    num_threads: int = 1,
    out: Floats | None = None,
) -> Floats:
    """The float32[n, dim] that stored rows uint8[n, row_bytes(dim, precision)] stand for."""
    check_matrix(stored, np.uint8, "stored")
    if stored.shape[1] != row_bytes(dim, precision):
        raise ValueError(
            f"stored {precision} rows of dim {dim} have {row_bytes(dim, precision)} bytes; got {stored.shape[1]}"
        )
    out = _output(out, (len(stored), dim), np.float32)
    if precision.is_rowwise:
        kernels().dequantize(stored, precision.bits, out, num_threads)
    else:
        out[...] = np.ascontiguousarray(stored).view(np.float32 if precision is Precision.FP32 else np.float16)
    return out


def first_overflow(stored: NDArray[np.uint8], precision: Precision) -> int:
    """The first stored row that does not restore to finite values, or -1.

    That is a row beyond the range of fp16: a row-wise scale or bias, or an fp16 value, became infinite.
    """
    if precision is Precision.FP32 or not len(stored):
        return -1
    # Bits: NumPy looks at fp16 numbers one by one, several times slower (tried by hand).
    halves = np.ascontiguousarray(stored[:, :4] if precision.is_rowwise else stored).view(np.uint16)
    bad = np.flatnonzero(((halves & _FP16_EXPONENT) == _FP16_EXPONENT).any(axis=1))
    return int(bad[0]) if bad.size else -1


def check_overflow(table: Floats, stored: NDArray[np.uint8], precision: Precision, *, first_row: int = 0) -> None:
    """Raise `WeightError` naming the first row of `table` whose stored form does not restore to finite values.

    `first_row` as for `quantize`.
    """
    row = first_overflow(stored, precision)
    if row >= 0:
        raise overflow(table, row, precision, first_row=first_row)


def check_rows(table: Floats, precision: Precision, *, num_threads: int = 1, first_row: int = 0) -> None:
    """Raise `WeightError` naming the first row of float32[num_rows, dim] that has no stored form.

    All of them are read, some at a time. A row that `minmax` cannot hold no range can: `mse` keeps it then. first_row:
    where they stand in the whole table, for errors.
    """
    for start in range(0, len(table), _ROWS_AT_ONCE):
        rows = table[start : start + _ROWS_AT_ONCE]
        stored = quantize(rows, precision, num_threads=num_threads, first_row=first_row + start)
        check_overflow(rows, stored, precision, first_row=first_row + start)


def overflow(table: Floats, row: int, precision: Precision, *, first_row: int = 0) -> WeightError:
    """What to raise for a row that overflows fp16."""
    values = table[row]
    return WeightError(
        f"row {first_row + row} spans {values.min():g} to {values.max():g}, which {precision} cannot hold (its fp16 "
        "parts overflow); repair the checkpoint, or leave this table more exact in space.units"
    )


def not_finite(table: Floats, row: int, *, first_row: int = 0) -> WeightError:
    """What to raise for a row that holds NaN or Inf."""
    column = int(np.flatnonzero(~np.isfinite(table[row]))[0])
    value = table[row, column]
    return WeightError(
        f"row {first_row + row} holds {value} in column {column}; every weight must be finite: repair the checkpoint"
    )


def check_matrix(array: NDArray[Any], dtype: Any, name: str) -> None:
    """Raise `TypeError` unless `array` is `dtype`[n, dim] whose rows are contiguous, any distance apart."""
    if array.ndim != 2 or array.dtype != dtype or array.shape[1] == 0:
        raise TypeError(f"{name} must be {np.dtype(dtype)}[n, dim] with dim >= 1; got {described(array)}")
    row_stride, stride = array.strides
    if len(array) and ((array.shape[1] > 1 and stride != array.itemsize) or row_stride % array.itemsize):
        raise TypeError(f"{name}: the values of a row must be contiguous; got strides {array.strides}")


def described(array: NDArray[Any]) -> str:
    """Dtype and shape, for messages."""
    return f"{array.dtype}{list(array.shape)}"


def _checked_ids(ids: Ids | None, num_rows: int) -> Ids | None:
    if ids is None:
        return None
    if ids.ndim != 1 or ids.dtype != np.int64:
        raise TypeError(f"ids must be int64[n]; got {described(ids)}")
    if len(ids) and not (0 <= ids.min() and ids.max() < num_rows):
        position = int(np.flatnonzero((ids < 0) | (ids >= num_rows))[0])
        raise WeightError(f"ids[{position}] is {ids[position]}, outside the {num_rows} rows of the table")
    return np.ascontiguousarray(ids)


def _store_plain(rows: Floats, out: NDArray[np.uint8]) -> int:
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        return int(bad[0])
    out.view(np.float32)[...] = rows
    return -1


def _output(out: NDArray[Any] | None, shape: tuple[int, int], dtype: Any) -> NDArray[Any]:
    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous or not out.flags.writeable:
        raise TypeError(f"out must be a writable, contiguous {np.dtype(dtype)}{list(shape)}; got {described(out)}")
    return out
