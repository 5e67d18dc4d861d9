"""Tables at several workers give what one process with all rows gives."""

import numpy as np
import pytest
import torch
from shard_network import ROWS, Network, fp32, placed

from lowprec.ops.bags import BagCall
from lowprec.plan import Precision, RowRange
from lowprec.shards import LocalTables
from lowprec.shards.estimate import network_load

LOW = [Precision.FP16, Precision.INT8, Precision.INT4, Precision.INT2]


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(rows, 16, generator=generator) for name, rows in ROWS.items()}


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
