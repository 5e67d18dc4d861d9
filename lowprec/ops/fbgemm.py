"""Pooled lookup of one table at one precision, by the embedding kernels that serve it (FBGEMM, on the CPU)."""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lowprec.core.errors import KernelError, ModelError, TrafficError
from lowprec.plan import Precision
from lowprec.plan.row_layout import lookup_dim, row_bytes

if TYPE_CHECKING:
    import torch

__all__ = ["Pooling", "lookup_op", "pooled_lookup", "unchecked_lookup"]

Pooling = Literal["sum", "mean"]

_HOST = 3  # EmbeddingLocation.HOST: weights in plain memory
_POOLING_MODES = {"sum": 0, "mean": 1}
_OUTPUT_FP32 = 0
_CPU_ROW_ALIGNMENT = 1


def pooled_lookup(
    stored: NDArray[np.uint8] | torch.Tensor,
    precision: Precision,
    dim: int,
    indices: NDArray[np.int64] | torch.Tensor,
    offsets: NDArray[np.int64] | torch.Tensor,
    *,
    mode: Pooling,
    weights: NDArray[np.float32] | torch.Tensor | None = None,
) -> torch.Tensor:
    """Embedding bags over a stored table: float32[num_bags, dim], pooled in fp32.

    stored: uint8[num_rows, row_bytes(dim, precision)], as `quantize` makes it; nothing is copied when it is
    contiguous. indices: int64[num_ids]; offsets: int64[num_bags + 1], from 0 to num_ids; weights: float32[num_ids],
    one for each id, with `sum` only (PyTorch refuses the mean; FBGEMM divides the weighted sum by the number of ids).
    An empty bag is zero. Equals `embedding_bag` over the dequantized rows up to the order and rounding of the sum.

    Raises `TrafficError` when an id is not a row of the table or the offsets do not fit: FBGEMM itself takes id -1
    for a pruned row and reads beyond `indices`. Raises `ModelError` for a weighted mean, `KernelError` without FBGEMM.
    """
    lookup_op()  # without FBGEMM nothing else is worth saying
    rows = _tensor(stored)
    indices, offsets = _tensor(indices), _tensor(offsets)
    if rows.ndim != 2 or rows.shape[1] != row_bytes(dim, precision):
        expected = f"uint8[num_rows, {row_bytes(dim, precision)}]"
        raise ModelError(f"a table stored as {precision} with dim {dim} is {expected}; got {list(rows.shape)}")
    if weights is not None and mode == "mean":
        raise ModelError("weights need sum pooling: a weighted mean is not defined by PyTorch; use mode sum")
    _check_bags(indices, offsets, rows.shape[0])
    if weights is not None:
        weights = _tensor(weights).detach()
        if weights.shape != indices.shape:
            raise TrafficError(f"every id needs one weight; got {len(indices)} ids and {len(weights)} weights")
    pooled = unchecked_lookup(rows.contiguous().view(-1), precision, dim, indices, offsets, mode, weights)
    return pooled if pooled.shape[1] == dim else pooled[:, :dim].contiguous()


def unchecked_lookup(
    stored: torch.Tensor,
    precision: Precision,
    dim: int,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    mode: Pooling = "sum",
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """FBGEMM's operator and nothing else: float32[num_bags, dim rounded up to whole bytes of codes].

    stored: uint8, the rows one after the other; the rest as for `pooled_lookup`. What does not fit is read beyond its
    end. Raises `KernelError` without FBGEMM.
    """
    fixed = _constants(precision, dim)
    pooled: torch.Tensor = lookup_op()(
        stored,
        fixed.no_device_weights,
        fixed.placements,
        fixed.weights_offsets,
        fixed.types,
        fixed.dim_offsets,
        fixed.dim,
        *fixed.max_dims,
        indices,
        offsets,
        _POOLING_MODES[mode],
        weights,
        _OUTPUT_FP32,
        row_alignment=_CPU_ROW_ALIGNMENT,
    )
    return pooled


class _Constants(NamedTuple):
    no_device_weights: torch.Tensor
    placements: torch.Tensor
    weights_offsets: torch.Tensor
    types: torch.Tensor
    dim_offsets: torch.Tensor
    dim: int
    max_dims: tuple[int, ...]


@cache
def _constants(precision: Precision, dim: int) -> _Constants:
    """The arguments that are the same in every lookup; making them anew costs as much as a small lookup."""
    import torch
    from fbgemm_gpu.split_embedding_configs import SparseType

    served_dim = lookup_dim(dim, precision)
    order = (Precision.INT2, Precision.INT4, Precision.INT8, Precision.FP16, Precision.FP32)
    return _Constants(
        no_device_weights=torch.empty(0, dtype=torch.uint8),
        placements=torch.full((1,), _HOST, dtype=torch.int32),
        weights_offsets=torch.zeros(1, dtype=torch.int64),
        types=torch.tensor([SparseType[precision.name].as_int()], dtype=torch.uint8),
        dim_offsets=torch.tensor([0, served_dim], dtype=torch.int32),
        dim=served_dim,
        max_dims=tuple(served_dim if p is precision else 0 for p in order),
    )


@cache
def lookup_op() -> Any:
    """The operator, not its packet: the overload is then not looked up in every call."""
    import torch

    try:
        import fbgemm_gpu  # noqa: F401  (registers the operators)

        return torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function.default
    except (ImportError, OSError, AttributeError) as error:
        raise KernelError(
            f"FBGEMM does not load ({error}); install the release that fits this PyTorch: pip install 'lowprec[cpu]'"
        ) from error


def _check_bags(indices: torch.Tensor, offsets: torch.Tensor, num_rows: int) -> None:
    # NumPy views: these small reductions cost a third of what they cost in PyTorch.
    ids, ends = indices.numpy(), offsets.numpy()
    if ids.dtype != np.int64 or ends.dtype != np.int64 or ids.ndim != 1 or ends.ndim != 1:
        raise TrafficError(
            f"ids and offsets must be int64[n]; got {ids.dtype}{list(ids.shape)}, {ends.dtype}{list(ends.shape)}"
        )
    if not len(ends) or ends[0] != 0 or ends[-1] != len(ids) or (ends[1:] < ends[:-1]).any():
        raise TrafficError(f"offsets must rise from 0 to the {len(ids)} ids, and be one more than the bags")
    if len(ids) and not (0 <= ids.min() and ids.max() < num_rows):
        position = int(np.flatnonzero((ids < 0) | (ids >= num_rows))[0])
        raise TrafficError(f"ids[{position}] is {ids[position]}, outside the {num_rows} rows of the table")


def _tensor(array: NDArray[Any] | torch.Tensor) -> torch.Tensor:
    import torch

    if not isinstance(array, np.ndarray):
        return array
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        # Arrays from shared memory are read-only. Nothing here writes to them, which is what PyTorch warns about.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(array)
