"""One plan, evaluated in full on one window, against its budget."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowprec.config import Config
from lowprec.errors import ConfigError
from lowprec.evaluation.confidence import Interval, Verdict
from lowprec.evaluation.metrics import PlanMetrics
from lowprec.evaluation.rows import RowAccount
from lowprec.plan import Plan, PlanFile, read_plan, rowwise_ranges
from lowprec.progress import Progress, Silent
from lowprec.search.job import open_job, open_workers
from lowprec.search.record import RunRecord
from lowprec.search.trial import Trial, plan_key
from lowprec.storage import Where

__all__ = ["Verification", "verify_plan"]


@dataclass(frozen=True)
class Verification:
    """How a plan did on a window."""

    run_id: str
    plan: Plan
    row_ranges: Mapping[str, str]
    size_bytes: int
    latency_ns: float | None
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
            "row_ranges": dict(self.row_ranges),
            "bytes": self.size_bytes,
            "latency_ns": self.latency_ns,
            "fp32_bytes": self.fp32_bytes,
            "bytes_ratio": self.size_bytes / self.fp32_bytes,
            **self.metrics.to_dict(),
            "warnings": [*self.metrics.warnings(), *self.notes],
            "rows": self.rows.to_dict(),
            "seconds": round(self.seconds, 1),
        }


def verify_plan(
    config: Config,
    plan_path: Where,
    *,
    window: str = "confirm",
    budget_pct: float | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Evaluate the plan of `plan_path` on the config's window of that name and keep the result.

    Its budget is `budget_pct`, else the config's, else, where that has several, the one that the plan was made for.
    Raises `PlanError` where the plan does not fit the model or was made for another checkpoint.
    """
    began = time.monotonic()
    listener = progress or Silent()
    job = open_job(config)
    file = read_plan(plan_path, units=job.units, checkpoint_sha256=job.checkpoint_sha256)
    job = job.as_planned(file)
    budget = _budget(config, file, budget_pct)
    size_bytes = job.space.size_bytes(file.plan)
    ranges = rowwise_ranges(file.plan, file.row_ranges)
    notes = []
    if file.row_alignment != job.space.row_alignment:
        notes.append(
            f"the plan was made for row alignment {file.row_alignment}, the config has {job.space.row_alignment}: "
            "bytes are those of the config"
        )
    if set(ranges.values()) - {config.space.row_range}:
        notes.append(
            f"the plan's row ranges are {' and '.join(sorted(set(ranges.values())))}, the config's space.row_range is "
            f"{config.space.row_range}: the plan was evaluated with its own"
        )
    traffic_window = job.window(window)
    job.costs({})  # what is wrong with them must cost no pass
    record = RunRecord(job, None, command="verify")
    with record.running(listener.note):
        listener.stage("verify", traffic_window.num_batches)
        with open_workers(job, listener.note) as workers:
            evaluation = job.evaluate(
                workers,
                window,
                traffic_window,
                [file.plan],
                quarantine=record.artifacts / "quarantine",
                on_progress=listener.advance,
            )
            wrong_rows = job.rows_without_form(workers, file.plan)
        metrics = evaluation.metrics[0]
        verdict = metrics.verdict(budget)
        costs = job.costs(evaluation.use)
        trial = Trial(
            key=plan_key(job.checkpoint_sha256, job.evaluated_on(window, traffic_window), file.plan),
            number=0,
            wave=0,
            kind="verify",
            plan=file.plan,
            size_bytes=size_bytes,
            latency_ns=costs.plan_latency_ns(file.plan),
            cost=costs.cost(file.plan),
            promised_pct=None,
            metrics=metrics,
            on_window=Interval(metrics.gap_pct, metrics.gap_pct),
            rows=evaluation.rows,
        )
        record.add_trials([trial], evaluation="verify", window=job.window_text(window))
        outcome = Verification(
            run_id=record.run_id,
            plan=file.plan,
            row_ranges=ranges,
            size_bytes=size_bytes,
            latency_ns=trial.latency_ns,
            fp32_bytes=job.space.fp32_bytes,
            metrics=metrics,
            budget_pct=budget,
            verdict=verdict,
            window=job.window_text(window),
            rows=evaluation.rows,
            notes=(*notes, *costs.notes, *wrong_rows),
            seconds=time.monotonic() - began,
        )
        record.state(
            "done", verdict=verdict, recommended_trial_key=trial.key, message=f"plan {plan_path} on {outcome.window}"
        )
    return outcome


def _budget(config: Config, file: PlanFile, given: float | None) -> float:
    budgets = config.search.all_budgets
    if given is not None:
        return given
    made_for: Any = file.evidence.get("budget_pct")
    if len(budgets) == 1:
        return budgets[0]
    if made_for in budgets:
        return float(made_for)
    raise ConfigError(
        f"search.budgets: has {', '.join(f'{b:g}' for b in budgets)}, and the plan was made for {made_for}; "
        "say which budget to verify against with --budget"
    )
