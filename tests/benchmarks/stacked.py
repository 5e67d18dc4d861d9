"""Dense passes of 16 candidates on small batches: one after the other, and as few passes as lowprec makes of them.

The demo model, one thread; pooled vectors are made before the clock starts, and stacking them is part of the stacked
side. Logits have the same bits, which is asserted before anything is timed. Prints one JSON object as its last line: by
rows of a batch, `speedup` (one by one / stacked, median of rounds in turn) and microseconds for a row, one by one.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import numpy as np
import torch
from demo_model import demo_config
from sizes import sized

from lowprec.evaluation.exact.dense import STACKED_ROWS, DensePasses
from lowprec.evaluation.exact.exact_evaluator import ExactEvaluator
from lowprec.evaluation.workers.worker import evaluator_of
from lowprec.models.adapter import ModelAdapter, ModelInputs, inputs_of
from lowprec.plan import TABLE_PRECISIONS
from lowprec.search import open_job

NUM_PLANS, REPEATS = sized((16, 41), (4, 1))
BATCHES = sized((32, 64, 128, 256, 512, 1024, 2048, 4096), (32, 64))


def main() -> None:
    torch.set_num_threads(1)
    job = open_job(demo_config("evaluation.num_workers=0"))
    evaluator, adapter = evaluator_of(job.spec, job.adapter), job.adapter
    whole = job.window("search").batch(0)
    found = {}
    for size in BATCHES:
        batch = whole.part(0, max(1, whole.num_rows // size))
        found[str(batch.num_rows)] = compared(adapter, evaluator, inputs_of(batch))
        print(batch.num_rows, found[str(batch.num_rows)], flush=True)
    print(json.dumps({"batches": found, "stacked_rows": STACKED_ROWS, "num_plans": NUM_PLANS, "repeats": REPEATS}))


def compared(adapter: ModelAdapter, evaluator: ExactEvaluator, inputs: ModelInputs) -> dict[str, Any]:
    """Both ways on one batch, in turn."""
    reference = adapter.reference(inputs)
    num_rows = len(reference.logits)
    pooled = evaluator.tables.pooled(reference.calls, [list(TABLE_PRECISIONS)] * len(reference.calls))
    outputs = [
        [p[TABLE_PRECISIONS[(k + plan) % len(TABLE_PRECISIONS)]] for k, p in enumerate(pooled)]
        for plan in range(NUM_PLANS)
    ]
    passes = DensePasses(adapter)

    def alone() -> np.ndarray:
        return np.stack([adapter.run_with_outputs(inputs, reference, of_plan).numpy() for of_plan in outputs])

    def stacked() -> np.ndarray:
        return passes.logits(inputs, reference, outputs)

    stacked()  # sees whether bits are the same, one by one
    assert set(passes._can_share.values()) <= {True}, "this machine's matrix products depend on the number of rows"
    assert np.array_equal(alone(), stacked())
    rounds = []
    for _ in range(REPEATS):
        times = []
        for work in (alone, stacked):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        rounds.append(times)
    ratios = [one / other for one, other in rounds]
    return {
        "speedup": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "microseconds_a_row": round(statistics.median(one for one, _ in rounds) / num_rows / NUM_PLANS * 1e6, 2),
    }


if __name__ == "__main__":
    main()
