"""Serves the shards of one worker to other workers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from lowprec.ops.bags import BagCall
from lowprec.plan import Precision
from lowprec.shards.table import TableShard
from lowprec.shards.wire import Part, Request, RequestKind

__all__ = ["ShardServer"]

Floats = NDArray[np.float32]


class ShardServer:
    """Some shards. It keeps nothing of a request: asked again, it gives the same answer, and so does another one."""

    def __init__(self, shards: Iterable[TableShard], *, num_threads: int | None = None) -> None:
        """Take the shards that this worker holds. num_threads: of PyTorch; as it is in the caller's when left out."""
        self._num_threads = num_threads
        self._shards = {(shard.name, shard.first_row): shard for shard in shards}

    def answer(self, request: Request) -> Floats:
        """What a request asks for, float32, part after part and precision after precision: vectors, or scores.

        Raises `WeightError` naming a touched row that has no form at a precision, or is not finite.
        """
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)  # PyTorch keeps it by thread
        shards = [self._shards[part.table, part.first_row] for part in request.parts]
        calls = request.calls()
        found: list[Floats] = []
        if request.kind is RequestKind.FINITE:
            for shard, call in zip(shards, calls, strict=True):
                shard.check_finite(call)
        elif request.kind is RequestKind.POOLED:
            for shard, call, part in zip(shards, calls, request.parts, strict=True):
                found.extend(_pooled(shard, call, part))
        else:
            gradients = request.gradients_of([shard.dim for shard in shards])
            for shard, call, part, gradient in zip(shards, calls, request.parts, gradients, strict=True):
                scores = shard.scores(call, part.precisions, torch.tensor(gradient))
                found.extend(scores[p] for p in part.precisions)
        return np.concatenate(found) if found else np.zeros(0, np.float32)


def _pooled(shard: TableShard, call: BagCall, part: Part) -> list[Floats]:
    low = [p for p in part.precisions if p is not Precision.FP32]
    outputs = shard.pooled(call, low)
    if Precision.FP32 in part.precisions:
        outputs[Precision.FP32] = shard.fp32(call)
    return [outputs[p].numpy().reshape(-1) for p in part.precisions]
