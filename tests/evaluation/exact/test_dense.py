"""Plans share passes of small batches, and no bit of their logits depends on it."""

import numpy as np
import pytest
import torch
from torch import nn

from lowprec.evaluation.exact.dense import DensePasses
from lowprec.evaluation.workers.worker import evaluator_of
from lowprec.models.adapter import ModelAdapter, ModelInputs, inputs_of
from lowprec.plan import TABLE_PRECISIONS, Plan, Precision
from lowprec.search.job import open_job
from lowprec.shards import LocalTables


@pytest.fixture
def job(small_config):
    return open_job(small_config())


def plans_of(units, count):
    rng = np.random.default_rng(1)
    return [Plan({u.name: Precision(rng.choice(TABLE_PRECISIONS)) for u in units}) for _ in range(count)]


def counted(adapter, monkeypatch):
    """The rows of every pass with replaced outputs from now on."""
    rows, run = [], adapter.run_with_outputs

    def count(inputs, reference, outputs):
        rows.append(len(inputs.dense))
        return run(inputs, reference, outputs)

    monkeypatch.setattr(adapter, "run_with_outputs", count)
    return rows


@pytest.mark.parametrize(("num_rows", "passes"), [(100, [1000, 100]), (256, [1024, 1024, 768]), (300, [300] * 11)])
def test_small_batches_share_passes(small_config, job, monkeypatch, num_rows, passes):
    evaluator = evaluator_of(job.spec, job.adapter)
    batch = open_job(small_config(f"traffic.batch_size={num_rows}")).window("search").batch(0)
    plans = plans_of(job.units, 11)
    alone = [evaluator.logits(batch, [plan]).plans[0] for plan in plans]
    evaluator.logits(batch, plans)
    rows = counted(job.adapter, monkeypatch)
    found = evaluator.logits(batch, plans)
    np.testing.assert_array_equal(found.plans, alone)
    assert rows == passes


class Odd(nn.Module):
    """One table; `how` says what is odd."""

    def __init__(self, how):
        super().__init__()
        self.how, self.table, self.top = (
            how,
            nn.EmbeddingBag(50, 4, mode="sum", include_last_offset=True),
            nn.Linear(5, 1),
        )

    def forward(self, dense, sparse):
        ids, offsets, weights = sparse["c"]
        if self.how == "fixed" and len(dense) != 20:
            raise ValueError("20 rows only")
        x = torch.cat([dense, self.table(ids, offsets, weights)], dim=1)
        if self.how == "rows touch":
            x = x - x.mean(dim=0)
        if self.how == "ids":
            counts = torch.zeros(len(dense)).index_add_(
                0, torch.repeat_interleave(torch.arange(len(dense)), offsets.diff()), weights
            )
            x = x * counts[:, None]
        return self.top(x)[:, 0]


@pytest.mark.parametrize(("how", "num_passes"), [("plain", 1), ("ids", 1), ("rows touch", 6), ("fixed", 6)])
def test_a_model_that_cannot_share_them_does_not(how, num_passes, monkeypatch):
    torch.manual_seed(0)
    adapter = ModelAdapter(Odd(how))
    lengths = torch.randint(0, 4, (20,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    num_ids = int(offsets[-1])
    inputs = ModelInputs(torch.randn(20, 1), {"c": (torch.randint(0, 50, (num_ids,)), offsets, torch.rand(num_ids))})
    reference = adapter.reference(inputs)
    tables = LocalTables(adapter.weights, {})
    (pooled,) = tables.pooled(reference.calls, [list(TABLE_PRECISIONS)])
    outputs = [[pooled[precision]] for precision in (*TABLE_PRECISIONS, Precision.INT8)]
    alone = [adapter.run_with_outputs(inputs, reference, of_plan).numpy() for of_plan in outputs]
    passes = DensePasses(adapter)
    np.testing.assert_array_equal(passes.logits(inputs, reference, outputs), alone)
    rows = counted(adapter, monkeypatch)
    np.testing.assert_array_equal(passes.logits(inputs, reference, outputs), alone)
    assert len(rows) == num_passes


def test_repeated_examples_are_those_examples(job):
    inputs = inputs_of(job.window("search").batch(0).part(0, 8))
    again = inputs.repeated(3)
    once, thrice = job.adapter.reference(inputs).logits, job.adapter.reference(again).logits
    torch.testing.assert_close(thrice, once.repeat(3))
