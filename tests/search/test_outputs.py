"""Models that return probabilities: refused, or converted where they are declared, by every command."""

import numpy as np
import pytest
import torch
from own_model import own_job, uniform_plan

from lowprec.core.errors import ModelError
from lowprec.debug import debug_plan
from lowprec.evaluation.exact.exact_evaluator import ExactEvaluator
from lowprec.evaluation.profile.profile import columns_of, logit_changes
from lowprec.export import export_plan, load
from lowprec.gate import verify_plan
from lowprec.models.training.train import train
from lowprec.monitor import run_monitor
from lowprec.plan import TABLE_PRECISIONS
from lowprec.search import open_job, run_search
from lowprec.search.record.describe import describe_job

SIGMOID = """
class Sigmoid(Base):
    def forward(self, dense, sparse):
        return torch.sigmoid(2 * super().forward(dense, sparse))


def build():
    return Sigmoid()
"""
LOGITS = SIGMOID.replace("torch.sigmoid(", "(")


def with_train(config):
    windows = {"train": config.windows.search.model_copy(update={"start": 0, "end": 86_400})}
    return config.with_(windows=windows)


def test_undeclared_probabilities_are_refused_by_every_command(tmp_path):
    declared = own_job(tmp_path, SIGMOID, model={"outputs": "probabilities"})
    config = declared.with_(model={"outputs": "logits"})
    plan = uniform_plan(config, tmp_path)
    commands = {
        "dry run": lambda: describe_job(open_job(config.with_(traffic={"batch_size": 1000}))),
        "search": lambda: run_search(config),
        "verify": lambda: verify_plan(config, plan),
        "debug": lambda: debug_plan(config, plan),
        "export": lambda: export_plan(config, plan, tmp_path / "served"),
    }
    for name, command in commands.items():
        with pytest.raises(ModelError, match=r"lie in \[0, 1\].*model\.outputs: probabilities"):
            command()
            pytest.fail(name)
    monitored = run_monitor(config, plan)
    assert monitored.state == "error" and "model.outputs: probabilities" in monitored.message
    with pytest.raises(ModelError, match=r"model\.outputs: probabilities"):
        train(with_train(config))


def test_declared_probabilities_give_the_plans_and_gaps_of_their_logits(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "z").mkdir()
    config = own_job(tmp_path / "p", SIGMOID, model={"outputs": "probabilities"})
    expected = own_job(tmp_path / "z", LOGITS)
    plan = uniform_plan(config, tmp_path / "p")
    found = verify_plan(config, plan).metrics
    wanted = verify_plan(expected, uniform_plan(expected, tmp_path / "z")).metrics
    assert found.kl_pct == pytest.approx(wanted.kl_pct, rel=1e-3)
    assert found.gap_pct == pytest.approx(wanted.gap_pct, rel=1e-3)
    job, other = open_job(config), open_job(expected)
    columns = columns_of(job.units, TABLE_PRECISIONS)
    batch = job.window("search").batch(0)
    first = logit_changes(ExactEvaluator(job.adapter), batch, columns)[1]
    np.testing.assert_allclose(
        first, logit_changes(ExactEvaluator(other.adapter), batch, columns)[1], rtol=1e-2, atol=1e-5
    )
    assert run_search(config).verdict == run_search(expected).verdict
    debug_plan(config, plan)
    assert run_monitor(config, plan).state != "error"
    export_plan(config, plan, tmp_path / "served", programs=["torchscript"])
    served = load(tmp_path / "served")
    dense = torch.zeros(2, 1)
    ids = (torch.tensor([1, 2]), torch.tensor([0, 1, 2]))
    out = served(dense, dict.fromkeys(("user", "item", "history"), ids))
    assert ((out > 0) & (out < 1)).all()  # as the model returns them


def test_probabilities_are_trained(tmp_path):
    config = own_job(tmp_path, SIGMOID, model={"outputs": "probabilities"}, train={"epochs": 1, "batch_size": 64})
    report = train(with_train(config))
    assert np.isfinite(report.train.ne) and report.train.ne < 1.1


def test_logits_that_all_lie_in_0_to_1_can_be_declared(tmp_path):
    narrow = LOGITS.replace("(2 * super().forward(dense, sparse))", "torch.sigmoid(super().forward(dense, sparse))")
    config = own_job(tmp_path, narrow, model={"outputs": "unchecked_logits"})
    verify_plan(config, uniform_plan(config, tmp_path))
