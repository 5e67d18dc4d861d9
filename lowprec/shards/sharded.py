"""Tables sharded among workers: splits calls by rows and merges the answers in row order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowprec.ops.bags import BagCall
from lowprec.plan import Precision
from lowprec.shards.planner import Placement, Shard
from lowprec.shards.server import ShardServer
from lowprec.shards.table import TableShard
from lowprec.shards.wire import Part, Request, RequestBuilder, RequestKind

__all__ = ["Exchange", "ShardedTables"]

Floats = NDArray[np.float32]

Exchange = Callable[[Mapping[int, Request]], Callable[[], Mapping[int, Floats]]]
"""Sends each worker its request; what it returns waits for the answers of all of them."""

_HERE = -1


@dataclass(frozen=True)
class _Sent:
    """A part that was sent: of which call, which bags of it, where its answer stands."""

    call: int
    bags: NDArray[np.int64] | None  # None: all of them
    worker: int
    part: Part


class ShardedTables:
    """The tables of a placement, asked by one of its workers.

    What one worker holds whole is bit for bit what `LocalTables` gives. The bags of a table that is cut are added up
    shard by shard, in order of rows, so they depend on where it is cut and on nothing else.
    """

    are_remote = True

    def __init__(self, placement: Placement, held: Mapping[tuple[str, int], TableShard], exchange: Exchange) -> None:
        """Look up `held` shards (by table and first row) here and ask for all others through `exchange`."""
        self._placement = placement
        self._held = held
        self._here = ShardServer(held.values())
        self._exchange = exchange
        copies = {name: (Shard(name, 0, placement.table[name].num_rows, _HERE),) for name in placement.replicated}
        self._shards: dict[str, tuple[Shard, ...]] = {**placement.shards_of, **copies}

    @property
    def names(self) -> Collection[str]:
        """The tables."""
        return self._shards.keys()

    def pooled(
        self, calls: Sequence[BagCall], precisions: Sequence[Collection[Precision]]
    ) -> list[dict[Precision, Tensor]]:
        """As `Tables` says; fp32 as well."""
        found = self._answers(RequestKind.POOLED, calls, [tuple(sorted(of_call)) for of_call in precisions], None)
        return [{p: torch.from_numpy(values) for p, values in of_call.items()} for of_call in found]

    def scores(
        self, calls: Sequence[BagCall], precisions: Sequence[Sequence[Precision]], gradients: Sequence[Tensor]
    ) -> list[dict[Precision, Floats]]:
        """As `Tables` says."""
        return self._answers(RequestKind.SCORES, calls, [tuple(of_call) for of_call in precisions], gradients)

    def check_finite(self, calls: Sequence[BagCall]) -> None:
        """As `Tables` says."""
        self._ask(RequestKind.FINITE, calls, [(Precision.FP32,)] * len(calls), None)

    def _answers(
        self,
        kind: RequestKind,
        calls: Sequence[BagCall],
        wanted: Sequence[tuple[Precision, ...]],
        gradients: Sequence[Tensor] | None,
    ) -> list[dict[Precision, Floats]]:
        """Vectors float32[B, dim] or scores float32[B] of every call: zero for a bag without ids."""
        found: list[dict[Precision, Floats]] = []
        for call, of_call in zip(calls, wanted, strict=True):
            num_bags, dim = len(call.offsets) - 1, self._placement.table[call.table].dim
            shape = (num_bags, dim) if kind is RequestKind.POOLED else (num_bags,)
            found.append({precision: np.zeros(shape, np.float32) for precision in of_call})
        for sent, answers in self._ask(kind, calls, wanted, gradients):
            for precision, values in zip(sent.part.precisions, answers, strict=True):
                total = found[sent.call][precision]
                here = slice(None) if sent.bags is None else sent.bags
                total[here] += values.reshape(-1, *total.shape[1:])
        for call, totals in zip(calls, found, strict=True):
            if call.mode == "mean" and len(self._shards[call.table]) > 1:
                counts = np.maximum(np.diff(call.offsets.numpy()), 1).astype(np.float32)
                for total in totals.values():
                    total *= (np.float32(1) / counts).reshape(-1, *[1] * (total.ndim - 1))
        return found

    def _ask(
        self,
        kind: RequestKind,
        calls: Sequence[BagCall],
        wanted: Sequence[tuple[Precision, ...]],
        gradients: Sequence[Tensor] | None,
    ) -> list[tuple[_Sent, list[Floats]]]:
        """Every part of every call with its answer for each precision, in order of calls and rows."""
        builders: dict[int, RequestBuilder] = {}
        sent: list[_Sent] = []
        for k, call in enumerate(calls):
            if not wanted[k]:
                continue
            gradient = None if gradients is None else gradients[k].contiguous().numpy()
            for shard, piece in self._pieces(call):
                builder = builders.setdefault(self._asked(shard), RequestBuilder(kind))
                is_cut = len(self._shards[call.table]) > 1
                part = Part(
                    call.table,
                    shard.first_row,
                    len(piece.ids),
                    len(piece.lengths),
                    "sum" if is_cut else call.mode,
                    piece.weights is not None,
                    wanted[k],
                )
                rows = gradient if gradient is None or piece.bags is None else gradient[piece.bags]
                builder.add(part, piece.ids, piece.lengths, piece.weights, rows)
                sent.append(_Sent(k, piece.bags, self._asked(shard), part))
        requests = {worker: builder.build() for worker, builder in builders.items()}
        own = requests.pop(_HERE, None)
        collect = self._exchange(requests)
        here = {} if own is None else {_HERE: self._here.answer(own)}
        answers = {**here, **collect()}
        position = dict.fromkeys(answers, 0)
        found = []
        for one in sent:
            dim = self._placement.table[one.part.table].dim
            size = one.part.num_bags * (dim if kind is RequestKind.POOLED else 1)
            values = []
            for _ in one.part.precisions if kind is not RequestKind.FINITE else ():
                start = position[one.worker]
                values.append(answers[one.worker][start : start + size])
                position[one.worker] = start + size
            found.append((one, values))
        return found

    def _asked(self, shard: Shard) -> int:
        return _HERE if (shard.table, shard.first_row) in self._held else shard.worker

    def _pieces(self, call: BagCall) -> list[tuple[Shard, _Piece]]:
        shards = self._shards[call.table]
        ids, lengths = call.indices.numpy(), np.diff(call.offsets.numpy())
        weights = None if call.weights is None else call.weights.numpy()
        if len(ids) == 0:
            return []
        if len(shards) == 1:
            bags = None if lengths.all() else np.flatnonzero(lengths)
            return [(shards[0], _Piece(bags, ids, lengths if bags is None else lengths[bags], weights))]
        bag_of_id = np.repeat(np.arange(len(lengths)), lengths)
        owner = np.searchsorted([shard.first_row for shard in shards], ids, side="right") - 1
        found = []
        for number in np.unique(owner):
            here = owner == number
            bags, lengths_here = np.unique(bag_of_id[here], return_counts=True)
            found.append(
                (
                    shards[number],
                    _Piece(
                        bags,
                        ids[here] - shards[number].first_row,
                        lengths_here,
                        None if weights is None else weights[here],
                    ),
                )
            )
        return found


@dataclass(frozen=True)
class _Piece:
    """The bags of a call with ids in a shard: which ones (None: all), their ids there, lengths and weights."""

    bags: NDArray[np.int64] | None
    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    weights: Floats | None
