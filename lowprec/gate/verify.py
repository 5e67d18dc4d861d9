"""One plan, evaluated in full on one window, against its budget."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from lowprec.config import Config
from lowprec.core.errors import ConfigError
from lowprec.core.progress import Progress, Silent
from lowprec.evaluation.metrics import PlanMetrics
from lowprec.evaluation.power import certifiable_pct
from lowprec.evaluation.rows import RowAccount
from lowprec.evaluation.shortfall import Shortfall, shortfall
from lowprec.evaluation.stats.confidence import Verdict
from lowprec.evaluation.workers.auto_workers import VERIFY_PASSES, Work
from lowprec.evaluation.workers.worker import Workers
from lowprec.gate.floors import Floor, Gate, gated
from lowprec.plan import Plan, PlanFile, rowwise_ranges, write_plan
from lowprec.plan.layer_form import LayerForm
from lowprec.search.confirm.alpha_spending import Spending, spending
from lowprec.search.job import job_of
from lowprec.search.record.outcome import SearchOutcome, plan_file
from lowprec.search.record.record import RunRecord
from lowprec.search.record.trial import Trial, trial_keys
from lowprec.search.search_run import run_search
from lowprec.search.space.hand_plan import HandPlan, make_plan
from lowprec.search.space.layer_forms import recalibrated
from lowprec.session import Session, open_session, open_workers
from lowprec.session.planned import read_planned
from lowprec.storage import AnyPath, Location

__all__ = ["Snapshot", "Verification", "verify_plan"]


@dataclass(frozen=True)
class Snapshot:
    """A plan on another snapshot than the one that it was made for.

    plan_path: the plan for this snapshot, with its evidence, where it is certified: ranges of rows follow from its
    rows, and calibrated inputs of layers have been calibrated again.
    """

    checkpoint: str
    checkpoint_sha256: str
    made_for_sha256: str
    plan_path: Location | None

    def to_dict(self) -> dict[str, Any]:
        """For documents."""
        return {**vars(self), "plan_path": str(self.plan_path) if self.plan_path else None}


@dataclass(frozen=True)
class Verification:
    """How a plan did on a window.

    missing: what an inconclusive verdict lacks. spending: how the look was judged. verdict: with the floors of the
    launch gate. budget_verdict: of the gap alone. repair_floors: of the plans that a repair found.
    """

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
    spending: Spending
    missing: Shortfall | None = None
    snapshot: Snapshot | None = None
    repair: SearchOutcome | None = None
    floors: tuple[Floor, ...] = ()
    repair_floors: tuple[Floor, ...] = ()

    @property
    def budget_verdict(self) -> Verdict:
        """Of the gap against the budget, whatever the floors say."""
        return self.metrics.verdict(self.budget_pct)

    @property
    def final_verdict(self) -> Verdict:
        """Of the plan, or of what was found in its place."""
        return self.verdict if self.repair is None else gated(self.repair.verdict, self.repair_floors)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of the command."""
        return {
            "run_id": self.run_id,
            "verdict": self.verdict,
            "budget_pct": self.budget_pct,
            "budget_verdict": self.budget_verdict,
            "floors": [floor.to_dict() for floor in self.floors],
            "certifiable_budget_pct": certifiable_pct(self.metrics),
            "earlier_looks": self.spending.num_earlier,
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
            "snapshot": self.snapshot.to_dict() if self.snapshot else None,
            "repair": self.repair.to_dict() if self.repair else None,
            "missing_evidence": None
            if self.missing is None
            else {**self.missing.to_dict(), "text": self.missing.sentence()},
            "repair_floors": [floor.to_dict() for floor in self.repair_floors],
            "final_verdict": self.final_verdict,
            "seconds": round(self.seconds, 1),
        }


def verify_plan(
    config: Config,
    plan: AnyPath | HandPlan,
    *,
    window: str = "confirm",
    budget_pct: float | None = None,
    snapshot: str | None = None,
    repair: bool = False,
    sequential: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Evaluate a plan on the config's window of that name and keep the result.

    plan: the path or URL of a plan file, or a plan by hand, which is made for the config's checkpoint.

    Its budget is `budget_pct`, else what the config says, else the one that the plan was made for, else the default.
    Where the config says several it is the one of them that the plan was made for. sequential: judge by a confidence
    sequence, which may be looked at again and again while the window grows; otherwise each further look at the plan on
    an overlapping window is held to a stricter confidence (see `looks`).
    snapshot: a checkpoint of the same model to judge the plan on instead of the config's, the launch gate: the plan may
    have been made for another one, and where it is certified a plan for this one is written. repair: where it is not,
    search from there, with that budget, else the config's, unless its fp32 model breaks a floor too.
    The floors of the config's section `gate` are judged on the same window; a broken one rejects the plan.
    Raises `PlanError` where the plan does not fit the model or was made for another checkpoint.
    """
    began = time.monotonic()
    listener = progress or Silent()
    deployed = config
    hand = make_plan(config, plan, progress=progress) if isinstance(plan, HandPlan) else None
    if snapshot is not None:
        config = config.with_(model={"checkpoint": snapshot})
    session = open_session(config)
    file = hand or read_planned(session, cast(AnyPath, plan), any_checkpoint=snapshot is not None)
    gate = Gate(deployed, file, is_of_snapshot=snapshot is not None, progress=listener)
    if repair:
        job_of(session).space.check(file.plan)
    session = session.as_planned(file)
    budget = _budget(config, file, budget_pct)
    traffic_window = session.window(window)
    session.costs({}, file.plan.items())  # what is wrong with them must cost no pass
    record = RunRecord(session, None, command="verify")
    with record.running(listener.note):
        listener.stage("verify", traffic_window.num_batches)
        work = Work(traffic_window, VERIFY_PASSES * traffic_window.num_batches)
        with open_workers(session, work, listener.note) as workers:
            if snapshot is not None and file.checkpoint_sha256 != session.checkpoint_sha256:
                session = _recalibrated(session, workers)
            key = trial_keys(session, window)(file.plan)
            terms = spending(
                record.looks(file.plan, session.window_text(window)),
                key,
                confidence=session.config.search.confidence,
                sequential=sequential,
            )
            if terms.note:
                listener.note(terms.note)
            evaluation = session.evaluate(
                workers,
                window,
                traffic_window,
                [file.plan],
                quarantine=record.artifacts / "quarantine",
                confidence=terms.confidence,
                looks=terms.looks,
                tuned_for=terms.tuned_for,
                on_progress=listener.advance,
            )
            wrong_rows = session.rows_without_form(workers, file.plan)
        metrics = evaluation.metrics[0]
        costs = session.costs(evaluation.use, file.plan.items())
        trial = Trial(
            key=key,
            number=0,
            wave=0,
            kind="verify",
            plan=file.plan,
            size_bytes=session.storage.size_bytes(file.plan),
            latency_ns=costs.plan_latency_ns(file.plan),
            cost=costs.cost(file.plan),
            promised_pct=None,
            metrics=metrics,
            risk_on_window=None,
            rows=evaluation.rows,
        )
        floors = gate.floors(metrics, window, record.artifacts / "quarantine")
        record.add_trials(
            [trial],
            evaluation="verify",
            window=session.window_text(window),
            gated=lambda verdict: gated(verdict, floors),
            floors=[floor.to_dict() for floor in floors],
        )
        outcome = Verification(
            run_id=record.run_id,
            plan=file.plan,
            row_ranges=rowwise_ranges(file.plan, file.row_ranges),
            size_bytes=trial.size_bytes,
            latency_ns=trial.latency_ns,
            fp32_bytes=session.storage.fp32_bytes,
            metrics=metrics,
            budget_pct=budget,
            verdict=gated(metrics.verdict(budget), floors),
            window=session.window_text(window),
            rows=evaluation.rows,
            notes=(*_notes(session, file, config), *costs.notes, *wrong_rows, *([terms.note] if terms.note else [])),
            spending=terms,
            seconds=time.monotonic() - began,
            missing=shortfall(
                metrics,
                budget,
                metrics.verdict(budget),
                days=traffic_window.num_days,
                by_group=config.traffic.group is not None,
            ),
            floors=floors,
        )
        if snapshot is not None:
            outcome = replace(outcome, snapshot=_snapshot(session, file, trial, outcome, record.artifacts))
        record.state(
            "done",
            verdict=outcome.verdict,
            recommended_trial_key=trial.key,
            message="; ".join([f"plan {plan} on {outcome.window}", *(f.message for f in floors if not f.is_kept)]),
        )
    if repair and not all(floor.is_kept_by_fp32 for floor in floors if floor.is_kept is False):
        listener.note("the fp32 model of this checkpoint breaks a floor of the gate too: no plan can repair that")
    elif repair and outcome.verdict != "certified":
        listener.note(f"the plan is {outcome.verdict}: searching from there")
        found = run_search(_within(session.config, budget_pct), start=file.plan, progress=progress)
        bad_rows = record.artifacts / "quarantine"
        repaired = tuple(f for r in found.recommendations for f in gate.floors(r.best.metrics, "confirm", bad_rows))
        outcome = replace(outcome, repair=found, repair_floors=repaired)
    return replace(outcome, seconds=time.monotonic() - began)


def _within(config: Config, budget_pct: float | None) -> Config:
    """With that budget alone, where one is given."""
    if budget_pct is None:
        return config
    return config.with_(search={"budget": budget_pct, "budgets": ()})


def _recalibrated(session: Session, workers: Workers) -> Session:
    """With the inputs of layers calibrated on this snapshot."""
    if not any(isinstance(form, LayerForm) and form.is_static for form in session.forms.values()):
        return session
    per_task = session.config.evaluation.batches_per_task
    forms = recalibrated(workers, session.window("search"), session.forms, batches_per_task=per_task)
    return session.with_forms(forms)


def _snapshot(session: Session, file: PlanFile, trial: Trial, outcome: Verification, artifacts: Location) -> Snapshot:
    path: Location | None = None
    if outcome.verdict == "certified":
        path = artifacts / "plan.json"
        found = plan_file(
            session,
            trial,
            outcome.metrics,
            run_id=outcome.run_id,
            kind="confirm",
            window=outcome.window,
            budget_pct=outcome.budget_pct,
            verdict=outcome.verdict,
        )
        write_plan(replace(found, row_ranges=file.row_ranges), path)
    return Snapshot(session.config.model.checkpoint, session.checkpoint_sha256, file.checkpoint_sha256, path)


def _notes(session: Session, file: PlanFile, config: Config) -> list[str]:
    notes = []
    ranges = set(rowwise_ranges(file.plan, file.row_ranges).values())
    if file.row_alignment != session.storage.row_alignment:
        notes.append(
            f"the plan was made for row alignment {file.row_alignment}, the config has "
            f"{session.storage.row_alignment}: bytes are those of the config"
        )
    if ranges - {config.space.row_range}:
        notes.append(
            f"the plan's row ranges are {' and '.join(sorted(ranges))}, the config's space.row_range is "
            f"{config.space.row_range}: the plan was evaluated with its own"
        )
    return notes


def _budget(config: Config, file: PlanFile, given: float | None) -> float:
    budgets = config.search.all_budgets
    if given is not None:
        return given
    made_for: Any = file.evidence.get("budget_pct")
    if made_for and not config.search.model_fields_set & {"budget", "budgets"}:
        return float(made_for)
    if len(budgets) == 1:
        return budgets[0]
    if made_for in budgets:
        return float(made_for)
    raise ConfigError(
        f"search.budgets: has {', '.join(f'{b:g}' for b in budgets)}, and the plan was made for {made_for}; "
        "say which budget to verify against with --budget"
    )
