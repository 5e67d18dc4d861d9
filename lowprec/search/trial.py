"""One exact evaluation of one plan in a search, and what makes one better than another."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lowprec.evaluation.evaluate import RowAccount
from lowprec.evaluation.metrics import PlanMetrics
from lowprec.plan import Plan, Precision

__all__ = ["Trial", "pareto_front", "plan_key"]


@dataclass(frozen=True)
class Trial:
    """A plan, what it costs and how it did on the search window.

    `key` names checkpoint, window and plan, so the same evaluation has the same key in every run.
    """

    key: str
    number: int
    wave: int
    kind: str
    plan: Plan
    size_bytes: int
    metrics: PlanMetrics
    rows: RowAccount

    def to_row(self) -> dict[str, Any]:
        """The columns of the `trials` table that come from the trial itself."""
        flat = self.metrics.to_dict()
        return {
            "trial_key": self.key,
            "number": self.number,
            "wave": self.wave,
            "kind": self.kind,
            "plan_json": json.dumps({name: str(p) for name, p in self.plan.items()}),
            "size_bytes": self.size_bytes,
            "metrics_json": json.dumps({**flat, "rows": self.rows.to_dict()}),
            **{k: flat[k] for k in _METRIC_COLUMNS},
        }

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Trial:
        """The inverse of `to_row`."""
        plan = Plan({name: Precision(p) for name, p in json.loads(row["plan_json"]).items()})
        flat = json.loads(row["metrics_json"])
        metrics, rows = PlanMetrics.from_dict(flat), RowAccount.from_dict(flat["rows"])
        return cls(row["trial_key"], row["number"], row["wave"], row["kind"], plan, row["size_bytes"], metrics, rows)


_METRIC_COLUMNS = (
    "gap_pct",
    "gap_lower_pct",
    "gap_upper_pct",
    "kl_pct",
    "kl_lower_pct",
    "kl_upper_pct",
    "ne_ref",
    "ne_plan",
    "auc_ref",
    "auc_plan",
    "auc_error",
    "calibration_ref",
    "calibration_plan",
    "num_examples",
    "num_units",
)


def plan_key(checkpoint_sha256: str, evaluated_on: Sequence[object], plan: Plan) -> str:
    """16 hex digits for a plan of a checkpoint evaluated on a window in a given way."""
    text = json.dumps([checkpoint_sha256, list(evaluated_on), [[n, str(p)] for n, p in plan.items()]], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def pareto_front(trials: Iterable[Trial]) -> list[Trial]:
    """The trials that no other one beats in both bytes and gap, cheapest first; those without a finite gap left out."""
    front: list[Trial] = []
    known = [t for t in trials if math.isfinite(t.metrics.gap_pct)]
    for trial in sorted(known, key=lambda t: (t.size_bytes, t.metrics.gap_pct, t.number)):
        if not front or trial.metrics.gap_pct < front[-1].metrics.gap_pct:
            front.append(trial)
    return front
