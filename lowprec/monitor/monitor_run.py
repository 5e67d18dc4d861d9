"""One run of the monitor: judges every complete window since the last run, stores it and sends notifications."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from lowprec.config import Config, TimeBound
from lowprec.core.errors import ConfigError, LowprecError, ModelError, PlanError, TrafficError, WeightError
from lowprec.core.progress import Progress, Silent
from lowprec.evaluation.workers.memory import give_back_now
from lowprec.monitor.certified import Certified
from lowprec.monitor.deployment import Deployment
from lowprec.monitor.inputs.drift import DriftRule, drift_rule
from lowprec.monitor.inputs.normal_drift import History
from lowprec.monitor.judging.evidence import WindowEvidence
from lowprec.monitor.judging.history import BreachHistory, HistoryAt
from lowprec.monitor.judging.judge import Judgement, State, judge, standing_breach
from lowprec.monitor.notify.notify import notify, notify_failed_run
from lowprec.monitor.outcome import MonitorOutcome, worst
from lowprec.monitor.proposal import propose, verify_arguments
from lowprec.monitor.record import Alert, JudgedWindow, MonitorRecord, next_event
from lowprec.monitor.schedule import Schedule, certified_window
from lowprec.monitor.snapshot_pool import LiveSnapshot, SnapshotPool
from lowprec.monitor.window_evidence import MeasuredWindow, measure_window
from lowprec.monitor.window_result import ProposedPlan, ServedSnapshot, WindowResult
from lowprec.plan import write_plan
from lowprec.storage import AnyPath
from lowprec.traffic import TrafficReader, TrafficWindow, Window, format_window, open_traffic

__all__ = ["run_monitor"]

# What is wrong with one window, and not with what all of them need: the next one may be judged.
_OF_ONE_WINDOW = (TrafficError, ModelError, WeightError)
# Rows whose range grew are reported from this share of a table on.
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
        run = _begun(config, plan_path, deployment, record, moment, listener)
    except (ConfigError, PlanError):
        raise
    except LowprecError as error:
        try:
            record.add_failed_run(str(error), moment)
            notify_failed_run(config, record, deployment.budget_pct, note=listener.note)
        except LowprecError as another:
            listener.note(f"no notification is sent: {another}")
        raise
    record.add_good_run(moment)
    bounds = run.schedule.between(since, until)
    due = _due(run, *bounds)
    ended = run.schedule.windows_after_traffic(*bounds, judged=run.judged)
    for odd in [ended] * bool(ended) + run.schedule.notes(moment):
        run.note(odd)
    if due and run.judged and (due[0].start or 0) < max(run.judged):
        run.note("windows before the newest one were judged now: what rows after them say was known without them")
    stopped = _judge_all(run, due)
    outcome = _outcome(run, ended)
    told = notify(run.config, record, outcome, run.schedule.unit, moment, is_complete=stopped is None, note=run.note)
    if stopped is not None:
        raise stopped
    return replace(outcome, told=told, notes=tuple(run.notes))


@dataclass(frozen=True)
class _Run:
    """What every step of a run has at hand, and what grows while it goes on.

    judged: every window as it was judged last, by its start. results: the windows of this run. notes: for people.
    """

    config: Config
    plan_path: AnyPath
    now: datetime
    progress: Progress
    reader: TrafficReader
    deployment: Deployment
    record: MonitorRecord
    drift_rule: DriftRule
    schedule: Schedule
    history: BreachHistory
    judged: dict[int, JudgedWindow]
    results: list[WindowResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Report something now, and with the outcome."""
        self.notes.append(text)
        self.progress.note(text)

    def text(self, window: Window) -> str:
        """A window for people."""
        return format_window(window, self.schedule.unit)

    def next_version(self, window: Window) -> int:
        """The version of a window's row that is written next."""
        before = self.judged.get(window.start or 0)
        return before.version + 1 if before else 0

    def breach_window(self, history: HistoryAt) -> str:
        """The window in which the breach was found that stands, for people."""
        start = history.breach_start
        return "" if start is None else self.text(self.schedule.window_at(start))


def _begun(
    config: Config,
    plan_path: AnyPath,
    deployment: Deployment,
    record: MonitorRecord,
    now: datetime,
    progress: Progress,
) -> _Run:
    """Open the traffic and read what is known; snapshots of the model are opened later."""
    traffic = config.traffic
    columns = traffic.schema_of_columns()
    reader = open_traffic(traffic.path, columns, batch_size=traffic.batch_size, version=traffic.version)
    # Snapshots read the same version of a Delta table.
    config = config.with_traffic_version(reader.version)
    rule, schedule = drift_rule(config.monitor, columns), Schedule.of(config, reader, now)
    certified_window(config, schedule)  # checked before any window is judged
    judged = record.judged()
    history = BreachHistory(
        {start: window.evidence for start, window in judged.items()},
        judged_by=deployment.judged_by,
        budget_pct=deployment.budget_pct,
        false_alarm_rate=config.monitor.false_alarm_rate,
        confidence=config.search.confidence,
        breaches=[
            row["window_start"]
            for row in record.alerts()
            if row["state"] == "breach" and row["event"] == "opened" and row["window_start"] in judged
        ],
    )
    return _Run(config, plan_path, now, progress, reader, deployment, record, rule, schedule, history, judged)


def _due(run: _Run, since: int | None, until: int | None) -> list[Window]:
    """What to judge, in time order: new windows, those that could not be judged, and those with more labels now."""
    latest = max(run.judged, default=None)
    begin = since if since is not None or latest is None else latest
    new = run.schedule.due_windows(begin, until, judged=run.judged)
    again = [
        judged.window
        for judged in run.judged.values()
        if judged.state == "error" or (run.schedule.may_get_labels(judged.window) and _has_more(run, judged))
    ]
    return sorted({*new, *again}, key=lambda window: window.start or 0)


def _has_more(run: _Run, judged: JudgedWindow) -> bool:
    found = run.reader.find(judged.window)
    now = (found.num_rows, found.count_labels()) if found else (0, 0)
    before = judged.evidence
    return before is None or now != (before.num_rows, before.num_labels)


def _judge_all(run: _Run, due: Sequence[Window]) -> LowprecError | None:
    """Judge windows in order; returns the error where one of them was in the way of all that follow."""
    snapshots = SnapshotPool(
        run.config, run.plan_path, run.deployment, run.schedule, run.record.artifacts, run.progress, num_due=len(due)
    )
    with snapshots:
        for number, window in enumerate(due):
            run.progress.note(f"window {number + 1} of {len(due)}: {run.text(window)}")
            try:
                _keep(run, _judged(run, snapshots, window))
            except (ConfigError, PlanError):
                raise
            except LowprecError as error:
                _keep_error(run, window, error)
                if not isinstance(error, _OF_ONE_WINDOW):
                    return error
            give_back_now()
    return None


def _judged(run: _Run, snapshots: SnapshotPool, window: Window) -> WindowResult:
    """A window, measured and judged."""
    traffic = run.reader.find(window)
    if traffic is None:
        return _judged_gap(run, window)
    start, certified, live = window.start or 0, snapshots.certified(window), snapshots.in_window(window)
    measured = _measured(run, window, traffic, certified, live)
    run.history.add(start, measured.evidence)
    history, growth = run.history.after(start), snapshots.grown_ranges(live)
    notes = [f"{measured.rows.num_bad} rows are bad and were set aside"] if measured.rows.num_bad else []
    if growth and growth[0].share > MANY_ROWS:
        notes.append(f"this snapshot stores rows in coarser steps: {growth[0]}")
    judgement = judge(
        measured,
        history,
        run.deployment,
        breach_window=run.breach_window(history),
        certified_calibration=certified.calibration_ref,
        notes=notes,
    )
    return WindowResult(
        window=window,
        window_text=run.text(window),
        version=run.next_version(window),
        judgement=judgement,
        evidence=measured.evidence,
        measured=measured,
        test=history.state,
        confidence=run.config.search.confidence,
        snapshot=ServedSnapshot(live.path, live.session.checkpoint_sha256, tuple(growth)),
        proposed=_proposed(run, window, live, traffic, history) if judgement.state == "breach" else None,
    )


def _measured(
    run: _Run, window: Window, traffic: TrafficWindow, certified: Certified, live: LiveSnapshot
) -> MeasuredWindow:
    """What one pass of the live snapshot over a window says."""
    run.progress.stage("monitor", traffic.num_batches)
    earlier = [run.judged[start].inputs_json for start in sorted(run.judged) if start < (window.start or 0)]
    return measure_window(
        live.session,
        live.workers,
        live.plan,
        live.session.reader.window(window),
        certified,
        run.drift_rule,
        History(earlier, certified.inputs),
        num_labels=traffic.count_labels(),
        quarantine=run.record.artifacts / "quarantine",
        name=f"window-{window.start}",
        on_progress=run.progress.advance,
    )


def _judged_gap(run: _Run, window: Window) -> WindowResult:
    """A window without rows."""
    evidence, start = WindowEvidence(None, None, 0, 0), window.start or 0
    run.history.add(start, evidence)
    test = run.history.after(start).state
    if test.in_breach:
        judgement = Judgement("breach", ("no row lies in this window, and the gap was above the budget before it",))
    else:
        judgement = Judgement("insufficient_data", ("no row lies in this window: a gap in the traffic",))
    return WindowResult(
        window=window,
        window_text=run.text(window),
        version=run.next_version(window),
        judgement=judgement,
        evidence=evidence,
        test=test,
        confidence=run.config.search.confidence,
    )


def _proposed(
    run: _Run, window: Window, live: LiveSnapshot, traffic: TrafficWindow, history: HistoryAt
) -> ProposedPlan | None:
    """The plan that a breach asks for, written; None where nothing helps."""
    run.progress.stage("proposal", traffic.num_batches)
    budget = run.deployment.budget_pct
    proposal = propose(
        live.session,
        live.workers,
        live.session.reader.window(window),
        live.plan,
        budget_pct=budget,
        gap_pct=100 * history.state.running_gap,
        confidence=run.config.search.confidence,
        label_free=run.deployment.judged_by == "kl",
        on_progress=run.progress.advance,
    )
    if proposal is None:
        return None
    path = run.record.artifacts / f"proposed-{window.start or 0}.json"
    write_plan(proposal.file(run.deployment.plan, live.session.checkpoint_sha256, run.text(window), budget), path)
    return ProposedPlan(proposal, str(path), verify_arguments(window, run.schedule.unit, path, budget))


def _keep_error(run: _Run, window: Window, error: LowprecError) -> None:
    """Keep that a window could not be judged; the same error again is no new row."""
    before, judgement = run.judged.get(window.start or 0), Judgement("error", (str(error),))
    if before is not None and before.state == "error" and before.message == str(error):
        run.results.append(WindowResult(window, run.text(window), before.version, judgement))
        return
    run.history.add(window.start or 0, None)
    _keep(run, WindowResult(window, run.text(window), run.next_version(window), judgement))


def _keep(run: _Run, result: WindowResult) -> None:
    """Commit the window's alert and then the window: a run killed between both judges the window again."""
    start, judgement = result.window.start or 0, result.judgement
    if start >= max(run.judged, default=start):
        _add_alert(run, result.window, judgement.state, judgement.message, result)
    run.record.add_window(result)
    run.judged[start] = JudgedWindow(
        result.window, result.version, judgement.state, judgement.message, result.evidence, result.inputs_json
    )
    run.results.append(result)


def _add_alert(run: _Run, window: Window, state: State, message: str, result: WindowResult | None) -> None:
    """Commit the alert of the newest window: opened, continued or resolved."""
    start, deployment = window.start or 0, run.deployment.key
    # Alerts of later windows come from a concurrent run, an alert of this window from a run that was killed.
    before = [row for row in run.record.alerts() if row["window_start"] < start]
    belongs = next_event(before, state, new_incident=f"{deployment}/{start}")
    if belongs is None:
        return
    incident, event = belongs
    document = {} if result is None else result.to_dict()
    alert = Alert(
        key=f"{deployment}/{start}/alert",
        incident=incident,
        event=event,
        state=state,
        window_start=start,
        window_text=run.text(window),
        raised_at=datetime.now(UTC),
        message=message,
        proposed_plan=result.proposed.path if result and result.proposed else None,
        document={k: v for k, v in document.items() if k not in ("window", "state", "version")},
    )
    run.record.add_alert(alert)
    if state == "breach" and event == "opened":
        run.history.add_breach(start)


def _outcome(run: _Run, ended: str) -> MonitorOutcome:
    """What this run found.

    ended: a sentence, where complete windows are after the end of the traffic: a deployment without traffic is not ok.
    """
    found: list[tuple[State, str]] = [
        (r.judgement.state, f"{r.window_text}: {'; '.join(r.judgement.reasons)}") for r in run.results
    ]
    newest = run.judged[max(run.judged)] if run.judged else None
    if newest is None:
        current: State = "insufficient_data"
        first = f"no window is complete yet: the first one is {run.text(run.schedule.first_window)}"
        state, message = current, ended or first
    else:
        late = _late_breach(run, newest, [state for state, _ in found])
        found += late
        current = late[0][0] if late else newest.state
        state = worst([state for state, _ in found]) if found else current
        message = next(
            (text for known, text in reversed(found) if known == state),
            f"no window is due; the last one, {run.text(newest.window)}: {newest.message}",
        )
        if ended:
            current = worst([current, "insufficient_data"])
            if worst([state, "insufficient_data"]) != state:
                state, message = "insufficient_data", ended
    return MonitorOutcome(
        deployment=run.deployment.key,
        name=run.deployment.name,
        plan=str(run.plan_path),
        state=state,
        message=message,
        current_state=current,
        budget_pct=run.deployment.budget_pct,
        judged_by=run.deployment.judged_by,
        num_windows=len(run.judged),
        windows=tuple(result.to_dict() for result in run.results),
    )


def _late_breach(run: _Run, newest: JudgedWindow, found: Sequence[State]) -> list[tuple[State, str]]:
    """A breach found by late labels of an earlier window. It is reported with the newest window."""
    history = run.history.after(newest.window.start or 0)
    if not history.state.in_breach or "breach" in (*found, newest.state):
        return []
    late = "labels that came late show a breach: " + standing_breach(
        history.state, "the gap", run.deployment.budget_pct, run.breach_window(history), history.number
    )
    run.note(late)
    _add_alert(run, newest.window, "breach", late, None)
    return [("breach", late)]
