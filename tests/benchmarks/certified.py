"""How small certified plans are on the demo's traffic, and how often they hold on unseen traffic.

The demo's 400,000 examples (60,000 to search on, 120,000 to confirm on), its model with dim 64 and with dim 16, row
ranges by mse, budgets of 0.02 and 0.05 percent. Then the same searches on 20 further draws of the traffic, with the
same truth and the same model: 60,000 and 120,000 examples each, and 2,000,000 more on which every certified plan is
judged in the end.

Prints one JSON object as its last line: `certified_ratio_64_at_02`, `certified_ratio_64_at_05`,
`certified_ratio_16_at_02` (fp32 bytes / bytes of the certified plan; 0 where none is certified), `share_certified` (the
lowest of the three over the draws), `share_over_budget` (of all certified plans of the draws, those whose gap on the
2,000,000 examples is above the budget) with its limit, and the details of each search. SEEDS=4 in the environment
takes fewer draws.
"""

import json
import math
import os
import shutil
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sizes import sized

from lowprec.cli.demo import DEMO_CONFIG, generate_traffic
from lowprec.config import Config, load_config
from lowprec.core.progress import Silent
from lowprec.evaluation.evaluate import evaluate_plans
from lowprec.evaluation.workers.worker import LocalWorkers
from lowprec.models.training.train import train
from lowprec.plan import Plan
from lowprec.search import open_job, run_search

ROOT = Path("runs/certified")
NUM_DRAWS = int(os.environ.get("SEEDS", sized("20", "1")))
BUDGETS = (0.02, 0.05)
# (dim, budget) and the name of its figure.
FIGURES = {(64, 0.02): "64_at_02", (64, 0.05): "64_at_05", (16, 0.02): "16_at_02"}
ROWS_A_DAY, DEMO_DAYS, DRAW_DAYS, FRESH_DAYS = sized((40_000, 10, 4.5, 50), (1_000, 10, 4.5, 2))
# The demo's search window, in days.
DEMO_SEARCH = (5.5, 7)
PLANS_AT_ONCE = 8
# Widths of the layer below the interactions.
BOTTOM = {16: 32, 64: 64}
CONFIDENCE = 0.95


def config_of(dim: int, *overrides: str) -> Config:
    """The demo with tables of this dim."""
    return load_config(
        DEMO_CONFIG,
        (
            f"name=certified-{dim}",
            f"traffic.path={ROOT}/demo",
            f"model.args={{embedding_dim: {dim}, bottom: [{BOTTOM[dim]}], top: [64, 32]}}",
            f"model.checkpoint={ROOT}/model-{dim}.safetensors",
            "space.row_range=mse",
            f"search.budgets=[{', '.join(map(str, BUDGETS))}]",
            "search.budget=null",
            "evaluation.num_workers=0",
            f"results.root={ROOT}/results",
            *overrides,
        ),
    )


def stream(dim: int, search: tuple[float, float], confirm: tuple[float, float]) -> Config:
    """The same on a longer stream of the same truth, whose first rows are the demo's; windows in days."""
    days = DEMO_DAYS + math.ceil(NUM_DRAWS * DRAW_DAYS) + FRESH_DAYS
    return config_of(
        dim,
        f"traffic.path={ROOT}/stream",
        f"traffic.synthetic={{num_rows: {days * ROWS_A_DAY}, days: {days}, seed: 0}}",
        f"windows.search={_window(*search)}",
        f"windows.confirm={_window(*confirm)}",
    )


def _window(first: float, end: float) -> str:
    start = np.datetime64("2026-01-01T00:00")
    texts = [str(start + np.timedelta64(round(1440 * day), "m")) for day in (first, end)]
    return f"{{start: {texts[0]}, end: {texts[1]}}}"


def searched(config: Config) -> dict[float, tuple[Plan | None, dict[str, Any]]]:
    """For each budget the certified plan, None where there is none, and what is known of the recommended one."""
    outcome = run_search(config)
    found = {}
    for r in outcome.recommendations:
        plan, metrics = r.best.choice.trial.plan, r.best.metrics
        details = {
            "verdict": r.verdict,
            "ratio": round(outcome.fp32_bytes / r.best.choice.trial.size_bytes, 3),
            "gap_pct": round(metrics.gap_pct, 5),
            "upper_pct": round(metrics.gap_interval_pct.upper, 5),
            "kl_pct": round(metrics.kl_pct, 5),
            "probability": r.best.choice.probability,
        }
        found[r.budget_pct] = (plan if r.verdict == "certified" else None, details)
    return found


def draws(dim: int) -> dict[tuple[int, float], list[tuple[Plan | None, dict[str, Any]]]]:
    """The same searches on further draws."""
    found = defaultdict(list)
    for k in range(NUM_DRAWS):
        first = DEMO_DAYS + k * DRAW_DAYS
        one = searched(stream(dim, (first, first + 1.5), (first + 1.5, first + DRAW_DAYS)))
        for budget, result in one.items():
            if (dim, budget) in FIGURES:
                found[dim, budget].append(result)
        print(dim, k, {budget: details for budget, (_, details) in one.items()}, flush=True)
    return found


def gaps_on_fresh(dim: int, plans: list[Plan]) -> dict[Plan, float]:
    """The gap of each plan on the 2,000,000 examples, in percent."""
    first = DEMO_DAYS + math.ceil(NUM_DRAWS * DRAW_DAYS)
    job = open_job(stream(dim, DEMO_SEARCH, (first, first + FRESH_DAYS)))
    window, workers, found = job.window("confirm"), LocalWorkers(job.spec, job.adapter), {}
    for k in range(0, len(plans), PLANS_AT_ONCE):
        part = plans[k : k + PLANS_AT_ONCE]
        metrics = evaluate_plans(workers, window, part, confidence=CONFIDENCE, batches_per_task=4).metrics
        assert metrics[0].num_examples > 0.99 * FRESH_DAYS * ROWS_A_DAY
        found.update({plan: m.gap_pct for plan, m in zip(part, metrics, strict=True)})
    return found


def main() -> None:
    torch.set_num_threads(1)
    began = time.perf_counter()
    shutil.rmtree(ROOT / "results", ignore_errors=True)
    ratios, demo = {}, {}
    for dim in (64, 16):
        config = config_of(dim)
        generate_traffic(config, progress=Silent())
        if not Path(config.model.checkpoint).exists():
            train(config)
        for budget, (plan, details) in searched(config).items():
            if name := FIGURES.get((dim, budget)):
                ratios[f"certified_ratio_{name}"] = details["ratio"] if plan else 0.0
                demo[name] = details
        print(ratios, demo, flush=True)
    generate_traffic(stream(64, DEMO_SEARCH, (7, 10)), progress=Silent())
    every = draws(64) | draws(16)
    over, certified = 0, 0
    for dim in (64, 16):
        mine = [(b, plan) for (d, b), found in every.items() if d == dim for plan, _ in found if plan]
        gaps = gaps_on_fresh(dim, list(dict.fromkeys(plan for _, plan in mine)))
        over += sum(gaps[plan] > budget for budget, plan in mine)
        certified += len(mine)
        print(dim, {budget: [round(gaps[p], 5) for b, p in mine if b == budget] for budget in BUDGETS}, flush=True)
    allowed = 1 - CONFIDENCE
    shares = {FIGURES[key]: sum(plan is not None for plan, _ in found) / len(found) for key, found in every.items()}
    print(
        json.dumps(
            {
                **ratios,
                "share_certified": min(shares.values()),
                "share_over_budget": round(over / max(certified, 1), 4),
                "limit": round(allowed + 3 * math.sqrt(allowed * (1 - allowed) / max(certified, 1)), 4),
                "num_certified": certified,
                "shares_certified": shares,
                "median_ratios": {
                    FIGURES[key]: round(float(np.median([d["ratio"] for p, d in found if p] or [0.0])), 3)
                    for key, found in every.items()
                },
                "demo": demo,
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
