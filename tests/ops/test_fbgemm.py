"""Pooled lookups by FBGEMM against embedding bags over the restored rows."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowprec import ops
from lowprec.core.errors import ModelError, TrafficError
from lowprec.plan import TABLE_PRECISIONS, Precision

EVERY = list(TABLE_PRECISIONS)
NUM_ROWS = 50


def stored_table(precision: Precision, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rows = np.random.default_rng(seed).standard_normal((NUM_ROWS, dim), dtype=np.float32)
    stored = ops.quantize(rows, precision)
    return stored, ops.dequantize(stored, precision, dim)


def largest_terms(stored: np.ndarray, values: np.ndarray, precision: Precision) -> np.ndarray:
    """float64[NUM_ROWS, dim]: what the kernel adds up for a value, scale * code and bias apart, in magnitude."""
    if not precision.is_rowwise:
        return np.abs(values).astype(np.float64)
    bias = stored[:, 2:4].copy().view(np.float16).astype(np.float64)
    return np.abs(values - bias) + np.abs(bias)


@pytest.mark.parametrize("precision", EVERY)
@pytest.mark.parametrize("mode", ["sum", "mean", "weighted"])
@given(
    dim=st.integers(1, 70),
    lengths=st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 30]), max_size=12),
    seed=st.integers(0, 2**32 - 1),
)
def test_lookup_is_an_embedding_bag(precision: Precision, mode: str, dim: int, lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    stored, values = stored_table(precision, dim, seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = rng.integers(0, rng.choice([2, NUM_ROWS]), offsets[-1])  # from two rows only, ids repeat within a bag
    weights = rng.standard_normal(len(ids), dtype=np.float32) if mode == "weighted" else None
    pooling = "mean" if mode == "mean" else "sum"
    pooled = ops.pooled_lookup(stored, precision, dim, ids, offsets, mode=pooling, weights=weights).numpy()
    assert pooled.shape == (len(lengths), dim)
    assert pooled.dtype == np.float32

    terms = largest_terms(stored, values, precision)
    for bag, (begin, end) in enumerate(pairwise(offsets)):
        factor = np.ones(end - begin) if weights is None else weights[begin:end].astype(np.float64)
        if mode == "mean":
            factor = factor / max(1, end - begin)
        expected = (values[ids[begin:end]].astype(np.float64) * factor[:, None]).sum(axis=0)
        # Two fp32 additions an id (scaled code, bias), two products with the factor and the factor itself: each rounds
        # by 2**-24 of a number that the sum of magnitudes bounds; the factor 2 covers the higher orders.
        bound = 2 * 2**-24 * (2 * (end - begin) + 3) * (terms[ids[begin:end]] * np.abs(factor)[:, None]).sum(axis=0)
        assert (np.abs(pooled[bag] - expected) <= bound).all(), (bag, begin, end)


@pytest.mark.parametrize("precision", EVERY)
@pytest.mark.parametrize("dim", [1, 2, 3, 5, 6, 7, 8, 13, 16, 20, 33, 64, 130])
def test_one_id_restores_its_row_bit_for_bit(precision: Precision, dim: int) -> None:
    stored, values = stored_table(precision, dim)
    ids = np.arange(NUM_ROWS)
    for mode in ("sum", "mean"):
        pooled = ops.pooled_lookup(stored, precision, dim, ids, np.arange(NUM_ROWS + 1), mode=mode)  # type: ignore[arg-type]
        np.testing.assert_array_equal(pooled.numpy(), values)
        assert pooled.is_contiguous()


@pytest.mark.parametrize("precision", EVERY)
def test_pairs_equal_the_embedding_bag_of_pytorch_bit_for_bit(precision: Precision) -> None:
    # Adding two numbers has one order only. Dims below 3 are left out: FBGEMM adds scaled code and bias apart there.
    stored, values = stored_table(precision, 24)
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, NUM_ROWS, 200))
    offsets = torch.arange(0, 201, 2)
    expected = torch.nn.functional.embedding_bag(
        ids, torch.from_numpy(values), offsets, mode="sum", include_last_offset=True
    )
    assert torch.equal(ops.pooled_lookup(stored, precision, 24, ids, offsets, mode="sum"), expected)


def test_tables_may_be_views_tensors_or_read_only() -> None:
    stored, _ = stored_table(Precision.INT4, 8)
    ids, offsets = np.array([3, 9, 9]), np.array([0, 2, 3])
    expected = ops.pooled_lookup(stored, Precision.INT4, 8, ids, offsets, mode="sum")
    wide = np.full((NUM_ROWS, 20), 0xFF, np.uint8)
    wide[:, 4:12] = stored
    frozen = stored.copy()
    frozen.flags.writeable = False
    for table in (torch.from_numpy(stored), wide[:, 4:12], frozen):
        assert torch.equal(ops.pooled_lookup(table, Precision.INT4, 8, ids, offsets, mode="sum"), expected)


def test_empty_tables_and_batches() -> None:
    nothing, no_offsets = np.empty(0, np.int64), np.zeros(1, np.int64)
    stored, _ = stored_table(Precision.INT8, 8)
    assert ops.pooled_lookup(stored, Precision.INT8, 8, nothing, no_offsets, mode="sum").shape == (0, 8)
    pooled = ops.pooled_lookup(stored[:0], Precision.INT8, 8, nothing, np.zeros(4, np.int64), mode="mean")
    assert torch.equal(pooled, torch.zeros(3, 8))


@pytest.mark.parametrize(
    ("ids", "offsets", "message"),
    [
        ([0, 50], [0, 2], r"ids\[1\] is 50, outside the 50 rows"),
        ([-1, 0], [0, 2], r"ids\[0\] is -1"),  # FBGEMM takes -1 for a pruned row and answers zero
        ([1], [0, 5], "offsets must rise from 0 to the 1 ids"),
        ([1, 2], [0, 1], "offsets"),
        ([1, 2], [1, 2], "offsets"),
        ([1, 2], [0, 2, 1, 2], "offsets"),
        ([1], [], "offsets"),
    ],
)
def test_bags_that_do_not_fit_are_refused(ids: list[int], offsets: list[int], message: str) -> None:
    stored, _ = stored_table(Precision.INT8, 8)
    with pytest.raises(TrafficError, match=message):
        ops.pooled_lookup(stored, Precision.INT8, 8, np.array(ids, np.int64), np.array(offsets, np.int64), mode="sum")


def test_wrong_types_weights_and_tables_are_refused() -> None:
    stored, _ = stored_table(Precision.INT8, 8)
    ids, offsets = np.array([1, 2]), np.array([0, 2])
    with pytest.raises(TrafficError, match="int64"):
        ops.pooled_lookup(stored, Precision.INT8, 8, ids.astype(np.int32), offsets, mode="sum")  # type: ignore[arg-type]
    with pytest.raises(TrafficError, match="one weight"):
        ops.pooled_lookup(stored, Precision.INT8, 8, ids, offsets, mode="sum", weights=np.ones(1, np.float32))
    with pytest.raises(ModelError, match="sum pooling"):
        ops.pooled_lookup(stored, Precision.INT8, 8, ids, offsets, mode="mean", weights=np.ones(2, np.float32))
    with pytest.raises(ModelError, match="stored as int4 with dim 8"):
        ops.pooled_lookup(stored, Precision.INT4, 8, ids, offsets, mode="sum")


def test_importing_ops_imports_no_torch_and_missing_fbgemm_says_what_to_install() -> None:
    code = """
import sys
import numpy as np
from lowprec import ops
from lowprec.core.errors import KernelError
from lowprec.plan import Precision
assert "torch" not in sys.modules
sys.modules["fbgemm_gpu"] = None
try:
    zero = np.zeros(1, np.int64)
    ops.pooled_lookup(np.zeros((1, 5), np.uint8), Precision.INT8, 1, zero, np.array([0, 1]), mode="sum")
except KernelError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "lowprec[cpu]" in done.stdout
