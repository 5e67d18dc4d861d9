"""One plan, evaluated in full on one window, against its budget."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowprec.config import Config
from lowprec.evaluation.confidence import Verdict
from lowprec.evaluation.evaluate import RowAccount
from lowprec.evaluation.metrics import PlanMetrics
from lowprec.plan import Plan, read_plan
from lowprec.progress import Progress, Silent
from lowprec.search.job import open_job, open_workers
from lowprec.search.record import RunRecord
from lowprec.search.trial import Trial, plan_key

__all__ = ["Verification", "verify_plan"]


@dataclass(frozen=True)
class Verification:
    """How a plan did on a window."""

    run_id: str
    plan: Plan
    size_bytes: int
    fp32_bytes: int
    metrics: PlanMetrics
    budget_pct: float
    verdict: Verdict
    window: str
    rows: RowAccount
    notes: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of the command."""
        return {
            "run_id": self.run_id,
            "verdict": self.verdict,
            "budget_pct": self.budget_pct,
            "window": self.window,
            "plan": {name: str(p) for name, p in self.plan.items()},
            "bytes": self.size_bytes,
            "fp32_bytes": self.fp32_bytes,
            "bytes_ratio": self.size_bytes / self.fp32_bytes,
            **self.metrics.to_dict(),
            "warnings": [*self.metrics.warnings(), *self.notes],
            "rows": self.rows.to_dict(),
            "seconds": round(self.seconds, 1),
        }


def verify_plan(
    config: Config, plan_path: Path, *, window: str = "confirm", progress: Progress | None = None
) -> Verification:
    """Evaluate the plan of `plan_path` on the config's window of that name and keep the result.

    Raises `PlanError` where the plan does not fit the model or was made for another checkpoint.
    """
    began = time.monotonic()
    listener = progress or Silent()
    job = open_job(config)
    file = read_plan(plan_path, units=job.units, checkpoint_sha256=job.checkpoint_sha256)
    size_bytes = job.space.size_bytes(file.plan)
    notes: tuple[str, ...] = ()
    if file.row_alignment != job.space.row_alignment:
        notes = (
            f"the plan was made for row alignment {file.row_alignment}, the config has {job.space.row_alignment}: "
            "bytes are those of the config",
        )
    traffic_window = job.window(window)
    record = RunRecord(job, None, command="verify")
    record.state("running")
    listener.stage("verify", traffic_window.num_batches)
    try:
        with open_workers(job) as workers:
            evaluation = job.evaluate(
                workers,
                window,
                traffic_window,
                [file.plan],
                quarantine=record.artifacts / "quarantine",
                on_progress=listener.advance,
            )
    except Exception as error:
        record.state("failed", message=str(error))
        raise
    metrics = evaluation.metrics[0]
    verdict = metrics.verdict(config.search.budget)
    key = plan_key(job.checkpoint_sha256, job.evaluated_on(window, traffic_window), file.plan)
    record.add_trials(
        [Trial(key, 0, 0, "verify", file.plan, size_bytes, metrics, evaluation.rows)],
        evaluation="verify",
        window=job.window_text(window),
    )
    outcome = Verification(
        run_id=record.run_id,
        plan=file.plan,
        size_bytes=size_bytes,
        fp32_bytes=job.space.fp32_bytes,
        metrics=metrics,
        budget_pct=config.search.budget,
        verdict=verdict,
        window=job.window_text(window),
        rows=evaluation.rows,
        notes=notes,
        seconds=time.monotonic() - began,
    )
    record.state("done", verdict=verdict, recommended_trial_key=key, message=f"plan {plan_path} on {outcome.window}")
    return outcome
