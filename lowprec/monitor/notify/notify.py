"""Notifications: a webhook and a file for Prometheus. What fails there is reported and changes no verdict."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from lowprec.config import Config
from lowprec.core.errors import LowprecError
from lowprec.core.sizes import parse_seconds
from lowprec.monitor.judging.judge import State
from lowprec.monitor.notify.textfile import write_textfile
from lowprec.monitor.notify.webhook import due_alerts, post_alert, webhook_url
from lowprec.monitor.outcome import MonitorOutcome
from lowprec.monitor.record import MonitorRecord, alert_of
from lowprec.traffic.length import WindowLength
from lowprec.traffic.schema import TimeUnit
from lowprec.traffic.window import UNITS_PER_SECOND

__all__ = ["notify", "notify_failed_run"]


def notify(
    config: Config,
    record: MonitorRecord,
    outcome: MonitorOutcome,
    unit: TimeUnit | None,
    now: datetime,
    *,
    is_complete: bool,
    note: Callable[[str], None],
) -> tuple[dict[str, Any], ...]:
    """Write the textfile and post what is due; returns what became of each.

    is_complete: all windows that were due are judged.
    """
    state, success = outcome.current_state, now if is_complete else None
    textfile = _textfile(config, record, state, outcome.budget_pct, success, note)
    return (*textfile, *_webhook(config, record, unit, note))


def notify_failed_run(config: Config, record: MonitorRecord, budget_pct: float, *, note: Callable[[str], None]) -> None:
    """Tell that a run could not even begin, with what is known from earlier ones."""
    _textfile(config, record, "error", budget_pct, None, note)
    _webhook(config, record, None, note)


def _textfile(
    config: Config,
    record: MonitorRecord,
    state: State,
    budget_pct: float,
    last_success: datetime | None,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    path = config.monitor.textfile
    if path is None:
        return []
    failed = None
    try:
        write_textfile(
            path,
            name=config.name,
            state=state,
            budget_pct=budget_pct,
            window=record.last_window(),
            last_success=last_success,
        )
    except OSError as error:
        failed = f"cannot be written: {error.strerror or error}"
        note(f"monitor.textfile {path}: {failed}; the verdict is kept, and Prometheus sees the file of an earlier run")
    return [{"channel": "textfile", "to": path, "failed": failed}]


def _webhook(
    config: Config, record: MonitorRecord, unit: TimeUnit | None, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    webhook = config.monitor.webhook
    if webhook is None:
        return []
    is_of_clock = WindowLength.parse(config.monitor.window).is_of_clock
    ticks = UNITS_PER_SECOND[unit] if unit and is_of_clock else 0
    found: list[dict[str, Any]] = []
    try:
        url = webhook_url(webhook)
    except LowprecError as error:
        note(f"{error}: nobody is told of alerts until then")
        return []
    for row in due_alerts(
        record.alerts(of_runs=True), webhook.states, int(parse_seconds(webhook.cooldown, zero=True) * ticks)
    ):
        alert = alert_of(row)
        failed = post_alert(webhook, url, alert, config.name)
        if failed is not None:
            note(f"monitor.webhook: the alert of {alert.window_text} was not told: {failed}; the next run tries again")
        record.add_telling(alert, failed)
        found.append({"channel": "webhook", "event": alert.event, "window": alert.window_text, "failed": failed})
    return found
