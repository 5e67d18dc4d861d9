"""One worker through Ray against the same work in process, on a window of about 200,000 examples of the demo traffic.

Both are warm: model loaded, rows quantized, Ray started; what remains is what every wave pays. Prints one JSON object
as its last line: `ray_overhead` (Ray / in process, median of pairs), and the seconds that starting Ray took.
"""

import json
import statistics
import time
from typing import Any

from demo_model import demo_config
from sizes import sized

from lowprec.evaluation.evaluate import evaluate_plans
from lowprec.evaluation.workers.ray import RayWorkers
from lowprec.evaluation.workers.worker import LocalWorkers, Workers
from lowprec.plan import TABLE_PRECISIONS, Plan
from lowprec.search import open_job

REPEATS = sized(5, 1)


def main() -> None:
    # The train window is the one of 200,000 examples; nothing here depends on which it is.
    config = demo_config("windows.search={end: 2026-01-06}", "windows.train=null", "windows.validation=null")
    job = open_job(config)
    plans = [Plan.uniform(job.units, p) for p in TABLE_PRECISIONS]
    window = job.window("search")

    def evaluate(workers: Workers) -> Any:
        began = time.perf_counter()
        result = evaluate_plans(workers, window, plans, confidence=0.95, batches_per_task=4)
        return time.perf_counter() - began, result.metrics

    local = LocalWorkers(job.spec, job.adapter)
    began = time.perf_counter()
    remote = RayWorkers(job.spec, num_workers=1, address=None)
    try:
        remote.process_ids()
        start_s = time.perf_counter() - began
        assert evaluate(local)[1] == evaluate(remote)[1], "Ray changed a metric"
        pairs = []
        for _ in range(REPEATS):
            pairs.append((evaluate(remote)[0], evaluate(local)[0]))
            print([round(s, 2) for s in pairs[-1]], flush=True)
    finally:
        remote.close()
    ratios = [r / p for r, p in pairs]
    print(
        json.dumps(
            {
                "ray_overhead": round(statistics.median(ratios), 3),
                "range": [round(min(ratios), 3), round(max(ratios), 3)],
                "num_examples": window.num_rows,
                "num_plans": len(plans),
                "seconds_in_process": round(statistics.median(p for _, p in pairs), 2),
                "seconds_to_start_ray": round(start_s, 2),
                "repeats": REPEATS,
            }
        )
    )


if __name__ == "__main__":
    main()
