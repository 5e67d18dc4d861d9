"""Dense passes of 8 candidates on one batch: one after the other, and stacked into one batch of 8 times the rows.

The demo model, one thread; pooled vectors are made before the clock starts, and stacking them is part of the stacked
side. Prints one JSON object as its last line: for batches of several sizes `stacked_speedup` (one by one / stacked,
median of rounds in turn) and whether logits have the same bits.
"""

from __future__ import annotations

import json
import statistics
import time

import torch
from demo_model import demo_config

from lowprec.evaluation.exact import ExactEvaluator
from lowprec.evaluation.worker import evaluator_of
from lowprec.models.adapter import ModelAdapter, ModelInputs, inputs_of
from lowprec.plan import Precision
from lowprec.search import open_job

NUM_PLANS, REPEATS = 8, 25
BATCHES = (128, 256, 512, 1024, 2048, 4096)


def repeated(inputs: ModelInputs, times: int) -> ModelInputs:
    """The same rows again and again, as one batch."""
    sparse = {}
    for name, (ids, offsets, *_) in inputs.sparse.items():
        begins = [offsets[:-1] + k * len(ids) for k in range(times)]
        sparse[name] = (ids.repeat(times), torch.cat([*begins, torch.tensor([times * len(ids)])]))
    return ModelInputs(inputs.dense.repeat(times, 1), sparse)


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
    print(json.dumps({"batches": found, "num_plans": NUM_PLANS, "repeats": REPEATS}))


def compared(adapter: ModelAdapter, evaluator: ExactEvaluator, inputs: ModelInputs) -> dict:
    """Both ways on one batch, in turn."""
    reference = adapter.reference(inputs)
    pooled = evaluator.tables.pooled(reference.calls, [list(Precision)] * len(reference.calls))
    outputs = [
        [p[list(Precision)[(k + plan) % len(Precision)]] for k, p in enumerate(pooled)] for plan in range(NUM_PLANS)
    ]
    many = repeated(inputs, NUM_PLANS)

    def alone() -> torch.Tensor:
        return torch.stack([adapter.substituted(inputs, reference, of_plan) for of_plan in outputs])

    def stacked() -> torch.Tensor:
        together = [torch.cat(of_call) for of_call in zip(*outputs, strict=True)]
        return adapter.substituted(many, reference, together).reshape(NUM_PLANS, -1)

    first, second = alone(), stacked()
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    ratios = []
    for _ in range(REPEATS):
        times = []
        for work in (alone, stacked):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        ratios.append(times[0] / times[1])
    return {
        "stacked_speedup": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "equal_bits": bool(torch.equal(first, second)),
    }


if __name__ == "__main__":
    main()
