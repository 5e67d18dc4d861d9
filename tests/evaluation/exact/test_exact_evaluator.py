"""Exact evaluation is what serving would compute, and sharing work between plans changes no bit."""

import copy

import numpy as np
import pytest
import torch

from lowprec import ops
from lowprec.core.errors import ModelError, WeightError
from lowprec.evaluation.exact.exact_evaluator import ExactEvaluator
from lowprec.models.adapter import inputs_of
from lowprec.plan import TABLE_PRECISIONS, Plan, Precision
from lowprec.search import open_job


@pytest.fixture
def job(small_config):
    return open_job(small_config())


@pytest.fixture
def batch(job):
    return job.window("search").batch(1)


def random_plans(units, count, seed=0):
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, 5, (count, len(units)))
    return [Plan({u.name: TABLE_PRECISIONS[k] for u, k in zip(units, row, strict=True)}) for row in picks]


def test_logits_are_those_of_a_model_with_dequantized_tables(job, batch):
    """The oracle: whole tables quantized and restored, run by PyTorch. Only the order of pooling sums may differ."""
    evaluator = ExactEvaluator(job.adapter)
    (plan,) = random_plans(job.units, 1)
    got = evaluator.logits(batch, [plan]).plans[0]
    model = copy.deepcopy(job.adapter.model)
    for name, bag in model.tables.items():
        precision = plan[f"table:{name}"]
        rows = bag.weight.detach().numpy()
        restored = ops.dequantize(ops.quantize(rows, precision), precision, rows.shape[1])
        bag.weight = torch.nn.Parameter(torch.from_numpy(np.array(restored)))
    inputs = inputs_of(batch)
    with torch.inference_mode():
        expected = model(inputs.dense, dict(inputs.sparse)).numpy()
    assert np.abs(got - evaluator.logits(batch, []).reference).max() > 1e-3  # the plan does something
    # Sums of up to 30 ids of order 1 in fp32, amplified by the dense part: 1e-5 is some ten roundings.
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)


def test_plans_evaluated_together_get_the_bits_that_they_get_alone(job, batch):
    plans = random_plans(job.units, 12)
    together = ExactEvaluator(job.adapter).logits(batch, plans).plans
    for k, plan in enumerate(plans):
        alone = ExactEvaluator(job.adapter).logits(batch, [plan]).plans[0]
        np.testing.assert_array_equal(together[k], alone)


def test_the_fp32_plan_is_the_reference(job, batch):
    logits = ExactEvaluator(job.adapter).logits(batch, [Plan.uniform(job.units, Precision.FP32)])
    np.testing.assert_array_equal(logits.plans[0], logits.reference)


def test_gaps_order_by_precision(job, batch):
    plans = [Plan.uniform(job.units, p) for p in (Precision.INT2, Precision.INT4, Precision.INT8, Precision.FP16)]
    sums = ExactEvaluator(job.adapter).sums(batch, plans)
    kl = [sums.metrics(k, confidence=0.95).kl_pct for k in range(4)]
    assert kl == sorted(kl, reverse=True) and kl[0] > 100 * kl[2]


def test_a_batch_whose_rows_were_all_bad_adds_nothing(job, batch):
    from dataclasses import replace

    empty = replace(
        batch,
        labels=batch.labels[:0],
        dense=batch.dense[:0],
        times=batch.times[:0],
        sparse={n: type(b)(b.values[:0], b.offsets[:1]) for n, b in batch.sparse.items()},
    )
    plans = random_plans(job.units, 2)
    evaluator = ExactEvaluator(job.adapter)
    some = evaluator.sums(batch, plans)
    assert (some + evaluator.sums(empty, plans)).metrics(0, confidence=0.9) == some.metrics(0, confidence=0.9)


def test_a_table_that_the_model_reads_past_its_module_is_not_measured_as_harmless(job, batch):
    """The model looks c5 up by itself: low precision there cannot be seen, and must not look harmless."""
    model = job.adapter.model
    table = model.tables["c5"]

    class Past(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = torch.nn.ModuleDict({"c4": model.tables["c4"], "c5": table})

        def forward(self, dense, sparse):
            seen = self.tables["c4"](*sparse["c4"])
            ids, offsets = sparse["c5"]
            unseen = torch.nn.functional.embedding_bag(
                ids, self.tables["c5"].weight, offsets, mode="sum", include_last_offset=True
            )
            return (seen + unseen).sum(1)

    from lowprec.models.adapter import ModelAdapter

    evaluator = ExactEvaluator(ModelAdapter(Past()))
    units = evaluator.adapter.units
    evaluator.logits(batch, [Plan({"table:c4": Precision.INT2, "table:c5": Precision.FP32})])
    with pytest.raises(ModelError, match='"table:c5" was to be int2, but the model did not call it'):
        evaluator.logits(batch, [Plan.uniform(units, Precision.INT2)])


def test_a_weight_that_is_not_finite_is_named_although_its_table_stays_fp32(job, batch):
    evaluator = ExactEvaluator(job.adapter)
    row = int(batch.sparse["c1"].values[0])
    with torch.no_grad():
        job.adapter.model.tables["c1"].weight[row, 3] = float("nan")
    with pytest.raises(WeightError, match=f'"table:c1": row {row} holds nan in column 3'):
        evaluator.logits(batch, [Plan.uniform(job.units, Precision.FP32)])


def test_dense_weights_that_overflow_are_said_to(job, batch):
    with torch.no_grad():
        job.adapter.model.top[0].weight.fill_(3e38)
    with pytest.raises(ModelError, match="a logit that is not finite"):
        ExactEvaluator(job.adapter).logits(batch, [])
