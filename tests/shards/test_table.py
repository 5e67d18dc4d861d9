"""A shard answers what FBGEMM serves from the whole quantized table."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from lowprec import ops
from lowprec.core.errors import WeightError
from lowprec.ops.bags import BagCall
from lowprec.plan import Precision, RowRange
from lowprec.shards import TableShard, hot_bytes, hot_tables

LOW = [Precision.FP16, Precision.INT8, Precision.INT4, Precision.INT2]


def table(num_rows=500, dim=16, seed=0):
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed))


def call(num_rows, rng, mode="sum", weights=False):
    lengths = rng.integers(0, 5, 40)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    ids = torch.from_numpy(rng.integers(0, num_rows, int(offsets[-1])))
    w = torch.rand(len(ids)) if weights else None
    return BagCall("table:t", ids, offsets, w, mode, torch.zeros(40, 1))


@pytest.mark.parametrize(("mode", "weights"), [("sum", False), ("sum", True), ("mean", False)])
@pytest.mark.parametrize("dim", [16, 7])
@pytest.mark.parametrize("row_range", list(RowRange))
def test_equals_serving_the_whole_table_bit_for_bit(dim, mode, weights, row_range):
    weight = table(dim=dim)
    shard = TableShard("table:t", weight, row_range=row_range)
    whole = {p: ops.quantize(weight.numpy(), p, row_range=row_range) for p in LOW}
    rng = np.random.default_rng(0)
    for step in range(6):
        asked = call(500, rng, mode, weights)
        precisions = LOW if step % 2 else LOW[step // 2 :]  # precisions join late
        answers = shard.pooled(asked, precisions)
        assert set(answers) == set(precisions)
        for p in precisions:
            served = ops.pooled_lookup(whole[p], p, dim, asked.indices, asked.offsets, mode=mode, weights=asked.weights)
            torch.testing.assert_close(answers[p], served, rtol=0, atol=0)


@pytest.mark.parametrize(("mode", "weights"), [("sum", False), ("sum", True), ("mean", False)])
@pytest.mark.parametrize("dim", [16, 7])
@pytest.mark.parametrize("row_range", list(RowRange))
@pytest.mark.parametrize("is_hot", [False, True])
def test_scores_are_those_of_the_pooled_outputs(dim, mode, weights, row_range, is_hot):
    weight = table(dim=dim)
    weight[499] = float("nan")  # never touched
    shard, other = (TableShard("table:t", weight, row_range=row_range, is_hot=is_hot) for _ in range(2))
    rng = np.random.default_rng(0)
    for step in range(6):
        asked = call(499, rng, mode, weights)
        bag = torch.nn.functional.embedding_bag
        reference = bag(asked.indices, weight, asked.offsets[:-1], mode=mode, per_sample_weights=asked.weights)
        g = torch.randn(dim, 40, generator=torch.Generator().manual_seed(step)).T  # not contiguous
        precisions = LOW if step % 2 else LOW[step // 2 :]
        found = shard.scores(asked, precisions, g)
        assert set(found) == set(precisions)
        for p, pooled in other.pooled(asked, precisions).items():
            # fp32 sums of a few dozen terms, of values up to about 4 and vectors of norm about sqrt(dim): errors far
            # below 1e-5 of what is added (1e-4 with 16 bits for changes up to 1), differences between precisions above.
            size = (g.abs() * (pooled.abs() + 10)).sum(dim=1).numpy()
            assert (np.abs(found[p] - torch.linalg.vecdot(g, pooled - reference).numpy()) <= 1e-5 * size).all()
    assert shard.scores(asked, [], g) == {}


def test_hot_tables_are_small_and_few():
    def shapes(**rows):
        return {name: (n, 64) for name, n in rows.items()}

    assert hot_tables({}) == frozenset()
    assert hot_tables(shapes(at_the_limit=2048, above=2049, small=3)) == {"at_the_limit", "small"}
    many = hot_tables(shapes(**{f"t{i}": 2048 for i in range(100)}, small=1))
    assert "small" in many and len(many) == 1 + (64 << 20) // ops.RowChanges.bytes_for(2048, 64)
    one = {"one": (2048, 64)}
    assert hot_bytes(one) == ops.RowChanges(np.ones((2048, 64), np.float32), ranges={}).num_bytes


@pytest.mark.parametrize("is_hot", [False, True])
@pytest.mark.parametrize("row_range", list(RowRange))
def test_a_bad_row_is_named_when_a_score_touches_it(row_range, is_hot):
    weight, g = table(), torch.ones(1, 16)
    weight[3, 2] = float("inf")
    shard = TableShard("table:t", weight, row_range=row_range, is_hot=is_hot)
    shard.scores(BagCall("table:t", torch.tensor([1, 2]), torch.tensor([0, 2]), None, "sum", g), LOW, g)
    touched = BagCall("table:t", torch.tensor([1, 3]), torch.tensor([0, 2]), None, "sum", g)
    with pytest.raises(WeightError, match='"table:t": row 3 holds inf in column 2'):
        shard.scores(touched, LOW, g)


@pytest.mark.parametrize("is_hot", [False, True])
def test_threads_that_share_a_shard_get_what_one_alone_gets(is_hot):
    """Each finds the ranges of rows that the others ask for at the same time."""
    weight = table(num_rows=3000)
    ids = [torch.from_numpy(np.random.default_rng(k).permutation(3000)) for k in range(6)]
    calls = [BagCall("table:t", i, torch.arange(3001), None, "sum", torch.zeros(3000, 16)) for i in ids]
    g = torch.ones(3000, 16)

    def answers(shard, call):
        return [v.numpy() for v in shard.pooled(call, LOW).values()] + list(shard.scores(call, LOW, g).values())

    expected = [answers(TableShard("table:t", weight, row_range=RowRange.MSE, is_hot=is_hot), call) for call in calls]
    for _ in range(5):
        shared = TableShard("table:t", weight, row_range=RowRange.MSE, is_hot=is_hot)
        with ThreadPoolExecutor(6) as threads:
            found = list(threads.map(lambda call, shard=shared: answers(shard, call), calls))
        for one, right in zip(found, expected, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, right, strict=True))


def test_nothing_is_kept_for_a_row_but_the_range_that_is_costly_to_find():
    """A lookup of the whole table at every precision, in a process that may grow by less than one copy at int2."""
    code = """
import resource, sys
import numpy as np, torch
from lowprec.ops.bags import BagCall
from lowprec.plan import TABLE_PRECISIONS, Precision, RowRange
from lowprec.shards import TableShard
torch.set_num_threads(1)
rows, dim = 200_000, 256
weight = torch.ones(rows, dim)
shard = TableShard("table:t", weight, row_range=RowRange(sys.argv[1]))
low = [p for p in TABLE_PRECISIONS if p is not Precision.FP32]
def lookup(first, num):
    ids = torch.arange(first, first + num)
    shard.pooled(BagCall("table:t", ids, torch.tensor([0, num]), None, "sum", torch.zeros(1, dim)), low)
lookup(0, 1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for first in range(0, rows, 1000):
    lookup(first, 1000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    for row_range, bytes_a_row in (("minmax", 0), ("mse", 3 * 4)):
        done = subprocess.run([sys.executable, "-c", code, row_range], capture_output=True, text=True, check=True)
        assert int(done.stdout) * 1024 <= bytes_a_row * 200_000 + (2 << 20), row_range


def test_fp32_is_the_output_of_the_model_itself():
    asked = call(500, np.random.default_rng(0))
    assert TableShard("table:t", table()).pooled(asked, [Precision.FP32])[Precision.FP32] is asked.output


@pytest.mark.parametrize(
    ("value", "precision", "said"),
    [
        (float("nan"), Precision.INT4, '"table:t": .*row 3'),
        (float("inf"), Precision.FP16, '"table:t": .*row 3'),
        (-1e6, Precision.INT8, '"table:t": row 3 spans -1e\\+06 to .* int8 cannot hold'),
        (1e6, Precision.FP16, "row 3 spans .* fp16 cannot hold"),
    ],
)
def test_a_row_without_a_low_precision_form_is_named(value, precision, said):
    weight = table()
    weight[3, 2] = value
    shard = TableShard("table:t", weight)
    fine = BagCall("table:t", torch.tensor([1, 2]), torch.tensor([0, 2]), None, "sum", torch.zeros(1, 16))
    shard.pooled(fine, [precision])
    touched = BagCall("table:t", torch.tensor([1, 3]), torch.tensor([0, 2]), None, "sum", torch.zeros(1, 16))
    with pytest.raises(WeightError, match=said):
        shard.pooled(touched, [precision])


def test_a_row_that_is_large_but_representable_is_served():
    weight = table()
    weight[3, 2] = 1e6  # bias is the small minimum and the scale 1e6 / 255 fits fp16
    asked = BagCall("table:t", torch.tensor([3]), torch.tensor([0, 1]), None, "sum", torch.zeros(1, 16))
    answer = TableShard("table:t", weight).pooled(asked, [Precision.INT8])[Precision.INT8]
    assert answer[0, 2] == pytest.approx(1e6, rel=1e-3)
