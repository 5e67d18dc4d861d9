"""One pooled lookup."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.ops.fbgemm import Pooling

__all__ = ["BagCall", "flat_bags"]


@dataclass(frozen=True)
class BagCall:
    """A call of a table and its fp32 answer.

    indices: int64[num_ids]; offsets: int64[B + 1], offsets[0] == 0; weights: float32[num_ids] or None;
    output: float32[B, dim].
    """

    table: str
    indices: Tensor
    offsets: Tensor
    weights: Tensor | None
    mode: Pooling
    output: Tensor


def flat_bags(
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    *,
    include_last_offset: bool,
    padding_idx: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments of an `nn.EmbeddingBag` as `BagCall` has them: flat ids, B + 1 offsets, no padding, weights fp32.

    ids: int[num_ids], with offsets, or int[B, n] without. Raises `ValueError` for a flat list of ids without offsets.
    """
    if ids.dim() == 2:
        num_bags, width = ids.shape
        offsets = torch.arange(num_bags + 1) * width
    elif offsets is None:
        raise ValueError("was called with a flat list of ids and no offsets")
    elif not include_last_offset:
        offsets = torch.cat([offsets, offsets.new_full((1,), ids.shape[0])])  # a size that tracers follow
    ids, offsets = ids.reshape(-1).long(), offsets.long()
    weights = None if weights is None else weights.reshape(-1).float()
    if padding_idx is not None:
        keep = ids != padding_idx
        kept_before = torch.cat([offsets.new_zeros(1), keep.cumsum(0)])
        ids, offsets, weights = ids[keep], kept_before[offsets], None if weights is None else weights[keep]
    return ids.contiguous(), offsets.contiguous(), weights
