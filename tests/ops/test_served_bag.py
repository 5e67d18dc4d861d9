"""A served table answers like `nn.EmbeddingBag` over the restored rows, however it is called."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from lowprec import ops
from lowprec.core.errors import ModelError, TrafficError
from lowprec.ops.served_bag import ServedBag
from lowprec.plan import TABLE_PRECISIONS, Precision, RowRange

LOW = [p for p in TABLE_PRECISIONS if p is not Precision.FP32]


def both(precision, dim=13, **options):
    """A served table, and PyTorch's over its restored rows."""
    rows = np.random.default_rng(0).standard_normal((50, dim), dtype=np.float32)
    stored = ops.quantize(rows, precision, row_range=RowRange.MINMAX)
    restored = torch.from_numpy(ops.dequantize(stored, precision, dim))
    served = {"include_last_offset": False, "mode": "sum"} | options
    plain = nn.EmbeddingBag.from_pretrained(restored, **served)
    return ServedBag(torch.from_numpy(stored), precision, dim, **served), plain


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bags_by_offsets(precision, mode, dtype):
    ids, ends = torch.tensor([1, 2, 49, 3, 3], dtype=dtype), torch.tensor([0, 1, 1, 4], dtype=dtype)
    served, plain = both(precision, mode=mode)
    close(served(ids, ends), plain(ids, ends))
    served, plain = both(precision, mode=mode, include_last_offset=True)
    close(served(ids, torch.cat([ends, ends.new_tensor([5])])), plain(ids, torch.cat([ends, ends.new_tensor([5])])))


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding_idx", [None, 7])
def test_rows_of_ids_and_padding(mode, padding_idx):
    ids = torch.tensor([[1, 7, 49], [7, 7, 7], [0, 0, 7]])
    served, plain = both(Precision.INT4, mode=mode, padding_idx=padding_idx)
    close(served(ids), plain(ids))


@pytest.mark.parametrize("has_last", [False, True])
def test_a_traced_table_knows_no_batch_by_heart(has_last):
    served, plain = both(Precision.INT4, include_last_offset=has_last)
    flat = torch.tensor([1, 2, 49, 3]), torch.tensor([0, 1, 1, 4][: 4 if has_last else 3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what FBGEMM's module decides while it is traced
        traced = torch.jit.trace(served, flat)
        of_rows = torch.jit.trace(served, (torch.tensor([[1, 2], [3, 4]]),))
    other = torch.tensor([5, 6, 7, 8, 9, 0]), torch.tensor([0, 2, 2, 3, 6][: 5 if has_last else 4])
    close(traced(*other), plain(*other))
    close(of_rows(torch.tensor([[1, 2, 3]] * 5)), plain(torch.tensor([[1, 2, 3]] * 5)))


def test_weights_of_ids():
    ids, ends, weights = torch.tensor([1, 2, 49]), torch.tensor([0, 2]), torch.tensor([0.5, -2.0, 0.0])
    served, plain = both(Precision.INT8)
    close(served(ids, ends, weights), plain(ids, ends, per_sample_weights=weights))
    served, _ = both(Precision.INT8, mode="mean")
    with pytest.raises(ModelError, match="weights need sum pooling"):
        served(ids, ends, weights)


@pytest.mark.parametrize("wrong", [50, -1, -2])
def test_ids_that_are_no_rows_are_refused(wrong):
    served, _ = both(Precision.INT4)
    with pytest.raises(TrafficError, match=f"id {wrong} is outside the 50 rows"):
        served(torch.tensor([1, wrong]), torch.tensor([0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(served, (torch.tensor([1, 2]), torch.tensor([0])))
    if wrong != -1:  # a pruned row to FBGEMM
        with pytest.raises(RuntimeError, match="idx"):
            traced(torch.tensor([1, wrong]), torch.tensor([0]))


@pytest.mark.parametrize("ends", [[0, 1], [1, 2], [0, 3], []])
def test_offsets_that_do_not_fit_are_refused(ends):
    served, _ = both(Precision.INT4, include_last_offset=True)
    with pytest.raises(TrafficError, match="offsets must rise from 0 to the 2 ids"):
        served(torch.tensor([1, 2]), torch.tensor(ends, dtype=torch.int64))


def test_rows_of_another_shape_are_refused():
    with pytest.raises(ModelError, match=r"int4 with dim 13 is uint8\[num_rows, 11\]; got \[5, 10\]"):
        ServedBag(torch.zeros(5, 10, dtype=torch.uint8), Precision.INT4, 13, mode="sum", include_last_offset=False)


def test_the_memory_that_was_given_is_looked_up():
    served, _ = both(Precision.INT8, dim=8)
    before = served(torch.tensor([3]), torch.tensor([0]))
    served.tbe.weights_host[3 * 12 + 4 : 4 * 12] ^= 255
    assert not torch.equal(served(torch.tensor([3]), torch.tensor([0])), before)
