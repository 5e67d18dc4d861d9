"""Plans evaluated over a window: work split into tasks, sums added in a fixed order, bad rows accounted for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowprec.evaluation.metrics import Looks, PlanMetrics, Sums
from lowprec.evaluation.rows import RowAccount, RowCounter, TableUse
from lowprec.evaluation.workers.worker import ExactTask, Workers
from lowprec.plan import Forms, Plan, Precision
from lowprec.traffic import BadRow, TrafficWindow

__all__ = ["Evaluation", "evaluate_plans", "pieces_of"]

# Time blocks over which sums are compared, and of a profile; a window of fewer batches leaves some of them empty.
NUM_BLOCKS = 20


@dataclass(frozen=True)
class Evaluation:
    """The metrics of every plan over the same examples, and what happened to the rows on the way.

    `use` says how the window uses each table. `is_complete` is False where the evaluation was given up for its bad
    rows; metrics are then of a part of the window.
    """

    plans: tuple[Plan, ...]
    metrics: tuple[PlanMetrics, ...]
    sums: Sums
    rows: RowAccount
    bad_rows: tuple[BadRow, ...]
    use: Mapping[str, TableUse]
    is_complete: bool = True


def evaluate_plans(
    workers: Workers,
    window: TrafficWindow,
    plans: Sequence[Plan],
    *,
    forms: Forms | None = None,
    confidence: float,
    batches_per_task: int,
    batches: Sequence[int] | None = None,
    max_bad_fraction: float = 0.0,
    looks: Looks = "once",
    tuned_for: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Evaluate `plans` on all batches of the window, or on those given.

    The split into tasks and the order of adding depend on the batches alone, so the result is the same to the bit for
    any number of workers. `forms` are those of layers; `looks` and `tuned_for` are those of `Sums.metrics`.
    `on_progress` is called with the number of batches done, every few batches. Too many bad rows only end the
    evaluation here; the caller decides what to do about them.
    """
    pieces = pieces_of(window, batches, batches_per_task)
    counter = RowCounter(window, max_bad_fraction)
    total: Sums | None = None
    blocks = np.zeros((NUM_BLOCKS, 2 * len(plans) + 2))
    is_complete = True
    tasks = [ExactTask(tuple(plans), piece, forms=forms or {}) for piece in pieces]
    for piece, chunk in zip(pieces, workers.run(window, tasks), strict=True):
        total = chunk.sums if total is None else total + chunk.sums
        # The blocks of a profile: equal stretches of the window.
        blocks[piece[0] * NUM_BLOCKS // window.num_batches] += chunk.sums.totals()
        counter.add(chunk)
        if on_progress:
            on_progress(len(piece))
        if counter.is_hopeless:
            is_complete = False
            break
    counter.check_outputs()
    assert total is not None, "a window has at least one batch"
    metrics = tuple(
        total.metrics(
            k,
            confidence=confidence,
            is_reference=set(plan.values()) == {Precision.FP32},
            blocks=blocks,
            looks=looks,
            tuned_for=tuned_for,
        )
        for k, plan in enumerate(plans)
    )
    rows = counter.account(total.num_unlabelled)
    return Evaluation(tuple(plans), metrics, total, rows, tuple(counter.bad_rows), counter.use(), is_complete)


def pieces_of(window: TrafficWindow, batches: Sequence[int] | None, batches_per_task: int) -> list[tuple[int, ...]]:
    """The batches of the window, or those given, in rising order and cut into tasks."""
    order = tuple(range(window.num_batches)) if batches is None else tuple(sorted(batches))
    return [order[i : i + batches_per_task] for i in range(0, len(order), batches_per_task)]
