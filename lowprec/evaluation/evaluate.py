"""Plans evaluated over a window: work split into tasks, sums added in a fixed order, bad rows accounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowprec.evaluation.metrics import PlanMetrics, Sums
from lowprec.evaluation.worker import Task, Workers
from lowprec.plan import Plan, Precision
from lowprec.traffic import BadRow, TrafficWindow

__all__ = ["Evaluation", "RowAccount", "evaluate_plans"]

# Bad rows are kept in memory until they are written; a window that is nearly all bad is given up after so many.
MAX_BAD_ROWS_HELD = 100_000


@dataclass(frozen=True)
class RowAccount:
    """Where the rows of a window went: `num_read` is bad, unlabelled and used ones together.

    `out_of_range` counts ids that `bounds_check` dropped or replaced, by feature. `never_looked_up` names the tables of
    which the window used no row: it says nothing about their precision.
    """

    num_read: int
    num_bad: int
    num_unlabelled: int
    out_of_range: Mapping[str, int]
    never_looked_up: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            **vars(self),
            "out_of_range": dict(self.out_of_range),
            "never_looked_up": list(self.never_looked_up),
        }

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any]) -> RowAccount:
        """The inverse of `to_dict`."""
        return cls(**{**flat, "never_looked_up": tuple(flat["never_looked_up"])})


@dataclass(frozen=True)
class Evaluation:
    """The metrics of every plan over the same examples, and what happened to the rows on the way.

    `is_complete` is False where the evaluation was given up for its bad rows; metrics are then of a part of the window.
    """

    plans: tuple[Plan, ...]
    metrics: tuple[PlanMetrics, ...]
    sums: Sums
    rows: RowAccount
    bad_rows: tuple[BadRow, ...]
    is_complete: bool = True


def evaluate_plans(
    workers: Workers,
    window: TrafficWindow,
    plans: Sequence[Plan],
    *,
    confidence: float,
    batches_per_task: int,
    batches: Sequence[int] | None = None,
    max_bad_fraction: float = 0.0,
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Evaluate `plans` on all batches of the window, or on those given.

    The split into tasks and the order of adding depend on the batches alone, so the result is the same to the bit for
    any number of workers. `on_progress` is told of every few batches done. What to do about bad rows is the caller's;
    here they only end an evaluation that is bound to fail for them.
    """
    order = tuple(range(window.num_batches)) if batches is None else tuple(sorted(batches))
    pieces = [order[i : i + batches_per_task] for i in range(0, len(order), batches_per_task)]
    total: Sums | None = None
    num_read = num_bad = 0
    bad_rows: list[BadRow] = []
    out_of_range: Counter[str] = Counter()
    lookups: Counter[str] = Counter()
    tasks = [Task(tuple(plans), piece) for piece in pieces]
    is_complete = True
    for piece, chunk in zip(pieces, workers.run(window, tasks), strict=True):
        total = chunk.sums if total is None else total + chunk.sums
        num_read += chunk.num_rows_read
        num_bad += len(chunk.bad_rows)
        bad_rows.extend(chunk.bad_rows)
        out_of_range.update(chunk.out_of_range)
        lookups.update(chunk.lookups)
        if on_progress:
            on_progress(len(piece))
        if num_bad > max(MAX_BAD_ROWS_HELD, max_bad_fraction * window.num_rows):
            is_complete = False
            break
    assert total is not None, "a window has at least one batch"
    metrics = tuple(
        total.metrics(k, confidence=confidence, is_reference=set(plan.values()) == {Precision.FP32})
        for k, plan in enumerate(plans)
    )
    never = tuple(name for name, count in lookups.items() if count == 0)
    rows = RowAccount(num_read, num_bad, total.num_unlabelled, dict(out_of_range), never)
    return Evaluation(tuple(plans), metrics, total, rows, tuple(bad_rows), is_complete)
