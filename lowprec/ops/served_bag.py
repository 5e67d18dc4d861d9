"""An embedding bag over stored rows, as the module that FBGEMM serves tables with."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.core.errors import KernelError, ModelError, TrafficError
from lowprec.ops.bags import flat_bags
from lowprec.ops.fbgemm import Pooling, lookup_op
from lowprec.plan import Precision
from lowprec.plan.row_layout import lookup_dim, row_bytes

__all__ = ["ServedBag"]


class ServedBag(nn.Module):
    """A table of stored rows in the place of an `nn.EmbeddingBag`, called like it: float32[B, dim].

    `tbe` is the `IntNBitTableBatchedEmbeddingBagsCodegen` of this one table, over the very memory that was given. Its
    operator is called directly: the module's own way to it takes longer than the lookup of a batch
    (`make bench NAME=serving`). An id that is no row, or offsets that do not fit, raise `TrafficError`, in a traced or
    exported program `RuntimeError` (where -1 is a pruned row to FBGEMM, and adds nothing).
    """

    def __init__(
        self,
        stored: Tensor,
        precision: Precision,
        dim: int,
        *,
        mode: Pooling,
        include_last_offset: bool,
        padding_idx: int | None = None,
        name: str = "the table",
    ) -> None:
        """Take rows uint8[num_rows, row_bytes(dim, precision)] without a copy; they may be a mapped file.

        name: what errors call it.
        Raises `KernelError` without FBGEMM, `ModelError` for rows of another shape.
        """
        super().__init__()
        if stored.ndim != 2 or stored.shape[1] != row_bytes(dim, precision) or not stored.is_contiguous():
            expected = f"uint8[num_rows, {row_bytes(dim, precision)}]"
            raise ModelError(f"a table stored as {precision} with dim {dim} is {expected}; got {list(stored.shape)}")
        self.embedding_dim, self.num_embeddings = dim, len(stored)
        self.precision, self.mode = str(precision), mode
        self.include_last_offset, self.padding_idx, self._name = include_last_offset, padding_idx, name
        self._is_plain = include_last_offset and padding_idx is None
        self.tbe = _tbe(stored, precision, lookup_dim(dim, precision), mode)
        # Those of its calls, looked up once: attributes of modules are slow.
        self._before, self._after = _arguments(self.tbe)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Pool the rows of each bag, as `nn.EmbeddingBag.forward` does."""
        if per_sample_weights is not None and self.mode == "mean":
            raise ModelError("weights need sum pooling: a weighted mean is not defined by PyTorch; use mode sum")
        ids, bags, weights = self._bags(input, offsets, per_sample_weights)
        if _is_recorded():
            _check_in_program(self.tbe, ids, bags, weights)
        else:
            self._check(ids, bags)
        pooled: Tensor = lookup_op()(*self._before, ids, bags, self._after[0], weights, *self._after[1:])
        if pooled.shape[1] == self.embedding_dim:
            return pooled
        return pooled[:, : self.embedding_dim].contiguous()

    def extra_repr(self) -> str:
        """What `print(module)` says."""
        return f"{self.num_embeddings}, {self.embedding_dim}, precision={self.precision}, mode={self.mode!r}"

    def _bags(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        is_short = self._is_plain and weights is None and ids.dim() == 1 and ids.dtype == torch.int64
        if is_short and offsets is not None and offsets.dtype == torch.int64:
            return ids.contiguous(), offsets.contiguous(), None  # most calls, and the short way
        return flat_bags(
            ids, offsets, weights, include_last_offset=self.include_last_offset, padding_idx=self.padding_idx
        )

    def _check(self, ids: Tensor, offsets: Tensor) -> None:
        ends = offsets.numpy()  # a view, because single elements of tensors are slow
        if not len(ends) or ends[0] != 0 or ends[-1] != len(ids):
            raise TrafficError(
                f"{self._name}: offsets must rise from 0 to the {len(ids)} ids, and be one more than the bags"
            )
        if not len(ids):
            return
        low, high = (end.item() for end in torch.aminmax(ids))
        if low < 0 or high >= self.num_embeddings:
            wrong = low if low < 0 else high
            raise TrafficError(f"id {wrong} is outside the {self.num_embeddings} rows of {self._name}")


def _tbe(stored: Tensor, precision: Precision, served_dim: int, mode: Pooling) -> Any:
    try:
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
            BoundsCheckMode,
            EmbeddingLocation,
            PoolingMode,
        )
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
    except (ImportError, OSError, AttributeError) as error:
        raise KernelError(
            f"FBGEMM does not load ({error}); install the release that fits this PyTorch: pip install 'lowprec[cpu]'"
        ) from error
    with _quiet():
        tbe = IntNBitTableBatchedEmbeddingBagsCodegen(
            [("", len(stored), served_dim, SparseType[precision.name], EmbeddingLocation.HOST)],
            pooling_mode=PoolingMode.SUM if mode == "sum" else PoolingMode.MEAN,
            device="cpu",
            bounds_check_mode=BoundsCheckMode.FATAL,
            output_dtype=SparseType.FP32,
            row_alignment=1,
            indices_dtype=torch.int64,
        )
    # Its own way to take weights is a copy of them. Told that it needs no bytes it makes none; then it is given these.
    tbe._apply_split(0, 0, 0, tbe.weights_physical_placements, tbe.weights_physical_offsets, False)
    tbe.weights_host, tbe.host_size = stored.view(-1), stored.numel()
    return tbe


def _is_recorded() -> bool:
    """Whether a program is being made of what is called, which cannot decide by values."""
    return torch._C._get_tracing_state() is not None or torch.compiler.is_exporting()


def _arguments(tbe: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What a module gives to its operator before the ids, and after the offsets but for the weights of ids."""
    sizes = (tbe.max_int2_D, tbe.max_int4_D, tbe.max_int8_D, tbe.max_float16_D, tbe.max_float32_D)
    placed = (tbe.weights_host, tbe.weights_uvm, tbe.weights_placements, tbe.weights_offsets, tbe.weights_tys)
    before = (*placed, tbe.D_offsets, tbe.total_D, *sizes)
    return before, (int(tbe.pooling_mode), tbe.output_dtype, None, None, tbe.row_alignment)


def _check_in_program(tbe: Any, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> None:
    torch.ops.fbgemm.bounds_check_indices(
        tbe.rows_per_table,
        ids,
        offsets,
        tbe.bounds_check_mode_int,
        tbe.bounds_check_warning,
        weights,
        bounds_check_version=tbe.bounds_check_version,
    )


class _quiet:
    """FBGEMM tells the root logger of every module that it makes."""

    def __enter__(self) -> None:
        self._before = logging.root.manager.disable
        logging.disable(logging.INFO)

    def __exit__(self, *_: object) -> None:
        logging.disable(self._before)
