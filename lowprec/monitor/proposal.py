"""Proposes a plan after a breach: the cheapest change of precisions that returns to the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lowprec.evaluation.profile.window_profile import measure_profile
from lowprec.evaluation.stats.bounds import normal_quantile
from lowprec.evaluation.workers.worker import Workers
from lowprec.plan import Forms, Plan, PlanFile, Precision
from lowprec.search.rule import Forecast
from lowprec.search.space.layer_forms import forms_beside
from lowprec.search.space.space import at_least_as_exact, build_space
from lowprec.search.surrogate.surrogate import build_surrogate
from lowprec.session import Session
from lowprec.storage import Location
from lowprec.traffic import TrafficWindow, Window
from lowprec.traffic.schema import TimeUnit
from lowprec.traffic.window import time_text

__all__ = ["Proposal", "propose", "verify_arguments"]


# What is aimed at, of the budget: a proposal that just meets it could hardly be certified.
AIM = 0.7


@dataclass(frozen=True)
class Proposal:
    """A plan that only makes units more exact, with what it costs and what the window's profile promises of it."""

    plan: Plan
    changes: dict[str, tuple[Precision, Precision]]
    size_bytes: int
    added_bytes: int
    promised_pct: float
    promised_now_pct: float
    forms: Forms
    row_alignment: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "changes": {unit: [str(before), str(after)] for unit, (before, after) in self.changes.items()},
            "bytes": self.size_bytes,
            "added_bytes": self.added_bytes,
            "promised_pct": self.promised_pct,
            "promised_now_pct": self.promised_now_pct,
            "kind": "proxy",
        }

    def file(self, deployed: PlanFile, checkpoint_sha256: str, window: str, budget_pct: float) -> PlanFile:
        """The plan file, for `lowprec verify`."""
        return replace(
            deployed,
            plan=self.plan,
            checkpoint_sha256=checkpoint_sha256,
            size_bytes=self.size_bytes,
            row_alignment=self.row_alignment,
            layer_forms={unit: self.forms[unit, p] for unit, p in self.plan.items() if (unit, p) in self.forms},
            evidence={"kind": "proxy", "window": window, "budget_pct": budget_pct, "promised_pct": self.promised_pct},
        )


def propose(
    session: Session,
    workers: Workers,
    window: TrafficWindow,
    plan: Plan,
    *,
    budget_pct: float,
    gap_pct: float,
    confidence: float,
    label_free: bool,
    on_progress: Callable[[int], None] | None = None,
) -> Proposal | None:
    """The proposal for a plan whose gap is `gap_pct` now, from a profile of the window; None where nothing helps.

    label_free: the gap is the label-free one.

    The profile promises less than is measured where labels say more than it keeps of them; a plan is taken to be as
    much worse than promised as the deployed one is.
    """
    prune = session.config.cost.calibration is None
    space = at_least_as_exact(build_space(session.units, session.config.space, prune=prune), plan)
    choices = [(unit, p) for decision in space.decisions for unit in decision.units for p in decision.choices]
    columns = tuple((u, p) for u, p in choices if p is not Precision.FP32)
    forms = forms_beside(session.forms)
    measured = measure_profile(
        workers,
        window,
        columns,
        forms=forms,
        by_group=session.config.traffic.group is not None,
        batches_per_task=session.config.evaluation.batches_per_task,
        max_bad_fraction=1.0,
        label_free=label_free,
        on_progress=on_progress,
    )
    costs = session.costs(measured.use, choices)
    # The plan will be judged on windows like this one.
    forecast = Forecast(normal_quantile(confidence), 1.0)
    surrogate = build_surrogate(measured, space, costs, budgets=[budget_pct], forecast=forecast)
    now = float(surrogate.promised_pct([plan])[0])
    worse = max(1.0, gap_pct / now) if now > 0 else 1.0
    point = surrogate.front.cheapest_within(AIM * budget_pct / worse)
    if point is None or point.plan == plan:
        return None
    size = space.size_bytes(point.plan)
    return Proposal(
        plan=point.plan,
        changes={u: (plan[u], p) for u, p in point.plan.items() if p is not plan[u]},
        size_bytes=size,
        added_bytes=size - space.size_bytes(plan),
        promised_pct=float(surrogate.promised_pct([point.plan])[0]) * worse,
        promised_now_pct=now * worse,
        forms=forms,
        row_alignment=session.storage.row_alignment,
    )


def verify_arguments(window: Window, unit: TimeUnit | None, path: Location, budget_pct: float) -> str:
    """What tries a proposed plan on the window of the breach: on the certified one the deployed plan would pass too."""
    start, end = (time_text(bound or 0, unit) for bound in (window.start, window.end))
    return f"--plan {path} --set 'windows.confirm={{start: {start}, end: {end}}}' --budget {budget_pct:g}"
