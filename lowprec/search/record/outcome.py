"""What a search found, and the plan files that it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowprec.core.sizes import bytes_text
from lowprec.evaluation.metrics import PlanMetrics
from lowprec.evaluation.power import certifiable_pct
from lowprec.evaluation.rows import RowAccount
from lowprec.evaluation.shortfall import shortfall
from lowprec.evaluation.stats.confidence import Verdict
from lowprec.models.uncovered import Uncovered
from lowprec.plan import PlanFile, RowRange, rowwise_ranges
from lowprec.search.confirm.choice import Confirmed
from lowprec.search.confirm.confirm import Recommendation
from lowprec.search.record.trial import Trial
from lowprec.session import Session
from lowprec.storage import Location

__all__ = ["SearchOutcome", "plan_file"]


@dataclass(frozen=True)
class SearchOutcome:
    """What a search found: a recommended plan for each budget (tightest first) with its evidence, and the front.

    `plan_paths` has a file for each recommendation; `profile_path` is the profile of the search window, `profiled` says
    what it found of the reference. `notes` are warnings that are not about a metric. confirm_days: the length of the
    confirm window. by_group: whether groups are the units of evidence. num_spent: how often other runs had confirmed on
    an overlapping window of this checkpoint. uncovered: parameters
    that belong to no unit.
    """

    run_id: str
    recommendations: tuple[Recommendation, ...]
    front: tuple[Trial, ...]
    num_trials: int
    fp32_bytes: int
    rows: Mapping[str, RowAccount]
    plan_paths: tuple[Location, ...]
    profile_path: Location
    profiled: Mapping[str, Any]
    windows: Mapping[str, str]
    row_ranges: Mapping[str, RowRange]
    notes: tuple[str, ...]
    seconds: float
    confirm_days: float | None = None
    by_group: bool = False
    num_spent: int = 0
    uncovered: tuple[Uncovered, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """That of the recommended plans on the confirm window: certified where all are, rejected where one is."""
        verdicts = [r.verdict for r in self.recommendations]
        if "rejected" in verdicts:
            return "rejected"
        return "certified" if set(verdicts) == {"certified"} else "inconclusive"

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of the command; what stands at its top is about the tightest budget."""
        documents = [
            self._recommendation(r, path) for r, path in zip(self.recommendations, self.plan_paths, strict=True)
        ]
        return {
            "run_id": self.run_id,
            **documents[0],
            "verdict": self.verdict,
            "recommendations": documents,
            "fp32_bytes": self.fp32_bytes,
            "profile_path": str(self.profile_path),
            "profile": dict(self.profiled),
            "windows": dict(self.windows),
            "num_trials": self.num_trials,
            "confirm_window_uses": self.num_spent,
            "warnings": list(
                dict.fromkeys((*(w for r in self.recommendations for w in r.best.metrics.warnings()), *self.notes))
            ),
            "fp32_parameters": [parameter.to_dict() for parameter in self.uncovered],
            "rows": {name: account.to_dict() for name, account in self.rows.items()},
            "front": [{**self._plan(t), **t.metrics.to_dict()} for t in self.front],
            "seconds": round(self.seconds, 1),
        }

    def _recommendation(self, recommendation: Recommendation, path: Location) -> dict[str, Any]:
        best = recommendation.best
        return {
            "budget_pct": recommendation.budget_pct,
            "verdict": recommendation.verdict,
            "saves": recommendation.saves,
            "certifiable_budget_pct": certifiable_pct(best.metrics),
            "probability": best.choice.probability,
            "missing_evidence": self._shortfall(recommendation),
            "meets_budget_in_search": best.choice.meets_budget,
            "because": best.choice.because,
            **self._plan(best.choice.trial),
            "row_ranges": rowwise_ranges(best.choice.trial.plan, self.row_ranges),
            "plan_path": str(path),
            "search": best.choice.trial.metrics.to_dict(),
            "confirm": best.metrics.to_dict(),
            "finalists": [self._finalist(confirmed) for confirmed in recommendation.tried],
        }

    def _shortfall(self, recommendation: Recommendation) -> dict[str, Any] | None:
        """What an inconclusive verdict lacks; where the plan saves nothing, that of the cheapest plan tried."""
        lacking = [recommendation.best] if recommendation.saves else recommendation.tried
        lacking = [confirmed for confirmed in lacking if confirmed.verdict == "inconclusive"]
        if not lacking:
            return None
        cheapest = min(lacking, key=lambda confirmed: confirmed.choice.trial.cost)
        found = shortfall(
            cheapest.metrics,
            recommendation.budget_pct,
            cheapest.verdict,
            days=self.confirm_days,
            by_group=self.by_group,
        )
        if found is None:
            return None
        trial = cheapest.choice.trial
        whose = "" if recommendation.saves else f" (for the plan of {bytes_text(trial.size_bytes)})"
        text = found.sentence() + whose
        return {**found.to_dict(), "trial_key": trial.key, "text": text}

    def _finalist(self, confirmed: Confirmed) -> dict[str, Any]:
        return {
            **self._plan(confirmed.choice.trial),
            "try": confirmed.attempt + 1,
            "verdict": confirmed.verdict,
            "probability": confirmed.choice.probability,
            "certifiable_budget_pct": certifiable_pct(confirmed.metrics),
            **confirmed.metrics.to_dict(),
        }

    def _plan(self, trial: Trial) -> dict[str, Any]:
        return {
            "trial_key": trial.key,
            "plan": {name: str(p) for name, p in trial.plan.items()},
            "bytes": trial.size_bytes,
            "bytes_ratio": trial.size_bytes / self.fp32_bytes,
            "latency_ns": trial.latency_ns,
            "promised_pct": trial.promised_pct,
        }


def plan_file(
    session: Session,
    trial: Trial,
    metrics: PlanMetrics,
    *,
    run_id: str,
    kind: str,
    window: str,
    budget_pct: float,
    verdict: Verdict | None,
) -> PlanFile:
    """The plan of a trial with its evidence: `kind` is `exact` for the best so far, `confirm` for the final one."""
    return PlanFile(
        plan=trial.plan,
        model=session.config.model.factory,
        checkpoint_sha256=session.checkpoint_sha256,
        size_bytes=trial.size_bytes,
        row_alignment=session.storage.row_alignment,
        row_ranges=session.spec.row_ranges,
        layer_forms={unit: session.forms[unit, p] for unit, p in trial.plan.items() if (unit, p) in session.forms},
        evidence={
            "run_id": run_id,
            "kind": kind,
            "verdict": verdict,
            "budget_pct": budget_pct,
            "promised_pct": trial.promised_pct,
            "window": window,
            **metrics.to_dict(),
        },
    )
