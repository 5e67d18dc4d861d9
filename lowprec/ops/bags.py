"""One pooled lookup, whoever asked for it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowprec.ops.fbgemm import Pooling

__all__ = ["BagCall"]


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
