"""What a search found, and the plan file that it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowprec.evaluation.confidence import Verdict
from lowprec.evaluation.evaluate import RowAccount
from lowprec.evaluation.metrics import PlanMetrics
from lowprec.plan import PlanFile
from lowprec.search.choice import Confirmed
from lowprec.search.job import Job
from lowprec.search.trial import Trial

__all__ = ["SearchOutcome", "plan_file"]


@dataclass(frozen=True)
class SearchOutcome:
    """What a search found: the recommended plan with its evidence, all finalists (safest first), and the front."""

    run_id: str
    best: Confirmed
    finalists: tuple[Confirmed, ...]
    budget_pct: float
    front: tuple[Trial, ...]
    num_trials: int
    fp32_bytes: int
    rows: dict[str, RowAccount]
    plan_path: Path
    windows: dict[str, str]
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """That of the recommended plan on the confirm window."""
        return self.best.verdict

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of the command."""
        trial = self.best.choice.trial
        return {
            "run_id": self.run_id,
            "verdict": self.verdict,
            "budget_pct": self.budget_pct,
            "meets_budget_in_search": self.best.choice.meets_budget,
            "because": self.best.choice.because,
            **self._plan(trial),
            "fp32_bytes": self.fp32_bytes,
            "plan_path": str(self.plan_path),
            "search": trial.metrics.to_dict(),
            "confirm": self.best.metrics.to_dict(),
            "finalists": [
                {**self._plan(f.choice.trial), "verdict": f.verdict, **f.metrics.to_dict()} for f in self.finalists
            ],
            "windows": self.windows,
            "num_trials": self.num_trials,
            "warnings": self.best.metrics.warnings(),
            "rows": {name: account.to_dict() for name, account in self.rows.items()},
            "front": [{**self._plan(t), **t.metrics.to_dict()} for t in self.front],
            "seconds": round(self.seconds, 1),
        }

    def _plan(self, trial: Trial) -> dict[str, Any]:
        return {
            "trial_key": trial.key,
            "plan": {name: str(p) for name, p in trial.plan.items()},
            "bytes": trial.size_bytes,
            "bytes_ratio": trial.size_bytes / self.fp32_bytes,
        }


def plan_file(
    job: Job, trial: Trial, metrics: PlanMetrics, *, run_id: str, kind: str, window: str, verdict: Verdict | None
) -> PlanFile:
    """The plan of a trial with its evidence: `kind` is `exact` for the best so far, `confirm` for the final one."""
    return PlanFile(
        plan=trial.plan,
        model=job.config.model.factory,
        checkpoint_sha256=job.checkpoint_sha256,
        size_bytes=trial.size_bytes,
        row_alignment=job.space.row_alignment,
        evidence={
            "run_id": run_id,
            "kind": kind,
            "verdict": verdict,
            "budget_pct": job.config.search.budget,
            "window": window,
            **metrics.to_dict(),
        },
    )
