"""Messages between workers: arrays of row ids and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowprec.ops.bags import BagCall
from lowprec.ops.fbgemm import Pooling
from lowprec.plan import Precision

__all__ = ["Part", "Request", "RequestBuilder", "RequestKind"]

Floats = NDArray[np.float32]
Integers = NDArray[np.integer[Any]]


class RequestKind(StrEnum):
    """What is wanted of the bags of a request."""

    POOLED = "pooled"
    SCORES = "scores"
    FINITE = "finite"


@dataclass(frozen=True)
class Part:
    """The bags of one call that have ids in one shard, and the precisions that are wanted of them."""

    table: str
    first_row: int
    num_ids: int
    num_bags: int
    mode: Pooling
    is_weighted: bool
    precisions: tuple[Precision, ...]


@dataclass(frozen=True)
class Request:
    """Everything that one batch asks of one worker.

    ids: rows within their shards, of all parts one after the other, int32 where they fit, else int64. lengths: of bags,
    none of them empty, in the smallest unsigned type. weights: float32 of the ids of weighted parts. gradients: float32
    of the bags of all parts, for scores.
    """

    kind: RequestKind
    parts: tuple[Part, ...]
    ids: Integers
    lengths: Integers
    weights: Floats
    gradients: Floats

    @property
    def num_bytes(self) -> int:
        """Bytes of its arrays."""
        return self.ids.nbytes + self.lengths.nbytes + self.weights.nbytes + self.gradients.nbytes

    def calls(self) -> list[BagCall]:
        """The bags of every part as a call of its shard; without outputs."""
        found = []
        at_id, at_bag, at_weight = 0, 0, 0
        for part in self.parts:
            ids = self.ids[at_id : at_id + part.num_ids].astype(np.int64)
            lengths = self.lengths[at_bag : at_bag + part.num_bags].astype(np.int64)
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            weights = None
            if part.is_weighted:
                weights = torch.tensor(self.weights[at_weight : at_weight + part.num_ids])
                at_weight += part.num_ids
            at_id += part.num_ids
            at_bag += part.num_bags
            found.append(
                BagCall(
                    part.table, torch.from_numpy(ids), torch.from_numpy(offsets), weights, part.mode, torch.empty(0)
                )
            )
        return found

    def gradients_of(self, dims: Sequence[int]) -> list[Floats]:
        """The gradients of every part, float32[num_bags, dim]."""
        sizes = [part.num_bags * dim for part, dim in zip(self.parts, dims, strict=True)]
        ends = list(accumulate(sizes))
        return [
            self.gradients[end - size : end].reshape(-1, dim) for end, size, dim in zip(ends, sizes, dims, strict=True)
        ]


@dataclass
class RequestBuilder:
    """Collects the parts of a request."""

    kind: RequestKind
    _parts: list[Part] = field(default_factory=list)
    _ids: list[NDArray[np.int64]] = field(default_factory=list)
    _lengths: list[NDArray[np.int64]] = field(default_factory=list)
    _weights: list[Floats] = field(default_factory=list)
    _gradients: list[Floats] = field(default_factory=list)

    def add(
        self,
        part: Part,
        ids: NDArray[np.int64],
        lengths: NDArray[np.int64],
        weights: Floats | None,
        gradient: Floats | None,
    ) -> int:
        """Add a part; returns its place in the request."""
        self._parts.append(part)
        self._ids.append(ids)
        self._lengths.append(lengths)
        if weights is not None:
            self._weights.append(weights)
        if gradient is not None:
            self._gradients.append(gradient.reshape(-1))
        return len(self._parts) - 1

    def build(self) -> Request:
        """The request with what was added."""
        return Request(
            self.kind,
            tuple(self._parts),
            _smallest(np.concatenate(self._ids), (np.int32, np.int64)),
            _smallest(np.concatenate(self._lengths), (np.uint8, np.uint16, np.uint32)),
            np.concatenate(self._weights or [np.zeros(0, np.float32)]),
            np.concatenate(self._gradients or [np.zeros(0, np.float32)]),
        )


def _smallest(values: NDArray[np.int64], types: Sequence[type[np.integer[Any]]]) -> Integers:
    most = int(values.max(initial=0))
    return values.astype(next(t for t in types if most <= np.iinfo(t).max))
