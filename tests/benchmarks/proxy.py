"""The profile against exact evaluation: does it predict gaps, what does it cost, how fast does it score plans.

The demo model on its large search window, one thread, in process. Prints one JSON object as its last line:
`correlation` of the proxy gap with the exact gap over 200 random mixed plans, `profile_passes` (CPU time of a profile /
of one fp32 pass over the same window, both reading it, in turn; median), `plans_per_s` scored by the quadratic model.
"""

import json
import statistics
import time

import numpy as np
import torch
from demo_model import large_demo_config
from passes import cpu_seconds, fp32_pass
from sizes import sized

from lowprec.evaluation.evaluate import evaluate_plans
from lowprec.evaluation.profile.profile import Profile
from lowprec.evaluation.profile.window_profile import measure_profile
from lowprec.evaluation.workers.worker import LocalWorkers
from lowprec.plan import TABLE_PRECISIONS, Plan
from lowprec.search import open_job
from lowprec.search.surrogate.proxy import build_proxy

NUM_PLANS, PLANS_AT_ONCE, REPEATS, NUM_SCORED = sized((200, 50, 3, 1_000_000), (8, 4, 1, 1_000))


def main() -> None:
    job = open_job(large_demo_config("space.row_range=mse"))
    workers = LocalWorkers(job.spec, job.adapter)
    window = job.window("search")
    torch.set_num_threads(1)

    def profile() -> Profile:
        return measure_profile(workers, window, job.columns, by_group=False, batches_per_task=4).profile

    measured = profile()  # every touched row is quantized now, as it is for the exact evaluations
    rounds = []
    for _ in range(REPEATS):
        rounds.append({"pass": cpu_seconds(lambda: fp32_pass(job)), "profile": cpu_seconds(profile)})
        print({k: round(v, 2) for k, v in rounds[-1].items()}, flush=True)
    cold = LocalWorkers(job.spec, job.adapter)
    first_profile = cpu_seconds(lambda: measure_profile(cold, window, job.columns, by_group=False, batches_per_task=4))

    rng = np.random.default_rng(0)
    plans = [
        Plan({u.name: TABLE_PRECISIONS[k] for u, k in zip(job.units, rng.integers(0, 5, len(job.units)), strict=True)})
        for _ in range(NUM_PLANS)
    ]
    exact_gap, exact_kl = [], []
    for first in range(0, NUM_PLANS, PLANS_AT_ONCE):
        part = plans[first : first + PLANS_AT_ONCE]
        found = evaluate_plans(workers, window, part, confidence=0.95, batches_per_task=4).metrics
        exact_gap += [m.gap_pct for m in found]
        exact_kl += [m.kl_pct for m in found]
        print(f"{len(exact_gap)} plans evaluated exactly", flush=True)
    gap, kl = measured.gaps_pct(measured.selected(plans))

    k = len(measured.columns)
    percent = 100 / measured.loss
    model = build_proxy(
        job.space,
        measured.columns,
        measured.first[:k] * percent,
        measured.second.dense()[:k, :k] * percent,
        cost=lambda unit, precision: float(job.space.size_of(unit, precision)),
    )
    scored = model.gaps(np.stack([model.picks(plan) for plan in plans]))
    np.testing.assert_allclose(scored, gap, rtol=1e-6, atol=1e-9)
    picks = rng.integers(0, 5, (NUM_SCORED, len(job.units)))
    model.gaps(picks[:1000])
    began = time.perf_counter()
    model.gaps(picks)
    rate = NUM_SCORED / (time.perf_counter() - began)

    ratios = [r["profile"] / r["pass"] for r in rounds]
    print(
        json.dumps(
            {
                "correlation": round(float(np.corrcoef(gap, exact_gap)[0, 1]), 6),
                "profile_passes": round(statistics.median(ratios), 3),
                "plans_per_s": round(rate),
                "profile_passes_range": [round(min(ratios), 3), round(max(ratios), 3)],
                "profile_passes_with_quantizing": round(
                    first_profile / statistics.median(r["pass"] for r in rounds), 3
                ),
                "correlation_kl": round(float(np.corrcoef(kl, exact_kl)[0, 1]), 6),
                "gap_range_pct": [round(min(exact_gap), 4), round(max(exact_gap), 4)],
                "num_plans": NUM_PLANS,
                "num_examples": measured.num_rows,
                "num_columns": k,
                "threads": 1,
                "repeats": REPEATS,
            }
        )
    )


if __name__ == "__main__":
    main()
