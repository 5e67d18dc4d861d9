"""What `Tables` promises, of every implementation: rows in this process, and rows at several workers."""

from itertools import accumulate

import numpy as np
import pytest
import torch
from shard_network import ROWS, Network, fp32, placed

from lowprec import ops
from lowprec.core.errors import WeightError
from lowprec.ops.bags import BagCall
from lowprec.plan import Precision, RowRange
from lowprec.shards import LocalTables

LOW = [Precision.FP16, Precision.INT8, Precision.INT4, Precision.INT2]


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(rows, 16, generator=generator) for name, rows in ROWS.items()}


@pytest.fixture(params=["local", "sharded"])
def tables_of(request):
    """Makes tables of weights; of sharded ones those of a worker that holds a part of the rows."""

    def make(weights, row_range=RowRange.MINMAX):
        if request.param == "local":
            return LocalTables(weights, dict.fromkeys(weights, row_range))
        return Network(placed(), weights, row_range).tables[0]

    return make


def a_call(name, weights, *bags, mode="sum", scale=None):
    ids = torch.tensor([i for bag in bags for i in bag], dtype=torch.int64)
    offsets = torch.tensor([0, *accumulate(map(len, bags))], dtype=torch.int64)
    call = BagCall(name, ids, offsets, scale, mode, torch.zeros(len(bags), 16))
    return BagCall(name, ids, offsets, scale, mode, fp32(call, weights[name]))


def stored(weight, precision, row_range):
    """The rows that serving looks up, float32[num_rows, dim]."""
    if precision is Precision.FP16:
        return weight.half().float()
    rows = ops.quantize(weight.numpy(), precision, row_range=row_range, num_threads=1)
    return torch.from_numpy(ops.dequantize(rows, precision, 16))


def test_names_are_those_of_the_model(tables_of, weights):
    assert set(tables_of(weights).names) == ROWS.keys()


@pytest.mark.parametrize("row_range", list(RowRange))
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_lookups_and_scores_are_those_of_stored_rows(tables_of, weights, mode, row_range):
    tables = tables_of(weights, row_range)
    calls = [a_call(name, weights, [1, 2, 2], [ROWS[name] - 1], [], mode=mode) for name in ROWS]
    gradients = [torch.randn(3, 16, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    pooled = tables.pooled(calls, [[Precision.FP32, *LOW]] * 3)
    scores = tables.scores(calls, [LOW] * 3, gradients)
    for call, found, score, gradient in zip(calls, pooled, scores, gradients, strict=True):
        torch.testing.assert_close(found[Precision.FP32], call.output, rtol=0, atol=1e-6)
        for precision in LOW:
            expected = fp32(call, stored(weights[call.table], precision, row_range))
            torch.testing.assert_close(found[precision], expected, rtol=0, atol=2e-6)
            change = (gradient * (expected - call.output)).sum(dim=1).numpy()
            # Of hot tables scores are exact to 16 bits of the largest change of a row.
            np.testing.assert_allclose(score[precision], change, rtol=0, atol=3e-4 * float(gradient.abs().sum()))


@pytest.mark.parametrize("row_range", list(RowRange))
def test_a_bad_row_is_named_as_it_stands_in_the_table(tables_of, weights, row_range):
    weights["table:cut"][357, 2] = float("nan")
    tables = tables_of(weights, row_range)
    fine = a_call("table:cut", weights, [5, 356, 358])
    tables.pooled([fine], [LOW])
    tables.check_finite([fine])
    touched = a_call("table:cut", weights, [5, 357])
    for ask in (
        lambda: tables.pooled([touched], [LOW]),
        lambda: tables.scores([touched], [LOW], [torch.ones(1, 16)]),
        lambda: tables.check_finite([touched]),
    ):
        with pytest.raises(WeightError, match='"table:cut": row 357 holds nan in column 2'):
            ask()


def test_bags_without_ids_and_batches_without_bags(tables_of, weights):
    tables = tables_of(weights)
    for num_bags in (0, 4):
        calls = [a_call(name, weights, *[[]] * num_bags, mode="mean") for name in ROWS]
        for found in tables.pooled(calls, [[Precision.FP32, Precision.INT2]] * 3):
            assert all(values.shape == (num_bags, 16) and not values.any() for values in found.values())
        for scores in tables.scores(calls, [LOW] * 3, [torch.ones(num_bags, 16)] * 3):
            assert all(values.shape == (num_bags,) and not values.any() for values in scores.values())
    assert tables.pooled([], []) == [] and tables.scores([], [], []) == []
