"""Results of the monitor: window rows, alerts and deliveries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from lowprec._version import __version__
from lowprec.monitor.deployment import Deployment
from lowprec.monitor.judging.evidence import WindowEvidence
from lowprec.monitor.judging.judge import SEVERITY, State
from lowprec.monitor.window_result import WindowResult
from lowprec.results import ResultsStore
from lowprec.storage import Location
from lowprec.traffic import Window

__all__ = ["Alert", "JudgedWindow", "MonitorRecord", "alert_of", "next_event"]


@dataclass(frozen=True)
class JudgedWindow:
    """A window as it was judged last."""

    window: Window
    version: int
    state: State
    message: str
    evidence: WindowEvidence | None
    inputs_json: str | None


@dataclass(frozen=True)
class Alert:
    """Something to tell people. `incident` is what belongs together: from where a promise broke until it holds again.

    event: opened, continues or resolved.
    """

    key: str
    incident: str
    event: str
    state: State
    window_start: int
    window_text: str
    raised_at: datetime
    message: str
    proposed_plan: str | None
    document: Mapping[str, Any]


class MonitorRecord:
    """The rows of one deployment in `monitor_windows` and `alerts`.

    Several processes may write at once: rows are keyed by window and version, and of equal ones one is kept.
    """

    def __init__(self, root: str, deployment: Deployment) -> None:
        """Read nothing yet."""
        self._store = ResultsStore(root)
        self._deployment = deployment

    @property
    def artifacts(self) -> Location:
        """The folder for the deployment's files, below the results root."""
        return self._store.artifacts(f"monitor-{self._deployment.key}")

    def judged(self) -> dict[int, JudgedWindow]:
        """Every window that was judged, as it was last, by its start."""
        return {
            row["window_start"]: JudgedWindow(
                window=Window(row["window_start"], row["window_end"]),
                version=row["version"],
                state=row["state"],
                message=row["message"],
                evidence=WindowEvidence.from_dict(json.loads(row["evidence_json"])) if row["evidence_json"] else None,
                inputs_json=row["inputs_json"],
            )
            for row in sorted(self._windows(), key=lambda row: row["window_start"])
        }

    def last_window(self) -> dict[str, Any] | None:
        """The row of the newest window."""
        return max(self._windows(), key=lambda row: row["window_start"], default=None)

    def add_window(self, result: WindowResult) -> bool:
        """Commit a judged window; False where somebody else did at the same time, whose row then counts."""
        window, key = result.window, f"{self._deployment.key}/{result.window.start}"
        row = {
            "row_key": f"{key}/{result.version}",
            "deployment": self._deployment.key,
            "name": self._deployment.name,
            "window_key": key,
            "version": result.version,
            "window_start": window.start,
            "window_end": window.end,
            "budget_pct": self._deployment.budget_pct,
            "judged_by": self._deployment.judged_by,
            "lowprec_version": __version__,
            "judged_at": datetime.now(UTC),
            **result.to_row(),
        }
        return self._store.append("monitor_windows", [row], exclusive=f"lowprec-{key}") > 0

    def alerts(self, *, of_runs: bool = False) -> list[dict[str, Any]]:
        """The alerts of the deployment, and what became of telling them, in the order of their windows.

        of_runs: also those of runs that could not begin.
        """
        rows: list[dict[str, Any]] = self._store.read("alerts", deployment=self._deployment.key).to_pylist()
        if not of_runs:
            rows = [row for row in rows if not row["incident"].startswith(f"{self._deployment.key}/run/")]
        return sorted(rows, key=lambda row: (row["window_start"], row["raised_at"]))

    def add_alert(self, alert: Alert) -> None:
        """Commit an alert, unless its window has one."""
        self._store.append("alerts", [self._alert_row(alert, alert.event, "")], exclusive=f"lowprec-{alert.key}")

    def add_failed_run(self, message: str, moment: datetime) -> None:
        """Commit that a run could not even begin, as an incident of its own; once until a run begins again."""
        if self._open_failure() is None:
            number = sum(row["event"] == "resolved" for row in self._failures())
            self.add_alert(self._run_alert(f"{number}", "opened", "error", message, moment))

    def add_good_run(self, moment: datetime) -> None:
        """Commit that runs begin again, where the last one did not."""
        failed = self._open_failure()
        if failed is not None:
            number = failed["incident"].rpartition("/")[2]
            self.add_alert(self._run_alert(number, "resolved", "ok", "the monitor runs again", moment))

    def _failures(self) -> list[dict[str, Any]]:
        found = [row for row in self.alerts(of_runs=True) if row["event"] in ("opened", "resolved")]
        return [row for row in found if row["incident"].startswith(f"{self._deployment.key}/run/")]

    def _open_failure(self) -> dict[str, Any] | None:
        failures = self._failures()
        resolved = {row["incident"] for row in failures if row["event"] == "resolved"}
        return next((row for row in failures if row["incident"] not in resolved), None)

    def _run_alert(self, number: str, event: str, state: State, message: str, moment: datetime) -> Alert:
        incident = f"{self._deployment.key}/run/{number}"
        return Alert(
            key=f"{incident}/{event}",
            incident=incident,
            event=event,
            state=state,
            window_start=max((row["window_start"] for row in self._windows()), default=0),
            window_text="no window",
            raised_at=moment,
            message=message,
            proposed_plan=None,
            document={},
        )

    def _windows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._store.read("monitor_windows", deployment=self._deployment.key).to_pylist()
        return rows

    def add_telling(self, alert: Alert, failed: str | None) -> None:
        """Commit what became of telling an alert: that it arrived, or why not."""
        event = "told" if failed is None else "not_told"
        self._store.append("alerts", [self._alert_row(alert, event, failed or "")], exclusive=f"lowprec-{alert.key}")

    def _alert_row(self, alert: Alert, event: str, why: str) -> dict[str, Any]:
        return {
            "row_key": f"{alert.key}/{event}" if event in ("told", "not_told") else alert.key,
            "deployment": self._deployment.key,
            "name": self._deployment.name,
            "alert_key": alert.key,
            "incident": alert.incident,
            "event": event,
            "state": alert.state,
            "window": alert.window_text,
            "window_start": alert.window_start,
            "raised_at": alert.raised_at,
            "message": why or alert.message,
            "proposed_plan": alert.proposed_plan,
            "alert_json": json.dumps(alert.document),
        }


def next_event(rows: Sequence[Mapping[str, Any]], state: State, *, new_incident: str) -> tuple[str, str] | None:
    """The incident and the event of a newest window in that state, after the alerts so far; None where it raises none.

    An incident lasts until a window is ok: one that has too little data does not end it. It is opened again, under the
    same name, where it gets worse.
    """
    last = next((row for row in reversed(rows) if row["event"] in ("opened", "continues", "resolved")), None)
    is_open = last is not None and last["event"] != "resolved"
    if last is None or not is_open:
        return None if state in ("ok", "insufficient_data") else (new_incident, "opened")
    if state == "insufficient_data":
        return None
    is_worse = SEVERITY.index(state) > SEVERITY.index(last["state"])
    return last["incident"], "resolved" if state == "ok" else "opened" if is_worse else "continues"


def alert_of(row: Mapping[str, Any]) -> Alert:
    """The alert that a row holds."""
    names = ("incident", "event", "state", "raised_at", "message", "proposed_plan")
    return Alert(
        key=row["alert_key"],
        window_start=row["window_start"],
        window_text=row["window"],
        document=json.loads(row["alert_json"]),
        **{name: row[name] for name in names},
    )
