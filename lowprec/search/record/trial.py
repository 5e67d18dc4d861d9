"""One evaluation of one plan in a search, and what makes one better than another."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowprec.evaluation.metrics import PlanMetrics
from lowprec.evaluation.rows import RowAccount
from lowprec.evaluation.stats.confidence import Interval
from lowprec.plan import Plan, Precision
from lowprec.session import Session

__all__ = ["Trial", "pareto_front", "plan_text", "trial_keys"]


@dataclass(frozen=True)
class Trial:
    """A plan, what it costs and how it did on a window.

    `key` names checkpoint, window and plan, so the same evaluation has the same key in every run. `kind` is where the
    plan came from. `cost` is what the search minimises, bytes or latency. `promised_pct` is the gap that the profile
    promised before anything was evaluated exactly, `expected_pct` the gap of later traffic that search expects (see
    `rule`), `risk_on_window` bounds of the risk on this very window (percent): None where nothing was raced.
    """

    key: str
    number: int
    wave: int
    kind: str
    plan: Plan
    size_bytes: int
    latency_ns: float | None
    cost: float
    promised_pct: float | None
    metrics: PlanMetrics
    risk_on_window: Interval | None
    rows: RowAccount
    expected_pct: float | None = None

    def to_row(self) -> dict[str, Any]:
        """The columns of the `trials` table that come from the trial itself."""
        flat = self.metrics.to_dict()
        risk = self.risk_on_window
        extra = {
            "rows": self.rows.to_dict(),
            "risk_on_window_pct": risk and [v if math.isfinite(v) else None for v in (risk.lower, risk.upper)],
            "expected_pct": self.expected_pct,
        }
        return {
            "trial_key": self.key,
            "number": self.number,
            "wave": self.wave,
            "kind": self.kind,
            "plan_json": plan_text(self.plan),
            "size_bytes": self.size_bytes,
            "latency_ns": self.latency_ns,
            "cost": float(self.cost),
            "promised_pct": self.promised_pct,
            "metrics_json": json.dumps({**flat, **extra}),
            **{k: flat[k] for k in _METRIC_COLUMNS},
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Trial:
        """The inverse of `to_row`."""
        flat = json.loads(row["metrics_json"])
        return cls(
            key=row["trial_key"],
            number=row["number"],
            wave=row["wave"],
            kind=row["kind"],
            plan=Plan({name: Precision(p) for name, p in json.loads(row["plan_json"]).items()}),
            size_bytes=row["size_bytes"],
            latency_ns=row["latency_ns"],
            cost=row["cost"],
            promised_pct=row["promised_pct"],
            metrics=PlanMetrics.from_dict(flat),
            risk_on_window=_interval(flat["risk_on_window_pct"]),
            rows=RowAccount.from_dict(flat["rows"]),
            expected_pct=flat["expected_pct"],
        )


def _interval(ends: Sequence[float | None] | None) -> Interval | None:
    if ends is None:
        return None
    lower, upper = ends
    return Interval(-math.inf if lower is None else lower, math.inf if upper is None else upper)


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
    "num_exact",
    "num_units",
    "looks",
    "confidence",
)


def plan_text(plan: Plan) -> str:
    """The precisions of a plan as they stand in the results."""
    return json.dumps({name: str(p) for name, p in plan.items()})


def trial_keys(session: Session, window: str) -> Callable[[Plan], str]:
    """What gives a plan, evaluated on the window of that name as the session says, its key: 16 hex digits."""
    begin = [session.checkpoint_sha256, session.evaluated_on(window, session.window(window))]

    def key(plan: Plan) -> str:
        text = json.dumps([*begin, [[n, str(p)] for n, p in plan.items()]], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    return key


def pareto_front(trials: Iterable[Trial]) -> list[Trial]:
    """The trials that no other one beats in both cost and gap, cheapest first; those without a finite gap left out."""
    front: list[Trial] = []
    known = [t for t in trials if math.isfinite(t.metrics.gap_pct)]
    for trial in sorted(known, key=lambda t: (t.cost, t.metrics.gap_pct, t.number)):
        if not front or trial.metrics.gap_pct < front[-1].metrics.gap_pct:
            front.append(trial)
    return front
