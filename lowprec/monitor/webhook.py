"""Alerts posted to whoever pages people: once for an incident, again after a while, and when it is over."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from lowprec.config import WebhookConfig
from lowprec.errors import ConfigError, first_line
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
    return None if answer.ok else f"HTTP {answer.status_code} {answer.reason}"


def due_alerts(rows: Sequence[Mapping[str, Any]], states: Sequence[str], cooldown: int) -> list[Mapping[str, Any]]:
    """The rows of `alerts` that should be told now, one for each incident at most: its latest.

    cooldown: in the unit of the traffic's time. An incident that nobody was told of needs no telling when it is over.
    """
    told_at: dict[str, int] = {}
    for row in rows:
        if row["event"] == "told":
            told_at[row["incident"]] = max(told_at.get(row["incident"], row["window_start"]), row["window_start"])
    told = {row["alert_key"] for row in rows if row["event"] == "told"}
    latest: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["event"] in ("opened", "continues", "resolved"):
            latest[row["incident"]] = row
    due = []
    for incident, row in latest.items():
        before = told_at.get(incident)
        if row["alert_key"] in told:
            continue
        if row["event"] == "resolved":
            if before is not None:
                due.append(row)
        elif row["state"] in states and (
            before is None or row["event"] == "opened" or row["window_start"] - before >= cooldown
        ):
            due.append({**row, "event": "opened"} if before is None else row)
    return due


def _reason(error: requests.RequestException) -> str:
    cause = error.args[0] if error.args else None
    reason = getattr(cause, "reason", None)
    if reason is None:
        return ""
    text = first_line(str(reason).rpartition(": ")[2])
    return f": {text}" if text else ""
