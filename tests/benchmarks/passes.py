"""The unit of work of the benchmarks: one fp32 pass over a window, read from Parquet, on one thread."""

import time
from collections.abc import Callable

import torch

from lowprec.models.adapter import inputs_of
from lowprec.search import SearchJob


def fp32_pass(job: SearchJob, window: str = "search") -> float:
    """Reads the window and runs the model on it, nothing else; returns the sum of logits, so that it was done."""
    total = 0.0
    with torch.inference_mode():
        for batch in job.window(window).batches():
            inputs = inputs_of(batch)
            total += float(job.adapter.model(inputs.dense, dict(inputs.sparse)).sum())
    return total


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this process: on a shared machine the clock on the wall also counts the others."""
    began = time.process_time()
    work()
    return time.process_time() - began
