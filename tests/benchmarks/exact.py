"""Exact evaluation of 32 random plans: together against one by one, and against the dense passes that nobody can save.

In process, one thread, the demo model on its search window. Prints one JSON object as its last line:
`shared_speedup` (one by one / together, nothing shared between single evaluations but the loaded model),
`shared_speedup_warm` (single evaluations that find all rows quantized by an earlier one), `over_floor` (together / the
dense passes). Everything is timed in turn, round by round; ratios are medians over rounds.
"""

import json
import statistics
import time
from collections.abc import Callable

import numpy as np
from demo_model import demo_config
from sizes import sized

from lowprec.evaluation.evaluate import Evaluation, evaluate_plans
from lowprec.evaluation.workers.worker import LocalWorkers, evaluator_of
from lowprec.models.adapter import inputs_of
from lowprec.plan import TABLE_PRECISIONS, Plan
from lowprec.search import SearchJob, open_job

NUM_PLANS, REPEATS = sized((32, 3), (4, 1))


def evaluate(job: SearchJob, workers: LocalWorkers, plans: list[Plan]) -> Evaluation:
    return evaluate_plans(workers, job.window("search"), plans, confidence=0.95, batches_per_task=4)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def dense_seconds(job: SearchJob, plans: list[Plan]) -> float:
    """The dense passes of all plans and nothing else: pooled outputs are made before the clock starts."""
    evaluator = evaluator_of(job.spec, job.adapter)
    total = 0.0
    for batch in job.window("search").batches():
        inputs = inputs_of(batch)
        reference = job.adapter.reference(inputs)
        pooled = evaluator.tables.pooled(reference.calls, [list(TABLE_PRECISIONS)] * len(reference.calls))
        outputs = [[p[plan[c.table]] for p, c in zip(pooled, reference.calls, strict=True)] for plan in plans]
        began = time.perf_counter()
        for chosen in outputs:
            job.adapter.run_with_outputs(inputs, reference, chosen)
        total += time.perf_counter() - began
    return total


def main() -> None:
    config = demo_config("evaluation.num_workers=0")
    job = open_job(config)
    rng = np.random.default_rng(0)
    plans = [
        Plan({u.name: TABLE_PRECISIONS[k] for u, k in zip(job.units, rng.integers(0, 5, len(job.units)), strict=True)})
        for _ in range(NUM_PLANS)
    ]
    workers = LocalWorkers(job.spec, job.adapter)
    together = evaluate(job, workers, plans)
    alone = [evaluate(job, workers, [plan]).metrics[0] for plan in plans]
    assert list(together.metrics) == alone, "sharing changed a metric"

    rounds = []
    for _ in range(REPEATS):
        rounds.append(
            {
                "together": seconds(lambda: evaluate(job, LocalWorkers(job.spec, job.adapter), plans)),
                "alone_warm": seconds(lambda: [evaluate(job, workers, [plan]) for plan in plans]),
                "alone": seconds(lambda: [evaluate(job, LocalWorkers(job.spec, job.adapter), [p]) for p in plans]),
                "dense": dense_seconds(job, plans),
            }
        )
        print({k: round(v, 2) for k, v in rounds[-1].items()}, flush=True)

    def ratio(top: str, bottom: str) -> float:
        return round(statistics.median(r[top] / r[bottom] for r in rounds), 3)

    spread = [round(f(r["alone"] / r["together"] for r in rounds), 3) for f in (min, max)]
    print(
        json.dumps(
            {
                "shared_speedup": ratio("alone", "together"),
                "shared_speedup_range": spread,
                "shared_speedup_warm": ratio("alone_warm", "together"),
                "over_floor": ratio("together", "dense"),
                "num_plans": NUM_PLANS,
                "num_examples": together.metrics[0].num_examples,
                "threads": 1,
                "repeats": REPEATS,
                "seconds": {k: round(statistics.median(r[k] for r in rounds), 2) for k in rounds[0]},
            }
        )
    )


if __name__ == "__main__":
    main()
