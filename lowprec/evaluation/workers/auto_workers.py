"""`evaluation.num_workers: auto`: in this process, or Ray workers. Results do not depend on it, only time does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lowprec.config.sections import EvaluationConfig
from lowprec.evaluation.workers.worker import WorkerSpec, evaluator_of
from lowprec.models.adapter import ModelAdapter
from lowprec.traffic import TrafficWindow

__all__ = [
    "MONITOR_PASSES",
    "SEARCH_PASSES",
    "VERIFY_PASSES",
    "Work",
    "WorkersChoice",
    "choose_workers",
    "is_ray_job",
    "work_seconds",
]

# Until Ray and its workers are ready: 2.6 s and 4 s on 2 idle cores, 16 s on busy ones.
RAY_START_S = 10.0
# Ray workers must save at least a quarter of the time: both estimates are rough, and a busy machine starts Ray slowly.
MAX_SHARE = 0.75
# More workers of one machine mostly wait for its memory.
MAX_WORKERS = 8
# What a command does with each batch of its windows, in times of reading it and one pass of the model. A search of the
# demo (26 tables, 2 cores) took 5.75 of its two windows.
SEARCH_PASSES, VERIFY_PASSES, MONITOR_PASSES = 6.0, 3.0, 6.0


@dataclass(frozen=True)
class Work:
    """What is to be done: so many passes over batches such as those of a window."""

    window: TrafficWindow
    num_passes: float


@dataclass(frozen=True)
class WorkersChoice:
    """How many Ray workers (0: this process evaluates), and why."""

    num_workers: int
    because: str

    def __str__(self) -> str:
        where = f"{self.num_workers} Ray workers" if self.num_workers else "in this process"
        return f"workers: {where}, because {self.because}"


def choose_workers(
    settings: EvaluationConfig,
    *,
    has_rows: bool,
    seconds: Callable[[], float],
    num_cpus: int | None = None,
) -> WorkersChoice:
    """The workers of a command; `seconds` estimates how long its work takes in this process, if that is needed.

    has_rows: whether this process has the tables. num_cpus: of this machine, by default those that it may use.
    """
    if settings.num_workers != "auto":
        return WorkersChoice(settings.num_workers, "evaluation.num_workers says so")
    if settings.worker_memory is not None:
        return WorkersChoice(settings.num_worker_machines, "evaluation.worker_memory shares tables among workers")
    if settings.address is not None:
        return WorkersChoice(settings.num_worker_machines, "evaluation.address names a cluster")
    if is_ray_job():
        return WorkersChoice(settings.num_worker_machines, "this is a job of a Ray cluster")
    if not has_rows:
        because = "the tables are too large to be read into the memory of this process as well"
        return WorkersChoice(settings.num_worker_machines, because)
    cpus = _num_cpus() if num_cpus is None else num_cpus
    num_workers = min(cpus // settings.threads_per_worker, MAX_WORKERS)
    if num_workers < 2:
        return WorkersChoice(0, f"{cpus} CPUs have no room for two workers of {settings.threads_per_worker}")
    here = seconds()
    there = RAY_START_S + here / num_workers
    times = f"the work takes about {_text(here)} there, and {_text(there)} with {num_workers} Ray workers"
    if there >= MAX_SHARE * here:
        return WorkersChoice(0, times)
    times = f"the work takes about {_text(there)}, and {_text(here)} in this process"
    return WorkersChoice(num_workers, times)


def work_seconds(spec: WorkerSpec, adapter: ModelAdapter, work: Work) -> float:
    """How long work takes in this process, by the time of its first batch."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(spec.threads)
    try:
        began = time.perf_counter()
        batch = work.window.batch(0)
        read_s = time.perf_counter() - began
        evaluator = evaluator_of(spec, adapter)
        evaluator.logits(batch, [])  # the first pass also checks the model
        began = time.perf_counter()
        evaluator.logits(batch, [])
        return work.num_passes * (read_s + time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads_before)


def is_ray_job() -> bool:
    """Whether this process belongs to a Ray job, which runs on the job's cluster."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _text(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
