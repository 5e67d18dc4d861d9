"""Alerts posted to whoever pages people: once for an incident, again after a while, and when it is over."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from lowprec.config import WebhookConfig
from lowprec.core.errors import ConfigError, first_line
from lowprec.monitor.judging.judge import SEVERITY
from lowprec.monitor.record import Alert

__all__ = ["due_alerts", "post_alert", "webhook_url"]

_TRY_AGAIN = (429, 500, 502, 503, 504)


def webhook_url(config: WebhookConfig) -> str:
    """Where to post; raises `ConfigError` where the environment does not say."""
    if config.url is not None:
        return config.url
    url = os.environ.get(config.url_env or "")
    if not url:
        raise ConfigError(f"monitor.webhook.url_env: the environment has no {config.url_env}; set it to the URL")
    return url


def post_alert(config: WebhookConfig, url: str, alert: Alert, name: str) -> str | None:
    """Post an alert; None where it arrived, else why not. Takes no longer than the timeouts of all tries together."""
    body = {
        "schema_version": 1,
        "source": "lowprec",
        "dedup_key": alert.incident,
        "event": alert.event,
        "state": alert.state,
        "name": name,
        "window": alert.window_text,
        "message": alert.message,
        "proposed_plan": alert.proposed_plan,
        **alert.document,
    }
    retry = Retry(
        total=config.retries,
        backoff_factor=0.5,
        status_forcelist=_TRY_AGAIN,
        allowed_methods=None,
        raise_on_status=False,
        respect_retry_after_header=False,
    )
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        try:
            answer = session.post(
                url, json=body, headers={"Idempotency-Key": alert.key}, timeout=config.timeout_s, allow_redirects=False
            )
        except requests.RequestException as error:
            # The URL may be a secret: what requests says of it is left out.
            return f"{type(error).__name__} after {config.retries + 1} tries" + _reason(error)
    # A redirection is not followed, and nobody was told: the URL is another one now.
    return None if answer.status_code < 300 else f"HTTP {answer.status_code} {answer.reason}"


def due_alerts(rows: Sequence[Mapping[str, Any]], states: Sequence[str], cooldown: int) -> list[Mapping[str, Any]]:
    """The rows of `alerts` that should be told now, in their order.

    Of each incident the worst that nobody was told of yet, of equally bad ones the latest: also where it has passed
    since, so that what happened while nobody could be told is told. One that was told before is told again where it got
    worse, or after `cooldown`, which is in the unit of the traffic's time. Its end is told to who knows of it.
    """
    incidents: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        incidents.setdefault(row["incident"], []).append(row)
    return [row for found in incidents.values() for row in _due(found, states, cooldown)]


def _due(rows: Sequence[Mapping[str, Any]], states: Sequence[str], cooldown: int) -> list[Mapping[str, Any]]:
    """Those of one incident."""
    told = {row["alert_key"] for row in rows if row["event"] == "told"}
    alerts = [row for row in rows if row["event"] in ("opened", "continues", "resolved")]
    last_told = max((k for k, row in enumerate(alerts) if row["alert_key"] in told), default=None)
    untold = alerts if last_told is None else alerts[last_told + 1 :]
    wanted = [row for row in untold if row["event"] != "resolved" and row["state"] in states]
    due: list[Mapping[str, Any]] = []
    if last_told is None:
        if wanted:
            worst = max(enumerate(wanted), key=lambda item: (SEVERITY.index(item[1]["state"]), item[0]))[1]
            due.append({**worst, "event": "opened"})
    else:
        worse = [row for row in wanted if row["event"] == "opened"]
        if worse:
            due.append(worse[-1])
        elif wanted and wanted[-1]["window_start"] - alerts[last_told]["window_start"] >= cooldown:
            due.append(wanted[-1])
    if untold and untold[-1]["event"] == "resolved" and (due or last_told is not None):
        due.append(untold[-1])
    return due


def _reason(error: requests.RequestException) -> str:
    cause = error.args[0] if error.args else None
    reason = getattr(cause, "reason", None)
    if reason is None:
        return ""
    text = first_line(str(reason).rpartition(": ")[2])
    return f": {text}" if text else ""
