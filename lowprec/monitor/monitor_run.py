"""One run of the monitor: every complete window since the last one, judged, kept and told; then it ends."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from lowprec.config import Config, TimeBound
from lowprec.core.errors import ConfigError, LowprecError, ModelError, PlanError, TrafficError, WeightError
from lowprec.core.progress import Progress, Silent
from lowprec.evaluation.workers.memory import give_back_now
from lowprec.monitor.deployment import Deployment
from lowprec.monitor.inputs.drift import drift_rule
from lowprec.monitor.inputs.normal_drift import History
from lowprec.monitor.judging.budget_test import BudgetState
from lowprec.monitor.judging.history import BreachHistory
from lowprec.monitor.judging.judge import Judgement, State, WindowEvidence, judge, standing_breach
from lowprec.monitor.notify.notify import tell, tell_failed_run
from lowprec.monitor.outcome import MonitorOutcome, window_document, worst
from lowprec.monitor.proposal import Proposal, propose, verify_arguments
from lowprec.monitor.record import JUDGED_COLUMNS, Alert, JudgedWindow, MonitorRecord, next_event
from lowprec.monitor.schedule import Schedule
from lowprec.monitor.snapshot_pool import LiveSnapshot, SnapshotPool
from lowprec.monitor.window_evidence import measure_window, standing_columns
from lowprec.plan import write_plan
from lowprec.storage import AnyPath
from lowprec.traffic import TrafficReader, TrafficWindow, Window, format_time, format_window, open_traffic

__all__ = ["run_monitor"]

# What is wrong with one window, and not with what all of them need: the next one may be judged.
_OF_ONE_WINDOW = (TrafficError, ModelError, WeightError)
# Rows of a table whose range grew are said from this share of them on.
MANY_ROWS = 0.01


def run_monitor(
    config: Config,
    plan_path: AnyPath,
    *,
    since: TimeBound = None,
    until: TimeBound = None,
    now: datetime | None = None,
    progress: Progress | None = None,
) -> MonitorOutcome:
    """Judge every complete window since the last one that was judged, and again those whose labels came since.

    since, until: judge the windows between them that were not judged yet, instead. now: the moment to take for now.
    Raises a `LowprecError` where the windows that are due cannot be judged; that is a row of its own then, and judged
    again by the next run.
    """
    moment, listener = now or datetime.now(UTC), progress or Silent()
    deployment = Deployment.of(config, plan_path)
    record = MonitorRecord(config.results.root, deployment)
    try:
        monitor = _Monitor(config, plan_path, deployment, record, moment, listener)
    except (ConfigError, PlanError):
        raise
    except LowprecError as error:
        try:
            record.add_failed_run(str(error), moment)
            tell_failed_run(config, record, deployment.budget_pct, note=listener.note)
        except LowprecError as another:
            listener.note(f"nobody is told of it: {another}")
        raise
    record.add_good_run(moment)
    return monitor.run(since, until)


class _Monitor:
    def __init__(
        self,
        config: Config,
        plan_path: AnyPath,
        deployment: Deployment,
        record: MonitorRecord,
        now: datetime,
        progress: Progress,
    ) -> None:
        traffic = config.traffic
        self._reader: TrafficReader = open_traffic(
            traffic.path, traffic.schema_of_columns(), batch_size=traffic.batch_size, version=traffic.version
        )
        # Snapshots of the model are opened later, and read the same version of a Delta table.
        config = config.with_traffic_version(self._reader.version)
        self._config, self._plan_path, self._now, self._progress = config, plan_path, now, progress
        self._deployment, self._record = deployment, record
        self._drift_rule = drift_rule(config.monitor, traffic.schema_of_columns())
        self._schedule = Schedule.of(config, self._reader, now)
        self._models = SnapshotPool(
            config, plan_path, self._deployment, self._schedule, self._record.artifacts, self._progress
        )
        self._judged = self._record.judged()
        self._life = BreachHistory(
            {start: judged.evidence for start, judged in self._judged.items()},
            judged_by=self._deployment.judged_by,
            budget_pct=self._deployment.budget_pct,
            false_alarm_rate=config.monitor.false_alarm_rate,
            confidence=config.search.confidence,
        )
        self._life.breaches |= {
            row["window_start"]
            for row in self._record.alerts()
            if row["state"] == "breach" and row["event"] == "opened" and row["window_start"] in self._judged
        }
        self._documents: list[dict[str, Any]] = []
        self._notes: list[str] = []

    def run(self, since: TimeBound, until: TimeBound) -> MonitorOutcome:
        bounds = self._schedule.between(since, until)
        due = self._due(*bounds)
        ended = self._schedule.windows_after_traffic(*bounds, judged=self._judged)
        if ended:
            self._note(ended)
        if self._schedule.skew_s:
            self._note(
                f"the newest row is {self._schedule.skew_s:.0f} s ahead of this machine's clock "
                f"({self._now:%Y-%m-%dT%H:%M:%SZ}): one of the two clocks is wrong, and windows may be judged before "
                "all of their rows are there"
            )
        if self._schedule.first > self._schedule.asked_first:
            asked = format_time(self._schedule.asked_first, self._schedule.unit)
            self._note(
                f"{asked} lies within a window; the first whole one begins at "
                f"{format_time(self._schedule.first, self._schedule.unit)}, and what lies before it is not watched"
            )
        if due and self._judged and (due[0].start or 0) < max(self._judged):
            self._note("windows before the newest one were judged now: what rows after them say was known without them")
        error: LowprecError | None = None
        self._models.num_due = len(due)
        with self._models:
            for number, window in enumerate(due):
                self._progress.note(f"window {number + 1} of {len(due)}: {self._text(window)}")
                try:
                    self._judge(window)
                except (ConfigError, PlanError):
                    raise
                except LowprecError as failure:
                    self._fail(window, failure)
                    if not isinstance(failure, _OF_ONE_WINDOW):
                        error = failure
                        break
                give_back_now()
        outcome = self._outcome(ended)
        told = tell(
            self._config,
            self._record,
            outcome,
            self._schedule.unit,
            self._now,
            is_complete=error is None,
            note=self._note,
        )
        if error is not None:
            raise error
        return replace(outcome, told=told, notes=tuple(self._notes))

    def _due(self, since: int | None, until: int | None) -> list[Window]:
        """What to judge, in time order: new windows, those that could not be judged, and those with more labels now."""
        latest = max(self._judged, default=None)
        begin = since if since is not None or latest is None else latest
        new = self._schedule.due_windows(begin, until, judged=self._judged)
        again = [
            judged.window
            for judged in self._judged.values()
            if judged.state == "error" or (self._schedule.may_get_labels(judged.window) and self._has_more(judged))
        ]
        return sorted({*new, *again}, key=lambda window: window.start or 0)

    def _has_more(self, judged: JudgedWindow) -> bool:
        found = self._reader.find(judged.window)
        now = (found.num_rows, found.count_labels()) if found else (0, 0)
        before = judged.evidence
        return before is None or now != (before.num_rows, before.num_labels)

    def _judge(self, window: Window) -> None:
        traffic = self._reader.find(window)
        if traffic is None:
            self._keep_gap(window)
            return
        certified = self._models.certified(window)
        live = self._models.in_window(window)
        name = f"window-{window.start}"
        self._progress.stage("monitor", traffic.num_batches)
        earlier = [self._judged[start].inputs_json for start in sorted(self._judged) if start < (window.start or 0)]
        measured = measure_window(
            live.session,
            live.workers,
            live.plan,
            live.session.reader.window(window),
            certified,
            self._drift_rule,
            History(earlier, certified.inputs),
            num_labels=traffic.count_labels(),
            quarantine=self._record.artifacts / "quarantine",
            name=name,
            on_progress=self._progress.advance,
        )
        self._life.add(window.start or 0, measured.evidence)
        standing, kl_standing, number = self._life.after(window.start or 0)
        saturation = self._models.grown_ranges(live)
        notes = [f"{measured.rows.num_bad} rows are bad and were set aside"] if measured.rows.num_bad else []
        if saturation and saturation[0].share > MANY_ROWS:
            notes.append(f"this snapshot stores rows in coarser steps: {saturation[0]}")
        judgement = judge(
            measured.metrics,
            standing,
            kl_standing,
            number=number,
            breach_window=self._breach_window(standing),
            evidence=measured.evidence.of(self._deployment.judged_by),
            budget_pct=self._deployment.budget_pct,
            judged_by=self._deployment.judged_by,
            num_unlabelled=measured.rows.num_unlabelled,
            drift=measured.drift,
            certified_calibration=certified.calibration_ref,
            notes=notes,
        )
        proposal = self._propose(window, live, traffic, standing) if judgement.state == "breach" else None
        row = {
            **measured.to_row(),
            **standing_columns(standing, self._config.search.confidence),
            "checkpoint": live.path,
            "checkpoint_sha256": live.session.checkpoint_sha256,
            "saturation_json": json.dumps([g.to_dict() for g in saturation]),
        }
        self._keep(window, judgement, row, measured.evidence, proposal, live)

    def _keep_gap(self, window: Window) -> None:
        evidence = WindowEvidence(None, None, 0, 0)
        self._life.add(window.start or 0, evidence)
        standing, _, _ = self._life.after(window.start or 0)
        if standing.in_breach:
            judgement = Judgement("breach", ("no row lies in this window, and the gap was above the budget before it",))
        else:
            judgement = Judgement("insufficient_data", ("no row lies in this window: a gap in the traffic",))
        row = {
            **standing_columns(standing, self._config.search.confidence),
            "num_rows": 0,
            "num_labelled": 0,
            "evidence_json": json.dumps(evidence.to_dict()),
        }
        self._keep(window, judgement, row, evidence, None, None)

    def _fail(self, window: Window, error: LowprecError) -> None:
        """Keep that a window could not be judged; the same error again is no new row."""
        before = self._judged.get(window.start or 0)
        if before is not None and before.state == "error" and before.message == str(error):
            row = dict.fromkeys(JUDGED_COLUMNS) | {"window": self._text(window)}
            self._documents.append(window_document(row, before.version, Judgement("error", (str(error),)), None, None))
            return
        self._life.add(window.start or 0, None)
        self._keep(window, Judgement("error", (str(error),)), {}, None, None, None)

    def _keep(
        self,
        window: Window,
        judgement: Judgement,
        known: dict[str, Any],
        evidence: WindowEvidence | None,
        proposal: Proposal | None,
        live: LiveSnapshot | None,
    ) -> None:
        """Commit the window's alert and then the window: who is killed between them judges it again."""
        start = window.start or 0
        before = self._judged.get(start)
        version = before.version + 1 if before else 0
        row = {
            **dict.fromkeys(JUDGED_COLUMNS),
            **known,
            "window": self._text(window),
            "judged_at": datetime.now(UTC),
            "state": judgement.state,
            "message": judgement.message,
        }
        plan_path = verify_with = None
        if proposal is not None and live is not None:
            path = self._record.artifacts / f"proposed-{start}.json"
            verify_with = verify_arguments(window, self._schedule.unit, path, self._deployment.budget_pct)
            file = proposal.file(
                self._deployment.plan, live.session.checkpoint_sha256, self._text(window), self._deployment.budget_pct
            )
            write_plan(file, path)
            plan_path = str(path)
        document = window_document(row, version, judgement, proposal, plan_path, verify_with)
        if start >= max(self._judged, default=start):
            self._alert(window, judgement.state, judgement.message, document, plan_path)
        self._record.add_window(window, version, row)
        inputs = row["inputs_json"]
        self._judged[start] = JudgedWindow(window, version, judgement.state, judgement.message, evidence, inputs)
        self._documents.append(document)

    def _alert(
        self, window: Window, state: State, message: str, document: dict[str, Any], plan_path: str | None
    ) -> None:
        """Commit what people should know of the newest window: that something is wrong, still is, or no longer is."""
        start = window.start or 0
        # Those of later windows are of somebody who runs beside; one of this window, of somebody who was killed.
        before = [row for row in self._record.alerts() if row["window_start"] < start]
        belongs = next_event(before, state, new_incident=f"{self._deployment.key}/{start}")
        if belongs is None:
            return
        incident, event = belongs
        alert = Alert(
            key=f"{self._deployment.key}/{start}/alert",
            incident=incident,
            event=event,
            state=state,
            window_start=start,
            window_text=self._text(window),
            raised_at=datetime.now(UTC),
            message=message,
            proposed_plan=plan_path,
            document={k: v for k, v in document.items() if k not in ("window", "state", "version")},
        )
        self._record.add_alert(alert)
        if state == "breach" and event == "opened":
            self._life.breaches.add(start)

    def _outcome(self, ended: str) -> MonitorOutcome:
        """What this run found. Labels that came late may break the promise in a window that was judged long ago: that
        is told with the newest window.

        ended: a sentence, where complete windows are after the end of the traffic: a deployment without traffic is not
        ok.
        """
        found: list[tuple[State, str]] = [(d["state"], f"{d['window']}: {_reasons(d)}") for d in self._documents]
        newest = max(self._judged, default=None)
        current: State = "insufficient_data"
        if newest is None:
            first = f"no window is complete yet: the first one is {self._text(self._schedule.first_window)}"
            state, message = current, ended or first
        else:
            judged = self._judged[newest]
            current = judged.state
            standing, _, number = self._life.after(newest)
            if standing.in_breach and "breach" not in (*(state for state, _ in found), current):
                late = "labels that came late show a breach: " + standing_breach(
                    standing, "the gap", self._deployment.budget_pct, self._breach_window(standing), number
                )
                self._note(late)
                self._alert(judged.window, "breach", late, {}, None)
                found.append(("breach", late))
                current = "breach"
            state = worst([state for state, _ in found]) if found else current
            message = next(
                (text for known, text in reversed(found) if known == state),
                f"no window is due; the last one, {self._text(judged.window)}: {judged.message}",
            )
            if ended:
                current = worst([current, "insufficient_data"])
                if worst([state, "insufficient_data"]) != state:
                    state, message = "insufficient_data", ended
        return MonitorOutcome(
            deployment=self._deployment.key,
            name=self._deployment.name,
            plan=str(self._plan_path),
            state=state,
            message=message,
            current_state=current,
            budget_pct=self._deployment.budget_pct,
            judged_by=self._deployment.judged_by,
            num_windows=len(self._judged),
            windows=tuple(self._documents),
        )

    def _breach_window(self, standing: BudgetState) -> str:
        """The window in which the breach was found that stands."""
        at = standing.breach_at
        return "" if at is None else self._text(self._schedule.window_at(self._life.start_of(at)))

    def _note(self, text: str) -> None:
        self._notes.append(text)
        self._progress.note(text)

    def _text(self, window: Window) -> str:
        return format_window(window, self._schedule.unit)

    def _propose(
        self, window: Window, live: LiveSnapshot, traffic: TrafficWindow, standing: BudgetState
    ) -> Proposal | None:
        self._progress.stage("proposal", traffic.num_batches)
        return propose(
            live.session,
            live.workers,
            live.session.reader.window(window),
            live.plan,
            budget_pct=self._deployment.budget_pct,
            gap_pct=100 * standing.running_gap,
            confidence=self._config.search.confidence,
            label_free=self._deployment.judged_by == "kl",
            on_progress=self._progress.advance,
        )


def _reasons(document: dict[str, Any]) -> str:
    return "; ".join(document["reasons"])
