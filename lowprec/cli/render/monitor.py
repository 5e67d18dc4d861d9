"""Prints the report of the monitor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from lowprec.cli.console import stdout
from lowprec.cli.render.text import gap_text, number
from lowprec.core.sizes import bytes_text

__all__ = ["render_monitor"]

STATE_STYLE = {"ok": "green", "warn": "yellow", "breach": "red", "insufficient_data": "yellow", "error": "red"}
# Further windows of a backfill are in the results.
MAX_WINDOWS = 24


def render_monitor(document: Mapping[str, Any]) -> None:
    """The windows that were judged, the last one in full, and the state."""
    windows = document["windows"]
    if windows:
        _render_windows(document)
        _render_last(windows[-1])
        proposed = next((w for w in reversed(windows) if w["proposal"]), None)
        if proposed is not None:
            _render_proposal(proposed)
    for told in document["told"]:
        where = told.get("to") or f"{told['event']} alert of {told['window']}"
        stdout.print(escape(f"{told['channel']}: {where}" + (f": {told['failed']}" if told["failed"] else "")))
    state, now = document["state"], document["current_state"]
    stdout.print(
        f"[{STATE_STYLE[state]}]{state}[/] against a budget of {document['budget_pct']:g} %: "
        + escape(document["message"])
    )
    if now != state:
        stdout.print(f"since then [{STATE_STYLE[now]}]{now}[/]: that is the state of the deployment now")


def _render_windows(document: Mapping[str, Any]) -> None:
    windows = document["windows"]
    table = Table(
        title=f"{document['name']}: {len(windows)} windows judged now, of {document['num_windows']}",
        title_justify="left",
    )
    for name in ("window", "examples", "gap", "KL gap", "over all so far", "state"):
        table.add_column(name, no_wrap=True)
    for window in windows[-MAX_WINDOWS:]:
        state = window["state"]
        table.add_row(
            window["window"] + (f" (version {window['version']})" if window["version"] else ""),
            number(window["num_labelled"], "{:,}"),
            gap_text(window),
            number(window["kl_pct"], "{:+.4f} %"),
            gap_text(window, "running"),
            f"[{STATE_STYLE[state]}]{state}[/]",
        )
    stdout.print(table)
    if len(windows) > MAX_WINDOWS:
        stdout.print(f"and {len(windows) - MAX_WINDOWS} windows before these: lowprec results")


def _render_last(window: Mapping[str, Any]) -> None:
    for reason in (*window["reasons"], *window["warnings"]):
        stdout.print(f"{window['window']}: {escape(reason)}")
    if window["units"]:
        worst = ", ".join(
            f"{u['unit']} ({u['precision']}) {number(u['growth_pct'], '{:+.4f}')} to {number(u['kl_pct'], '{:.4f}')} %"
            for u in window["units"][:3]
        )
        stdout.print(f"KL gap by unit, by how much it grew since the plan was certified: {worst}")
    moved = [f for f in window["inputs"] if f["is_warning"]]
    for feature in moved:
        shares = [f"{name} {feature[name]:.3f}" for name in ("unseen", "cold", "churn") if name in feature]
        stdout.print(
            f"moved: {feature['feature']}, distance {feature['distance']:.3f}, p {feature['p_value']:.2g}"
            + _step_text(feature)
            + (f" ({', '.join(shares)})" if shares else "")
        )


def _step_text(feature: Mapping[str, Any]) -> str:
    if "normal_step" not in feature or "step" not in feature:
        return ""
    return f", {feature['step']:.3f} from the nearest earlier window ({feature['normal_step']:.3f} is normal)"


def _render_proposal(window: Mapping[str, Any]) -> None:
    proposal = window["proposal"]
    changes = ", ".join(f"{unit} {before} to {after}" for unit, (before, after) in proposal["changes"].items())
    stdout.print(
        f"proposed: {changes}; {bytes_text(proposal['added_bytes'])} more, gap {proposal['promised_pct']:+.4f} % "
        f"instead of {proposal['promised_now_pct']:+.4f} % (by the profile of {window['window']}). To try it there:"
    )
    stdout.print(f"  lowprec verify CONFIG {escape(proposal['verify'])}", soft_wrap=True)
