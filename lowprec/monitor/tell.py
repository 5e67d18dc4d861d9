"""Who is told: a webhook and a file for Prometheus. What fails there is said and changes no verdict."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from lowprec.config import Config
from lowprec.errors import LowprecError
from lowprec.monitor.outcome import MonitorOutcome
from lowprec.monitor.record import MonitorRecord, alert_of
from lowprec.monitor.textfile import write_textfile
from lowprec.monitor.webhook import due_alerts, post_alert, webhook_url
from lowprec.sizes import parse_seconds
from lowprec.traffic.length import WindowLength
from lowprec.traffic.schema import TimeUnit
from lowprec.traffic.window import UNITS_PER_SECOND

__all__ = ["tell"]


def tell(
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
    return (*_textfile(config, record, outcome, now, is_complete, note), *_webhook(config, record, unit, note))


def _textfile(
    config: Config,
    record: MonitorRecord,
    outcome: MonitorOutcome,
    now: datetime,
    is_complete: bool,
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
            state=outcome.state,
            budget_pct=outcome.budget_pct,
            window=record.last_window(),
            last_success=now if is_complete else None,
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
    for row in due_alerts(record.alerts(), webhook.states, int(parse_seconds(webhook.cooldown, zero=True) * ticks)):
        alert = alert_of(row)
        try:
            failed = post_alert(webhook, webhook_url(webhook), alert, config.name)
        except LowprecError as error:
            failed = str(error)
        if failed is not None:
            note(f"monitor.webhook: the alert of {alert.window_text} was not told: {failed}; the next run tries again")
        record.add_telling(alert, failed)
        found.append({"channel": "webhook", "event": alert.event, "window": alert.window_text, "failed": failed})
    return found
