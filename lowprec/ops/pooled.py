"""Pooled lookups at low precision, computed from fp32 rows without a quantized table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.core.errors import ModelError, TrafficError
from lowprec.ops.fbgemm import Pooling
from lowprec.ops.native import kernels
from lowprec.ops.rows import check_matrix, described
from lowprec.plan import Precision

__all__ = ["SCORED", "pooled_as", "scores"]

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
Ranges = NDArray[np.uint16]

SCORED = (Precision.FP16, Precision.INT8, Precision.INT4, Precision.INT2)
"""The precisions that `scores` knows."""


def pooled_as(
    table: Floats,
    precision: Precision,
    ids: Ids,
    offsets: Ids,
    *,
    mode: Pooling,
    weights: Floats | None = None,
    ranges: Ranges | None = None,
    num_threads: int = 1,
) -> Floats:
    """Embedding bags over `table` at a low precision, float32[num_bags, dim]: what serving returns, bit for bit.

    That is `pooled_lookup` of the quantized table: rows are added in the order of the bag, each as
    fma(scale * weight, code, sum + bias * weight), fp16 values as fma(weight, value, sum); a mean multiplies the sum
    by 1 / number of ids. table: float32[num_rows, dim], rows any distance apart; ids: int64[num_ids];
    offsets: int64[num_bags + 1], from 0 to num_ids; weights: float32[num_ids], with `sum` only; ranges:
    uint16[num_ids, 2], the range of the row of each id as `row_ranges` gives it, minmax when left out.

    A row that holds NaN or Inf, or overflows fp16, makes its bags non-finite; look at the result. Raises
    `TrafficError` when an id is not a row of the table or the offsets do not fit, `ModelError` for a weighted mean,
    `TypeError` for arrays of another form.
    """
    if precision is Precision.FP32:
        raise ValueError("fp32 rows are looked up by the model itself")
    check_matrix(table, np.float32, "rows")
    check_bags(ids, offsets, weights, mode)
    out = np.empty((len(offsets) - 1, table.shape[1]), np.float32)
    try:
        kernels().pooled(table, precision.bits, ids, offsets, out, mode == "mean", weights, ranges, num_threads)
    except (IndexError, ValueError) as error:  # the ids, the offsets: all else was checked above
        raise TrafficError(str(error)) from None
    return out


def scores(
    table: Floats,
    precisions: Sequence[Precision],
    ids: Ids,
    offsets: Ids,
    gradients: Floats,
    *,
    mode: Pooling,
    weights: Floats | None = None,
    ranges: Mapping[Precision, Ranges] | None = None,
    num_threads: int = 1,
) -> dict[Precision, Floats]:
    """`gradients[b] . (pooled at a precision - pooled fp32)` for every bag, float32[num_bags], for all `precisions`.

    The fp32 rows are read once for all of them. gradients: float32[num_bags, dim], contiguous; the rest as for
    `pooled_as`, `ranges` for each precision that is not minmax. An empty bag gives 0. The order of the sums is that of
    `lowprec.ops.reference`, on every CPU.

    Raises what `pooled_as` raises; a bad row makes its bags non-finite here too.
    """
    check_matrix(table, np.float32, "rows")
    check_bags(ids, offsets, weights, mode)
    check_gradients(gradients, len(offsets) - 1, table.shape[1])
    found, outputs = score_outputs(precisions, len(gradients))
    given = ranges or {}
    of_rowwise = [given.get(p) for p in SCORED[1:]]
    try:
        kernels().scores(table, ids, offsets, gradients, outputs, mode == "mean", weights, of_rowwise, num_threads)
    except (IndexError, ValueError) as error:
        raise TrafficError(str(error)) from None
    return found


def check_bags(ids: Ids, offsets: Ids, weights: Floats | None, mode: Pooling) -> None:
    """Raise for arrays of another form than a lookup has; the kernels look at ids and offsets themselves."""
    vectors: dict[str, tuple[NDArray[Any] | None, Any]] = {
        "ids": (ids, np.int64),
        "offsets": (offsets, np.int64),
        "weights": (weights, np.float32),
    }
    for name, (array, dtype) in vectors.items():
        if array is not None and (array.ndim != 1 or array.dtype != dtype or not array.flags.c_contiguous):
            raise TypeError(f"{name} must be contiguous {np.dtype(dtype)}[n]; got {described(array)}")
    if weights is not None and mode == "mean":
        raise ModelError("weights need sum pooling: a weighted mean is not defined by PyTorch; use mode sum")
    if weights is not None and len(weights) != len(ids):
        raise TrafficError(f"every id needs one weight; got {len(ids)} ids and {len(weights)} weights")
    if not len(offsets):
        raise TrafficError("offsets must be one more than the bags; got none")


def check_gradients(gradients: Floats, num_bags: int, dim: int) -> None:
    """Raise unless there is a gradient, contiguous float32[dim], for every bag."""
    check_matrix(gradients, np.float32, "gradients")
    if len(gradients) != num_bags:
        raise TrafficError(f"{len(gradients)} gradients need {len(gradients) + 1} offsets; got {num_bags + 1}")
    if gradients.shape[1] != dim or not gradients.flags.c_contiguous:
        raise TypeError(
            f"gradients must be contiguous float32[num_bags, {dim}]; got {described(gradients)}, "
            f"strides {gradients.strides}"
        )


def score_outputs(
    precisions: Sequence[Precision], num_bags: int
) -> tuple[dict[Precision, Floats], list[Floats | None]]:
    """Where scores go, float32[num_bags] by precision, and those in the order of `SCORED`, as kernels take them."""
    if unknown := [p for p in precisions if p not in SCORED]:
        raise ValueError(f"scores knows {', '.join(SCORED)}; got {', '.join(unknown)}")
    found = {precision: np.empty(num_bags, np.float32) for precision in precisions}
    return found, [found.get(p) for p in SCORED]
