"""An embedding bag over stored rows, as the module that FBGEMM serves tables with."""

from __future__ import annotations

import functools
import logging
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowprec.errors import KernelError, ModelError
from lowprec.ops.bags import flat_bags
from lowprec.ops.fbgemm import Pooling
from lowprec.ops.layout import lookup_dim, row_bytes
from lowprec.plan import Precision

__all__ = ["ServedBag"]


class ServedBag(nn.Module):
    """A table of stored rows in the place of an `nn.EmbeddingBag`, called like it: float32[B, dim].

    `tbe` is the `IntNBitTableBatchedEmbeddingBagsCodegen` that looks up, of this one table, over the very memory that
    was given. An id that is no row raises `RuntimeError` (-1 is a pruned row to FBGEMM, and adds nothing).
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
    ) -> None:
        """Take rows uint8[num_rows, row_bytes(dim, precision)] without a copy; they may be a mapped file.

        Raises `KernelError` without FBGEMM, `ModelError` for rows of another shape.
        """
        super().__init__()
        if stored.ndim != 2 or stored.shape[1] != row_bytes(dim, precision) or not stored.is_contiguous():
            expected = f"uint8[num_rows, {row_bytes(dim, precision)}]"
            raise ModelError(f"a table stored as {precision} with dim {dim} is {expected}; got {list(stored.shape)}")
        self.embedding_dim, self.num_embeddings = dim, len(stored)
        self.precision, self.mode = str(precision), mode
        self.include_last_offset, self.padding_idx = include_last_offset, padding_idx
        self.tbe = _tbe(stored, precision, lookup_dim(dim, precision), mode)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Pool the rows of each bag, as `nn.EmbeddingBag.forward` does."""
        if per_sample_weights is not None and self.mode == "mean":
            raise ModelError("weights need sum pooling: a weighted mean is not defined by PyTorch; use mode sum")
        ids, bags, weights = flat_bags(
            input,
            offsets,
            per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )
        # torch.export cannot follow the module through its counters; this is what it comes to.
        look_up = functools.partial(_looked_up, self.tbe) if torch.compiler.is_exporting() else self.tbe
        pooled = look_up(ids, bags, weights)
        if pooled.shape[1] == self.embedding_dim:
            return cast(Tensor, pooled)
        return cast(Tensor, pooled[:, : self.embedding_dim].contiguous())

    def extra_repr(self) -> str:
        """What `print(module)` says."""
        return f"{self.num_embeddings}, {self.embedding_dim}, precision={self.precision}, mode={self.mode!r}"


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


def _looked_up(tbe: Any, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    ops = torch.ops.fbgemm
    ops.bounds_check_indices(
        tbe.rows_per_table,
        ids,
        offsets,
        tbe.bounds_check_mode_int,
        tbe.bounds_check_warning,
        weights,
        bounds_check_version=tbe.bounds_check_version,
    )
    return cast(
        Tensor,
        ops.int_nbit_split_embedding_codegen_lookup_function(
            dev_weights=tbe.weights_host,
            uvm_weights=tbe.weights_uvm,
            weights_placements=tbe.weights_placements,
            weights_offsets=tbe.weights_offsets,
            weights_tys=tbe.weights_tys,
            D_offsets=tbe.D_offsets,
            total_D=tbe.total_D,
            max_int2_D=tbe.max_int2_D,
            max_int4_D=tbe.max_int4_D,
            max_int8_D=tbe.max_int8_D,
            max_float16_D=tbe.max_float16_D,
            max_float32_D=tbe.max_float32_D,
            indices=ids,
            offsets=offsets,
            pooling_mode=int(tbe.pooling_mode),
            indice_weights=weights,
            output_dtype=tbe.output_dtype,
            row_alignment=tbe.row_alignment,
        ),
    )


class _quiet:
    """FBGEMM tells the root logger of every module that it makes."""

    def __enter__(self) -> None:
        self._before = logging.root.manager.disable
        logging.disable(logging.INFO)

    def __exit__(self, *_: object) -> None:
        logging.disable(self._before)
