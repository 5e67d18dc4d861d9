"""What a search misses: a 6-table model small enough that all 15,625 plans are evaluated exactly.

The search may evaluate 64 plans; every plan's exact gap on the same 20,000 examples is known here. Prints one JSON
object as its last line: `hypervolume_ratio` (the plans that the search evaluated / all plans, both by exact gaps, bytes
as a share of fp32, against the corner of fp32's bytes and the gap of all-int2), `exact_evaluations` of the search;
`by_kl` is the same ratio with KL gaps, which have no label noise that a front could be made of. That is with
`row_range: minmax`. `default_row_range` is the default row range with dim 64, where labelled gaps on 20,000 examples
are mostly label noise: there `hypervolume_ratio` is by KL gap, and `by_gap` by labelled gap.
"""

import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypervolume import front, hypervolume

import lowprec
from lowprec.cli.demo import DEMO_CONFIG, generate_traffic
from lowprec.config import Config, load_config
from lowprec.core.progress import Silent
from lowprec.evaluation.evaluate import evaluate_plans
from lowprec.evaluation.workers.worker import LocalWorkers, evaluator_of
from lowprec.models.training.train import train
from lowprec.plan import TABLE_PRECISIONS, Plan, Precision
from lowprec.search import SearchJob, open_job, run_search

SIZES = (300, 1000, 3000, 8000, 20000, 40000)
ROOT = Path("runs/regret")
PLANS_AT_ONCE = 500


def small_config(dim: int, row_range: str) -> Config:
    """Six tables, a dense part of one small layer, 40,000 examples to train on and 20,000 to search on."""
    sparse = [{"name": f"c{i}", "num_embeddings": n} for i, n in enumerate(SIZES)]
    config = load_config(
        DEMO_CONFIG,
        (
            "name=regret",
            f"traffic.path={ROOT}/traffic",
            f"traffic.sparse={json.dumps(sparse)}",
            "traffic.dense=[d0, d1, d2]",
            "traffic.synthetic={num_rows: 80000, seed: 1, num_sparse: 6, num_dense: 3, num_multi_hot: 1, "
            f"num_interactions: 3, dense_share: 0.1, table_sizes: {list(SIZES)}}}",
            f"model.checkpoint={ROOT}/model-{dim}.safetensors",
            f"model.args={{embedding_dim: {dim}, bottom: [8], top: [16]}}",
            "train.embedding_learning_rate=0.1",
            "train.decay=linear",
            "train.epochs=2",
            "windows.search={start: 2026-01-06T12:00, end: 2026-01-09}",
            "windows.confirm={start: 2026-01-09}",
            "search.max_trials=64",
            f"space.row_range={row_range}",
            "evaluation.num_workers=0",
            f"results.root={ROOT}/results",
        ),
    )
    generate_traffic(config, progress=Silent())
    if not Path(config.model.checkpoint).exists():
        train(config)
    return config


def exact_gaps(job: SearchJob, plans: list[Plan]) -> tuple[np.ndarray, np.ndarray]:
    """The gap and the KL gap of every plan on the search window, in percent."""
    evaluator = evaluator_of(job.spec, job.adapter)
    change, divergence, loss = np.zeros(len(plans)), np.zeros(len(plans)), 0.0
    batches = list(job.window("search").batches())
    for first in range(0, len(plans), PLANS_AT_ONCE):
        part = slice(first, first + PLANS_AT_ONCE)
        for batch in batches:
            logits = evaluator.logits(batch, plans[part])
            z, changed = logits.reference.astype(float), logits.plans.astype(float)
            rise = np.logaddexp(0, changed) - np.logaddexp(0, z)
            change[part] += (rise - batch.labels * (changed - z)).sum(axis=1)
            divergence[part] += (rise - (changed - z) / (1 + np.exp(-z))).sum(axis=1)
            loss += float((np.logaddexp(0, z) - batch.labels * z).sum()) if first == 0 else 0.0
        if first % 2500 == 0:
            print(f"{first + PLANS_AT_ONCE} of {len(plans)} plans evaluated", flush=True)
    return 100 * change / loss, 100 * divergence / loss


def measure(config: Config) -> dict[str, Any]:
    """Everything about one model and way of choosing row ranges."""
    job = open_job(config)
    plans = [
        Plan({u.name: p for u, p in zip(job.units, row, strict=True)})
        for row in itertools.product(TABLE_PRECISIONS, repeat=len(job.units))
    ]
    began = time.perf_counter()
    gaps, kls = exact_gaps(job, plans)
    seconds_exhaustive = time.perf_counter() - began
    some = [0, 77, 5000, len(plans) - 1]
    checked = evaluate_plans(
        LocalWorkers(job.spec, job.adapter),
        job.window("search"),
        [plans[k] for k in some],
        confidence=0.95,
        batches_per_task=4,
    )
    np.testing.assert_allclose([m.gap_pct for m in checked.metrics], gaps[some], atol=1e-6)

    shutil.rmtree(ROOT / "results", ignore_errors=True)
    began = time.perf_counter()
    outcome = run_search(config)
    seconds = time.perf_counter() - began
    rows = lowprec.query(
        f"SELECT plan_json, kind FROM trials WHERE run_id = '{outcome.run_id}' AND evaluation = 'exact'",
        str(ROOT / "results"),
    )
    index = {plan: k for k, plan in enumerate(plans)}
    found = [index[Plan({n: Precision(p) for n, p in json.loads(text).items()})] for text in rows["plan_json"]]

    sizes = np.array([job.space.size_bytes(plan) for plan in plans], dtype=float)
    corner = len(plans) - 1

    def ratio(values: np.ndarray) -> float:
        reference = (float(sizes[0]), float(values[corner]))
        return hypervolume(sizes[found], values[found], reference=reference) / hypervolume(
            sizes, values, reference=reference
        )

    return {
        "hypervolume_ratio": round(ratio(gaps), 5),
        "exact_evaluations": len(found),
        "by_kl": round(ratio(kls), 5),
        "front_plans": len(front(sizes, gaps)),
        "front_plans_found": len(set(front(sizes, gaps)) & set(found)),
        "gap_of_int2_pct": round(float(gaps[corner]), 4),
        "num_plans": len(plans),
        "num_examples": job.window("search").num_rows,
        "seconds_search": round(seconds, 1),
        "seconds_exhaustive": round(seconds_exhaustive, 1),
        "kinds": rows["kind"].value_counts().to_dict(),
    }


def main() -> None:
    torch.set_num_threads(1)
    found = measure(small_config(16, "minmax"))
    print("default row range:", flush=True)
    default = measure(small_config(64, "mse"))
    by_gap = default.pop("hypervolume_ratio")
    print(
        json.dumps(
            {**found, "default_row_range": {"hypervolume_ratio": default.pop("by_kl"), "by_gap": by_gap, **default}}
        )
    )


if __name__ == "__main__":
    main()
