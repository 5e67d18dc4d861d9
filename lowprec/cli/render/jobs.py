"""Prints jobs on a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from rich.markup import escape
from rich.table import Table

from lowprec.cli.console import stdout

__all__ = ["job_commands", "render_job", "render_jobs", "render_submitted"]


def job_commands(document: Mapping[str, Any]) -> list[str]:
    """What can be done with a job from here, as it stands."""
    there = f"{document['job']} --address {document['address']}"
    if document["state"] in ("pending", "running"):
        return [f"lowprec submit {what} {there}" for what in ("logs --follow", "status", "stop")]
    commands = [f"lowprec submit logs {there}"]
    if run_id := document["run_id"]:
        commands.append(f"lowprec results --root {document['results_root']} --run {run_id}")
        if document["verdict"] is None and document["job_command"] == "search":
            commands.append(
                f"lowprec submit search CONFIG --resume {run_id} --address {document['address']}   (CONFIG: that of "
                f"{document['name']}, with the same --set)"
            )
    return commands


def render_submitted(document: Mapping[str, Any]) -> None:
    """A job that has just been sent."""
    stdout.print(f"job {document['job']} is on its way at {document['address']}")
    _render_commands(document)


def render_job(document: Mapping[str, Any]) -> None:
    """How a job stands, and what can be done with it."""
    began, ended = _moment(document["started_at"]), _moment(document["ended_at"])
    what = " ".join(part for part in (document["job_command"], document["name"]) if part) or "not a job of lowprec"
    run = f", run {document['run_id']}" if document["run_id"] else ""
    stdout.print(f"job {document['job']}: {escape(document['outcome'])}")
    stdout.print(f"    {escape(what)}{run}, began {began}" + (f", ended {ended}" if ended else ""))
    _render_commands(document)


def render_jobs(document: Mapping[str, Any]) -> None:
    """The jobs of a cluster, the latest last."""
    if not document["jobs"]:
        stdout.print(f"no job of lowprec at {document['address']} yet")
        return
    table = Table("job", "command", "config", "began", "outcome")
    for job in document["jobs"]:
        what = escape(job["job_command"]), escape(job["name"])
        table.add_row(job["job"], *what, _moment(job["started_at"]), escape(job["outcome"]))
    stdout.print(table)


def _render_commands(document: Mapping[str, Any]) -> None:
    for command in job_commands(document):
        stdout.print(f"    {escape(command)}")


def _moment(text: str | None) -> str:
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M:%S} UTC" if text else ""
