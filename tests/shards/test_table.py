"""A shard answers what FBGEMM serves from the whole quantized table, whatever its cache holds."""

import numpy as np
import pytest
import torch

from lowprec import ops
from lowprec.errors import WeightError
from lowprec.ops.bags import BagCall
from lowprec.plan import Precision
from lowprec.shards import TableShard

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
@pytest.mark.parametrize("cache_bytes", [1 << 20, 3000, 1])
def test_equals_serving_the_whole_table_bit_for_bit(dim, mode, weights, cache_bytes):
    weight = table(dim=dim)
    shard = TableShard("table:t", weight, cache_bytes=cache_bytes)
    whole = {p: ops.quantize(weight.numpy(), p) for p in LOW}
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
@pytest.mark.parametrize("cache_bytes", [1 << 20, 3000, 1])
def test_dots_are_those_of_the_pooled_outputs(dim, mode, weights, cache_bytes):
    shard, other = (TableShard("table:t", table(dim=dim), cache_bytes=cache_bytes) for _ in range(2))
    rng = np.random.default_rng(0)
    for step in range(6):
        asked = call(500, rng, mode, weights)
        g = torch.randn(dim, 40, generator=torch.Generator().manual_seed(step)).T  # not contiguous
        precisions = LOW if step % 2 else LOW[step // 2 :]
        found = shard.dots(asked, precisions, g)
        assert set(found) == set(precisions)
        for p, pooled in other.pooled(asked, precisions).items():
            # fp32 sums of a few dozen terms, of values up to about 4 and vectors of norm about sqrt(dim): errors far
            # below 1e-5 of what is added, differences between precisions far above.
            size = (g.abs() * (pooled.abs() + 10)).sum(dim=1).numpy()
            assert (np.abs(found[p] - torch.linalg.vecdot(g, pooled).numpy()) <= 1e-5 * size).all()
    assert shard.dots(asked, [], g) == {}


def test_only_touched_rows_are_quantized():
    shard = TableShard("table:t", table(100_000), cache_bytes=1 << 30)
    asked = BagCall("table:t", torch.tensor([5, 99_999, 5]), torch.tensor([0, 3]), None, "sum", torch.zeros(1, 16))
    shard.pooled(asked, LOW)
    row = sum(ops.row_bytes(16, p) for p in LOW)
    assert shard.cached_bytes <= 4 * row


def test_the_cache_stays_within_its_bound():
    bound = 20_000
    shard = TableShard("table:t", table(5000), cache_bytes=bound)
    rng = np.random.default_rng(1)
    for _ in range(50):
        shard.pooled(call(5000, rng), LOW)
        assert shard.cached_bytes <= bound


def test_fp32_is_the_output_of_the_model_itself():
    asked = call(500, np.random.default_rng(0))
    assert TableShard("table:t", table(), cache_bytes=1).pooled(asked, [Precision.FP32])[Precision.FP32] is asked.output


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
    shard = TableShard("table:t", weight, cache_bytes=1 << 20)
    fine = BagCall("table:t", torch.tensor([1, 2]), torch.tensor([0, 2]), None, "sum", torch.zeros(1, 16))
    shard.pooled(fine, [precision])
    touched = BagCall("table:t", torch.tensor([1, 3]), torch.tensor([0, 2]), None, "sum", torch.zeros(1, 16))
    with pytest.raises(WeightError, match=said):
        shard.pooled(touched, [precision])


def test_a_row_that_is_large_but_representable_is_served():
    weight = table()
    weight[3, 2] = 1e6  # bias is the small minimum and the scale 1e6 / 255 fits fp16
    asked = BagCall("table:t", torch.tensor([3]), torch.tensor([0, 1]), None, "sum", torch.zeros(1, 16))
    answer = TableShard("table:t", weight, cache_bytes=1 << 20).pooled(asked, [Precision.INT8])[Precision.INT8]
    assert answer[0, 2] == pytest.approx(1e6, rel=1e-3)
