"""The state of a deployment as a file that Prometheus's node exporter reads (its textfile collector)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from lowprec.monitor.judging.judge import SEVERITY

__all__ = ["write_textfile"]

# What a window's document has, under the names that dashboards use.
_GAUGES = {
    "lowprec_ne_gap_pct": ("gap_pct", "Relative change of normalized entropy in the last window, percent"),
    "lowprec_ne_gap_pct_lower": ("gap_lower_pct", "Lower end of its interval"),
    "lowprec_ne_gap_pct_upper": ("gap_upper_pct", "Upper end of its interval"),
    "lowprec_kl_gap_pct": ("kl_pct", "The same without labels, percent"),
    "lowprec_running_gap_pct": ("running_pct", "Gap over all windows since the deployment or the last breach, percent"),
    "lowprec_running_gap_pct_lower": ("running_lower_pct", "Lower end of its interval"),
    "lowprec_running_gap_pct_upper": ("running_upper_pct", "Upper end of its interval"),
    "lowprec_window_rows": ("num_rows", "Logged rows of the last window"),
}


def write_textfile(
    path: str,
    *,
    name: str,
    state: str,
    budget_pct: float,
    window: Mapping[str, Any] | None,
    last_success: datetime | None,
) -> None:
    """Write the file, whole or not at all; raises `OSError`.

    window: the row of the last window that was judged. last_success: when the monitor last did all that was due.
    Every series has the label `name`, that of the config, and the state one more with five values.
    """
    registry = CollectorRegistry()
    for metric, (key, text) in _GAUGES.items():
        value = None if window is None else window.get(key)
        gauge = Gauge(metric, text, ["name"], registry=registry)
        gauge.labels(name).set(math.nan if value is None else value)
    budget = Gauge("lowprec_budget_pct", "The gap that was promised, percent", ["name"], registry=registry)
    budget.labels(name).set(budget_pct)
    states = Gauge(
        "lowprec_state", "1 for the state of the deployment, 0 for the others", ["name", "state"], registry=registry
    )
    for known in SEVERITY:
        states.labels(name, known).set(float(known == state))
    if last_success is not None:
        gauge = Gauge(
            "lowprec_last_success_timestamp_seconds",
            "When the monitor last judged all windows that were due",
            ["name"],
            registry=registry,
        )
        gauge.labels(name).set(last_success.timestamp())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_to_textfile(path, registry)
