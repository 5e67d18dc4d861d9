"""Tables at several workers, all of them in this process."""

import pickle
from collections.abc import Mapping
from itertools import pairwise

import torch

from lowprec.ops.bags import BagCall
from lowprec.plan import RowRange
from lowprec.shards import TableShard
from lowprec.shards.planner import Placement, Shard, TableLoad
from lowprec.shards.server import ShardServer
from lowprec.shards.sharded import ShardedTables
from lowprec.shards.wire import Request

ROWS = {"table:whole": 400, "table:cut": 900, "table:copy": 50}
CUTS = (0, 100, 350, 900)


class Network:
    """Workers in this process, whose requests and answers are pickled and counted."""

    def __init__(self, placement: Placement, weights: Mapping[str, torch.Tensor], row_range: RowRange) -> None:
        self.placement, self.num_bytes = placement, 0
        self.servers, self.tables = [], []
        for worker in range(placement.num_workers):
            held = {}
            for name in placement.replicated:
                held[name, 0] = TableShard(name, weights[name], row_range=row_range)
            for s in placement.shards:
                if s.worker == worker:
                    rows = weights[s.table][s.first_row : s.end_row]
                    held[s.table, s.first_row] = TableShard(s.table, rows, row_range=row_range, first_row=s.first_row)
            self.servers.append(ShardServer(held.values()))
            self.tables.append(ShardedTables(placement, held, self.exchange))

    def exchange(self, requests: Mapping[int, Request]):
        answers = {}
        for worker, request in requests.items():
            received = pickle.loads(pickle.dumps(request))
            answers[worker] = self.servers[worker].answer(received)
            self.num_bytes += request.num_bytes + answers[worker].nbytes
        return lambda: answers


def placed(ids=3.0, bags=1.0) -> Placement:
    tables = tuple(TableLoad(name, rows, 16, ids=ids, bags=bags) for name, rows in ROWS.items())
    cut = [Shard("table:cut", first, end, w) for w, (first, end) in enumerate(pairwise(CUTS))]
    return Placement(tables, (10**6,) * 4, ("table:copy",), (*cut, Shard("table:whole", 0, 400, 1)))


def fp32(call: BagCall, weight: torch.Tensor) -> torch.Tensor:
    """What PyTorch looks up."""
    return torch.nn.functional.embedding_bag(
        *(call.indices, weight, call.offsets[:-1]), mode=call.mode, per_sample_weights=call.weights
    )
