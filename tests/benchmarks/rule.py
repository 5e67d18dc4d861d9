"""Does a search find the cheapest plan that its own rule allows, and does that plan hold?

Ten kinds of small models (calibrated, trained two and four epochs too long, logits shifted by a bias, logits scaled;
each with dim 16 and 64) have spaces of 4,096 plans, all of which are evaluated exactly on the whole search window of
20,000 examples. A search may evaluate 64 of them. Its boldest finalist is compared with the cheapest plan that meets
the rule by the full evaluation. Every kind is then searched on the traffic of further seeds, and the recommended plan
is judged on 10 times the examples of its confirm window, which neither training nor search has seen.

Prints one JSON object as its last line: `regret_bytes` (bytes of the boldest finalist / bytes of the cheapest plan that
meets the rule, worst model; infinite where the finalist breaks the rule by the full evaluation), `held` (share of
recommended plans whose gap on unseen traffic is within budget, over `num_held` models and seeds). It takes about an
hour; QUICK=1 in the environment gives each model 729 plans, which takes about 20 minutes.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sizes import sized
from torch import nn

from lowprec.cli.demo import DEMO_CONFIG, generate_traffic
from lowprec.config import Config, load_config
from lowprec.core.progress import Silent
from lowprec.evaluation.evaluate import evaluate_plans
from lowprec.evaluation.metrics import PlanMetrics
from lowprec.evaluation.rows import RowAccount
from lowprec.evaluation.workers.worker import LocalWorkers
from lowprec.models.dlrm import build
from lowprec.models.inputs import inputs_of
from lowprec.plan import Plan
from lowprec.search import SearchJob, open_job, run_search
from lowprec.search.confirm.alpha_spending import confidence_of_attempt
from lowprec.search.confirm.choice import finalists
from lowprec.search.record.record import RunRecord
from lowprec.search.record.trial import Trial
from lowprec.search.rule import Forecast
from lowprec.search.surrogate.surrogate import build_surrogate
from lowprec.storage import Location

SIZES = (300, 1000, 3000, 8000, 20000, 40000)
ROOT = Path("runs/rule")
IS_QUICK = sized(os.environ.get("QUICK") == "1", True)
NUM_SEEDS = sized(4, 1)
PRECISIONS = "[int8, int4, int2]" if IS_QUICK else "[fp16, int8, int4, int2]"
MAX_TRIALS, PLANS_AT_ONCE = 64, 256
# Epochs over 40,000 examples without early stopping, and what is done to the logits afterwards: times a scale, plus a
# shift.
KINDS = {
    "calibrated": (1, 1.0, 0.0),
    "overfitted_2": (2, 1.0, 0.0),
    "overfitted_4": (4, 1.0, 0.0),
    "shifted": (1, 1.0, 0.4),
    "scaled": (1, 1.4, 0.0),
}
DIMS = sized((16, 64), (16,))
# In percent; the rule parts the space of every model somewhere in its middle.
BUDGET = 0.1
# 40,000 examples to train on, 20,000 to search, 20,000 to confirm, and 200,000 that only the judge sees.
DAY = sized(10_000, 1_000)
WINDOWS = {"train": (0, 4), "search": (4, 6), "confirm": (6, 8), "unseen": (8, 28)}


@dataclass(frozen=True)
class Case:
    """One model on the traffic of one seed."""

    kind: str
    dim: int
    seed: int

    def config(self, *, confirm: str = "confirm") -> Config:
        """The search of this model; `confirm` names the window that it is confirmed on."""
        sparse = [{"name": f"c{i}", "num_embeddings": n} for i, n in enumerate(SIZES)]
        windows = {name: _window(*WINDOWS[name]) for name in ("train", "search")}
        windows["confirm"] = _window(*WINDOWS[confirm])
        return load_config(
            DEMO_CONFIG,
            (
                f"name=rule-{self.kind}-{self.dim}-{self.seed}",
                f"traffic.path={ROOT}/traffic-{self.seed}",
                "traffic.batch_size=1024",
                f"traffic.sparse={json.dumps(sparse)}",
                "traffic.dense=[d0, d1, d2]",
                f"traffic.synthetic={{num_rows: {28 * DAY}, days: 28, seed: {self.seed}, num_sparse: 6, num_dense: 3, "
                f"num_multi_hot: 1, num_interactions: 3, dense_share: 0.1, table_sizes: {list(SIZES)}}}",
                f"model.checkpoint={ROOT}/{self.kind}-{self.dim}-{self.seed}.pt",
                f"model.args={{embedding_dim: {self.dim}, bottom: [8], top: [16]}}",
                *(f"windows.{name}={json.dumps(window)}" for name, window in windows.items()),
                "windows.validation=null",
                f"space.precisions={PRECISIONS}",
                f"search.budget={BUDGET}",
                f"search.max_trials={MAX_TRIALS}",
                "evaluation.num_workers=0",
                f"results.root={ROOT}/results",
            ),
        )


def _window(first_day: int, end_day: int) -> dict[str, str]:
    return {name: f"2026-01-{1 + day:02d}" for name, day in (("start", first_day), ("end", end_day))}


def cases(seeds: range) -> Iterator[Case]:
    """All kinds of models."""
    for seed in seeds:
        for kind in KINDS:
            for dim in DIMS:
                yield Case(kind, dim, seed)


def train_all(seed: int, dim: int) -> None:
    """Write the checkpoints of all kinds: one model, kept after one, two and four epochs."""
    config = Case("calibrated", dim, seed).config()
    generate_traffic(config, progress=Silent())
    if Path(config.model.checkpoint).exists():
        return
    torch.manual_seed(seed)
    model = build(config.traffic.schema_of_columns(), dim, (8,), (16,))
    tables = [module for module in model.modules() if isinstance(module, nn.EmbeddingBag)]
    for table in tables:
        table.sparse = False
    torch.save(model.state_dict(), config.model.checkpoint)  # so that the job can be opened
    batches = list(open_job(config).window("train").batches())
    of_tables = {id(table.weight) for table in tables}
    optimizers = [
        torch.optim.Adam([p for p in model.parameters() if id(p) not in of_tables], lr=2e-3),
        torch.optim.Adagrad([table.weight for table in tables], lr=0.05),
    ]
    for epoch in range(1, 5):
        for k in np.random.default_rng(epoch).permutation(len(batches)):
            inputs, labels = inputs_of(batches[k]), torch.from_numpy(batches[k].labels)
            loss = nn.functional.binary_cross_entropy_with_logits(model(inputs.dense, dict(inputs.sparse)), labels)
            model.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        for kind, (epochs, scale, shift) in KINDS.items():
            if epochs == epoch:
                torch.save(_rescaled(model, scale, shift), Case(kind, dim, seed).config().model.checkpoint)


def _rescaled(model: nn.Module, scale: float, shift: float) -> dict[str, torch.Tensor]:
    """The weights, with logits times a scale plus a shift: both act on the last layer."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    last = max((name for name in weights if name.startswith("top.")), key=lambda name: int(name.split(".")[1]))
    last = last.rsplit(".", 1)[0]
    weights[f"{last}.weight"] *= scale
    weights[f"{last}.bias"] = weights[f"{last}.bias"] * scale + shift
    return weights


def full_metrics(job: SearchJob, plans: list[Plan]) -> list[PlanMetrics]:
    """Every plan on the whole search window."""
    found: list[PlanMetrics] = []
    workers, window = LocalWorkers(job.spec, job.adapter), job.window("search")
    for first in range(0, len(plans), PLANS_AT_ONCE):
        part = plans[first : first + PLANS_AT_ONCE]
        found += evaluate_plans(workers, window, part, confidence=0.95, batches_per_task=1).metrics
    return found


def forecast_of(job: SearchJob) -> Forecast:
    """How the confirm window will judge."""
    return Forecast.of(
        confidence=confidence_of_attempt(job.config.search.confidence, 0),
        num_search=job.window("search").num_rows,
        num_confirm=job.window("confirm").num_rows,
    )


def risks_of(job: SearchJob, plans: list[Plan], metrics: list[PlanMetrics]) -> np.ndarray:
    """The risk of every plan by its full evaluation, float64[P]."""
    forecast, workers = forecast_of(job), LocalWorkers(job.spec, job.adapter)
    measured = job.measure_profile(workers, "search", job.window("search"), quarantine=Location.of("unused"))
    costs = job.search_costs(measured.use)
    surrogate = build_surrogate(measured, job.space, costs, budgets=job.config.search.all_budgets, forecast=forecast)
    expected = [m.gap_pct + c for m, c in zip(metrics, surrogate.corrections_pct(plans), strict=True)]
    return np.array(
        [
            forecast.risk_pct(Trial("", 0, 0, "", plan, 0, None, 0.0, None, m, None, RowAccount(0, 0, 0, {}), e))
            for plan, m, e in zip(plans, metrics, expected, strict=True)
        ]
    )


def searched(case: Case) -> tuple[Plan, Plan, int, int]:
    """The recommended plan of a search, its boldest finalist, exact evaluations and the best plan's kind."""
    config = case.config()
    outcome = run_search(config)
    trials = RunRecord(open_job(config), outcome.run_id).trials("exact")
    budget = config.search.all_budgets[0]
    boldest = min((c.trial for c in finalists(trials, budget, forecast_of(open_job(config)))), key=lambda t: t.cost)
    assert len(trials) <= MAX_TRIALS
    return outcome.recommendations[0].best.choice.trial.plan, boldest.plan, len(trials), boldest.wave


def regret(case: Case) -> dict[str, float]:
    """What the search of a model misses."""
    config = case.config()
    job = open_job(config)
    budget = config.search.all_budgets[0]
    plans = list(job.space.every_plan())
    began = time.perf_counter()
    metrics = full_metrics(job, plans)
    seconds = time.perf_counter() - began
    risks = risks_of(job, plans, metrics)
    sizes = np.array([job.space.size_bytes(plan) for plan in plans], dtype=float)
    assert (risks <= budget).any(), "no plan meets the rule: choose another budget"
    best = float(sizes[risks <= budget].min())
    _, boldest, num_trials, wave = searched(case)
    k = plans.index(boldest)
    return {
        "regret_bytes": round(float(sizes[k]) / best if risks[k] <= budget else math.inf, 4),
        "best_ratio": round(job.space.fp32_bytes / best, 2),
        "share_that_meets_the_rule": round(float((risks <= budget).mean()), 3),
        "gap_of_boldest": round(metrics[k].gap_pct, 4),
        "kl_of_boldest": round(metrics[k].kl_pct, 4),
        "risk_of_boldest": round(float(risks[k]), 4),
        "exact_evaluations": num_trials,
        "wave": wave,
        "ne_ref": round(metrics[0].ne_ref, 4),
        "seconds_exhaustive": round(seconds, 1),
    }


def gap_on_unseen(case: Case, plan: Plan) -> float:
    """The gap on 10 times as much traffic as it was confirmed on, in percent."""
    job = open_job(case.config(confirm="unseen"))
    workers = LocalWorkers(job.spec, job.adapter)
    found = evaluate_plans(workers, job.window("confirm"), [plan], confidence=0.95, batches_per_task=4)
    return found.metrics[0].gap_pct


def main() -> None:
    torch.set_num_threads(1)
    began = time.perf_counter()
    shutil.rmtree(ROOT / "results", ignore_errors=True)
    for seed in range(NUM_SEEDS):
        for dim in DIMS:
            train_all(seed, dim)
    models = {}
    for case in cases(range(1)):
        models[f"{case.kind}_{case.dim}"] = regret(case)
        print(case.kind, case.dim, models[f"{case.kind}_{case.dim}"], flush=True)
    held = []
    for case in cases(range(NUM_SEEDS)):
        gap = gap_on_unseen(case, searched(case)[0])
        held.append(gap <= BUDGET)
        print(f"{case}: gap on unseen traffic {gap:+.4f} percent of {BUDGET}", flush=True)
    print(
        json.dumps(
            {
                "regret_bytes": max(model["regret_bytes"] for model in models.values()),
                "held": round(float(np.mean(held)), 4),
                "num_held": len(held),
                "models": models,
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
