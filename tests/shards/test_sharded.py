"""Tables at several workers give what one process with all rows gives."""

import pickle
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest
import torch

from lowprec.core.errors import WeightError
from lowprec.ops.bags import BagCall
from lowprec.plan import Precision, RowRange
from lowprec.shards import LocalTables, TableShard
from lowprec.shards.estimate import network_load
from lowprec.shards.planner import Placement, Shard, TableLoad
from lowprec.shards.server import ShardServer
from lowprec.shards.sharded import ShardedTables
from lowprec.shards.wire import Request

LOW = [Precision.FP16, Precision.INT8, Precision.INT4, Precision.INT2]
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


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(rows, 16, generator=generator) for name, rows in ROWS.items()}


def placed(ids=3.0, bags=1.0) -> Placement:
    tables = tuple(TableLoad(name, rows, 16, ids=ids, bags=bags) for name, rows in ROWS.items())
    cut = [Shard("table:cut", first, end, w) for w, (first, end) in enumerate(pairwise(CUTS))]
    return Placement(tables, (10**6,) * 4, ("table:copy",), (*cut, Shard("table:whole", 0, 400, 1)))


def some_calls(rng, mode="sum", weighted=False, num_bags=40):
    calls = []
    for name in ("table:cut", "table:whole", "table:copy", "table:cut"):
        lengths = rng.integers(0, 7, num_bags)
        lengths[3] = 300 if name == "table:cut" else 0
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
        ids = torch.from_numpy(rng.integers(0, ROWS[name], int(offsets[-1])))
        w = torch.rand(len(ids)) if weighted else None
        calls.append(BagCall(name, ids, offsets, w, mode, torch.zeros(num_bags, 16)))
    return calls


def fp32(call, weight):
    return torch.nn.functional.embedding_bag(
        *(call.indices, weight, call.offsets[:-1]), mode=call.mode, per_sample_weights=call.weights
    )


@pytest.mark.parametrize(("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False)])
@pytest.mark.parametrize("row_range", list(RowRange))
def test_lookups_and_scores_are_those_of_one_process(weights, mode, weighted, row_range):
    network = Network(placed(), weights, row_range)
    local = LocalTables(weights, dict.fromkeys(weights, row_range))
    calls = some_calls(np.random.default_rng(0), mode, weighted)
    calls = [BagCall(c.table, c.indices, c.offsets, c.weights, c.mode, fp32(c, weights[c.table])) for c in calls]
    wanted = [[Precision.FP32, *LOW], LOW[1:], [Precision.FP32], LOW]
    gradients = [torch.randn(16, 40, generator=torch.Generator().manual_seed(k)).T for k in range(4)]  # not contiguous
    low = [[p for p in of_call if p is not Precision.FP32] for of_call in wanted]
    for tables in network.tables:
        pooled = tables.pooled(calls, wanted)
        scores = tables.scores(calls, low, gradients)
        exact = local.pooled(calls, wanted)
        for k, (call, found, right) in enumerate(zip(calls, pooled, exact, strict=True)):
            assert set(found) == set(right) == set(wanted[k])
            for p in wanted[k]:
                # A bag of a cut table is added up in another order: some dozen values of up to about 4.
                tolerance = 2e-4 if call.table == "table:cut" else 0
                torch.testing.assert_close(found[p], right[p], rtol=0, atol=tolerance)
        for call, found, right, g in zip(calls, scores, local.scores(calls, low, gradients), gradients, strict=True):
            for p, values in right.items():
                # Those of one process are of hot tables, exact to 16 bits of the largest change of a row.
                size = g.abs().sum(dim=1).numpy() * np.diff(call.offsets.numpy()).clip(1)
                assert (np.abs(found[p] - values) <= 1e-4 * size).all()


def test_every_worker_gets_the_same_numbers(weights):
    network = Network(placed(), weights, RowRange.MINMAX)
    calls = some_calls(np.random.default_rng(1))
    answers = [tables.pooled(calls, [[Precision.INT4, Precision.FP32]] * 4) for tables in network.tables]
    for other in answers[1:]:
        for one, another in zip(answers[0], other, strict=True):
            for p in one:
                assert torch.equal(one[p], another[p])


def test_what_is_sent_is_what_the_estimate_says(weights):
    """The traffic of made-up calls against `network_load`, for a profile and for plans of all precisions."""
    lengths, num_bags = 3, 4000
    rng = np.random.default_rng(2)
    network = Network(placed(ids=2 * lengths, bags=2), weights, RowRange.MINMAX)
    offsets = torch.arange(0, num_bags * lengths + 1, lengths)
    everything = [Precision.FP32, *LOW]
    profile = exact = 0
    for tables in network.tables:
        calls = [
            BagCall(
                name,
                torch.from_numpy(rng.integers(0, rows, num_bags * lengths)),
                offsets,
                None,
                "sum",
                torch.zeros(num_bags, 16),
            )
            for name, rows in ROWS.items()
            for _ in range(2)
        ]
        network.num_bytes = 0
        tables.pooled(calls, [everything] * len(calls))
        exact += network.num_bytes
        network.num_bytes = 0
        tables.pooled(calls, [[Precision.FP32]] * len(calls))
        tables.scores(calls, [LOW] * len(calls), [torch.zeros(num_bags, 16)] * len(calls))
        profile += network.num_bytes
    load = network_load(network.placement, profile_precisions=4, exact_precisions=5)
    num_examples = num_bags * network.placement.num_workers
    assert load.exact_bytes == pytest.approx(exact / num_examples, rel=0.02)
    assert load.profile_bytes == pytest.approx(profile / num_examples, rel=0.02)


@pytest.mark.parametrize("row_range", list(RowRange))
def test_a_bad_row_of_another_worker_is_named_as_it_stands_in_the_table(weights, row_range):
    weights["table:cut"][357, 2] = float("nan")
    tables = Network(placed(), weights, row_range).tables[0]
    ids = torch.tensor([5, 356, 358])
    fine = BagCall("table:cut", ids, torch.tensor([0, 3]), None, "sum", torch.zeros(1, 16))
    tables.pooled([fine], [LOW])
    tables.check_finite([fine])
    touched = BagCall("table:cut", torch.tensor([5, 357]), torch.tensor([0, 2]), None, "sum", torch.zeros(1, 16))
    for ask in (
        lambda: tables.pooled([touched], [LOW]),
        lambda: tables.scores([touched], [LOW], [torch.ones(1, 16)]),
        lambda: tables.check_finite([touched]),
    ):
        with pytest.raises(WeightError, match='"table:cut": row 357 holds nan in column 2'):
            ask()


def test_bags_without_ids_and_batches_without_bags(weights):
    tables = Network(placed(), weights, RowRange.MINMAX).tables[3]
    none = torch.zeros(0, dtype=torch.int64)
    for num_bags in (0, 4):
        offsets = torch.zeros(num_bags + 1, dtype=torch.int64)
        calls = [BagCall(name, none, offsets, None, "mean", torch.zeros(num_bags, 16)) for name in ROWS]
        for found in tables.pooled(calls, [[Precision.FP32, Precision.INT2]] * 3):
            assert all(values.shape == (num_bags, 16) and not values.any() for values in found.values())
        for scores in tables.scores(calls, [LOW] * 3, [torch.ones(num_bags, 16)] * 3):
            assert all(values.shape == (num_bags,) and not values.any() for values in scores.values())
    assert tables.pooled([], []) == [] and tables.scores([], [], []) == []
