"""Plans evaluated over a window: work split into tasks, sums added in a fixed order, bad rows accounted for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowprec.evaluation.metrics import PlanMetrics, Sums
from lowprec.evaluation.worker import Task, Workers
from lowprec.plan import Plan
from lowprec.traffic import BadRow, TrafficWindow

__all__ = ["Evaluation", "evaluate_plans"]


@dataclass(frozen=True)
class Evaluation:
    """The metrics of every plan over the same examples, and what happened to the rows on the way."""

    plans: tuple[Plan, ...]
    metrics: tuple[PlanMetrics, ...]
    sums: Sums
    num_rows_read: int
    bad_rows: tuple[BadRow, ...]
    out_of_range: dict[str, int]


def evaluate_plans(
    workers: Workers,
    window: TrafficWindow,
    plans: Sequence[Plan],
    *,
    confidence: float,
    batches_per_task: int,
    batches: Sequence[int] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Evaluate `plans` on all batches of the window, or on those given.

    The split into tasks and the order of adding depend on the batches alone, so the result is the same to the bit for
    any number of workers. `on_progress` is told of every few batches done.
    """
    order = tuple(range(window.num_batches)) if batches is None else tuple(sorted(batches))
    pieces = [order[i : i + batches_per_task] for i in range(0, len(order), batches_per_task)]
    total: Sums | None = None
    num_rows_read = 0
    bad_rows: list[BadRow] = []
    out_of_range: dict[str, int] = {}
    tasks = [Task(tuple(plans), piece) for piece in pieces]
    for piece, chunk in zip(pieces, workers.run(window, tasks), strict=True):
        total = chunk.sums if total is None else total + chunk.sums
        num_rows_read += chunk.num_rows_read
        bad_rows.extend(chunk.bad_rows)
        for name, count in chunk.out_of_range.items():
            out_of_range[name] = out_of_range.get(name, 0) + count
        if on_progress:
            on_progress(len(piece))
    assert total is not None, "a window has at least one batch"
    metrics = tuple(total.metrics(k, confidence=confidence) for k in range(len(plans)))
    return Evaluation(tuple(plans), metrics, total, num_rows_read, tuple(bad_rows), out_of_range)
