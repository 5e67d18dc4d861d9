"""Models of kinds that users have: attention, recurrent, in place, bf16. Every command takes them."""

import numpy as np
import pytest
import torch
from own_model import own_job, uniform_plan

from lowprec.debug import debug_plan
from lowprec.evaluation.exact.exact_evaluator import ExactEvaluator
from lowprec.evaluation.profile.profile import columns_of, logit_changes
from lowprec.export import export_plan
from lowprec.gate import verify_plan
from lowprec.models.adapter import inputs_of
from lowprec.monitor import run_monitor
from lowprec.plan import TABLE_PRECISIONS, Plan, Precision
from lowprec.search import open_job, run_search
from lowprec.search.record.describe import describe_job

KINDS = {
    "attention": """
class M(Base):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1)

    def forward(self, dense, sparse):
        x = torch.stack(self.pooled(sparse), 1)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.top(torch.cat([dense, x.flatten(1)], 1)).squeeze(1)
""",
    "encoder": """
class M(Base):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, dense, sparse):
        x = self.encoder(torch.stack(self.pooled(sparse), 1))
        return self.top(torch.cat([dense, x.flatten(1)], 1)).squeeze(1)
""",
    "lstm": """
class M(Base):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, dense, sparse):
        x = self.lstm(torch.stack(self.pooled(sparse), 1))[0]
        return self.top(torch.cat([dense, x.flatten(1)], 1)).squeeze(1)
""",
    "in place": """
class M(Base):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, dense, sparse):
        user, item, hist = self.pooled(sparse)
        user = self.act(user)
        item += 0.5 * user
        hist *= 2
        return self.top(torch.cat([dense, user, item, hist], 1)).squeeze(1)
""",
    "autocast": """
class M(Base):
    def forward(self, dense, sparse):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(dense, sparse)
""",
    "bf16 head": """
class M(Base):
    def __init__(self):
        super().__init__()
        self.top[2].bfloat16()

    def forward(self, dense, sparse):
        x = self.top[1](self.top[0](torch.cat([dense, *self.pooled(sparse)], 1)))
        return self.top[2](x.bfloat16()).squeeze(1)
""",
}
BUILD = "\n\ndef build():\n    return M()\n"


def job_of(kind, folder, **sections):
    return own_job(folder, KINDS[kind] + BUILD, **sections)


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_takes_the_model(kind, tmp_path):
    config = job_of(kind, tmp_path, space={"layers": ["fp32", "bf16", "int8_dynamic"]})
    describe_job(open_job(config))
    assert run_search(config).verdict == "certified"
    plan = uniform_plan(config, tmp_path, Precision.INT4, "bf16")
    verified = verify_plan(config, plan)
    assert verified.metrics.kl_pct > 0
    assert debug_plan(config, plan).metrics.kl_pct > 0
    assert run_monitor(config, plan).state != "error"
    assert export_plan(config, plan, tmp_path / "served").manifest.parity["equal"] == "to the bit"


@pytest.mark.parametrize("kind", KINDS)
def test_the_fp32_plan_has_no_gap_in_a_traced_pass(kind, tmp_path):
    """Kernels for gradients give other last bits than those of serving."""
    job = open_job(job_of(kind, tmp_path))
    evaluator = ExactEvaluator(job.adapter)
    plan = Plan.uniform(job.units, Precision.FP32)
    for k in range(2):
        batch = job.window("search").batch(k)
        traced = evaluator.traced(batch, plan, [])
        np.testing.assert_array_equal(traced.plan, traced.reference)
        np.testing.assert_array_equal(traced.reference, evaluator.logits(batch, []).reference)


@pytest.mark.parametrize("kind", KINDS)
def test_first_order_changes_are_those_of_an_exact_replacement(kind, tmp_path):
    """Of a plan so exact that nothing but the first order shows: int8 in one table."""
    job = open_job(job_of(kind, tmp_path))
    evaluator = ExactEvaluator(job.adapter)
    batch = job.window("search").batch(1)
    fp32 = Plan.uniform(job.units, Precision.FP32)
    columns = [c for c in columns_of(job.units, TABLE_PRECISIONS) if c[1] is Precision.INT8]
    reference, s = logit_changes(evaluator, batch, tuple(columns))
    exact = evaluator.logits(batch, [fp32.replace({unit: p}) for unit, p in columns]).plans
    np.testing.assert_array_equal(reference, evaluator.logits(batch, []).reference)
    for predicted, found in zip(s, exact, strict=True):
        change = found - reference
        if "bf16" in kind or kind == "autocast":  # int8 is less than the steps of bf16: no more than those may differ
            assert np.abs(change - predicted).max() < 0.02
        else:
            assert np.corrcoef(change, predicted)[0, 1] > 0.99
            assert np.linalg.norm(change - predicted) < 0.15 * np.linalg.norm(change)


def test_layers_that_are_not_called_are_not_offered(tmp_path):
    config = job_of("attention", tmp_path, space={"layers": ["bf16"]})
    document = describe_job(open_job(config))
    assert [u["name"] for u in document["units"] if u["name"].startswith("layer:")] == ["layer:top.0", "layer:top.2"]
    (tmp_path / "e").mkdir()
    config = job_of("encoder", tmp_path / "e", space={"layers": ["fp32", "bf16"]})
    document = describe_job(open_job(config))
    offered = {u["name"] for u in document["units"] if u["name"].startswith("layer:") and "bf16" in u["precisions"]}
    assert offered == {"layer:top.0", "layer:top.2"}
    assert any("linear1 is not called through its module" in note for note in document["notes"])


def test_pooled_embeddings_are_not_changed_by_what_the_model_does_with_them(tmp_path):
    job = open_job(job_of("in place", tmp_path))
    inputs = inputs_of(job.window("search").batch(0))
    for call in (*job.adapter.reference(inputs).calls, *job.adapter.differentiated(inputs)[0].calls):
        weight = job.adapter.weights[call.table]
        plain = torch.nn.functional.embedding_bag(
            call.indices, weight, call.offsets, mode=call.mode, include_last_offset=True
        )
        torch.testing.assert_close(call.output, plain)
