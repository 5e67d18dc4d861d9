"""`lowprec submit`: commands as jobs of a Ray cluster."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import click

from lowprec.cli.command import command, show

if TYPE_CHECKING:
    from lowprec.config import Config
    from lowprec.jobs import JobsApi, SubmittedJob

__all__ = ["as_job", "submit"]


@click.group("submit")
def submit() -> None:
    """Run a search, a verification or the monitor as a job of a Ray cluster, look after it, stop it.

    What CONFIG names by path has to lie where the cluster's machines see it: at a URL, or on a shared file system.
    """


_command = functools.partial(command, submit, under="submit ")

_address = click.option(
    "--address",
    metavar="URL",
    help="Of the cluster's dashboard, http://HOST:8265 [default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, this machine].",
)


def as_job(
    original: Any, *, leave_out: Collection[str] = (), check: Callable[[Mapping[str, Any]], object] | None = None
) -> None:
    """Add `lowprec submit NAME` for a command of CONFIG, with the options that the command has, but for some.

    check: raises where the values of the options, by name, are wrong together, before anything is sent.
    """
    options = [p for p in original.params if isinstance(p, click.Option) and p.name not in leave_out]
    options = [p for p in options if p.name not in ("overrides", "as_json", "debug")]

    @_command(original.name)
    @_address
    @click.option("--follow", is_flag=True, help="Show the job's log, and end with its exit code.")
    @click.option("--python", metavar="PATH", help="Of the cluster [default: the one that has lowprec].")
    def run(config: Config, address: str | None, follow: bool, python: str | None, as_json: bool, **values: Any) -> int:
        if check is not None:
            check(values)
        given = {option.opts[0]: values[option.name] for option in options if option.name}
        given["--json"] = as_json  # the job then prints its document, which becomes part of ours
        return _submit(config, original.name, given, address=address, follow=follow, python=python)

    added: Any = run
    added.help = f"Submit `lowprec {original.name}`. {original.help.partition(chr(10))[0]}"
    added.params[1:1] = options


@_command("status", config=False)
@click.argument("job", required=False)
@_address
def status(job: str | None, address: str | None, as_json: bool) -> None:
    """How JOB stands; without, the jobs of lowprec that the cluster remembers."""
    from lowprec.cli import console, render
    from lowprec.jobs import run_in_log

    api = _jobs_api(address)
    if job is None:
        content: dict[str, Any] = {"address": api.address, "jobs": [found.to_dict() for found in api.jobs()]}
        show(console.json_document("submit status", content), as_json, render.render_jobs)
        return
    found = api.job(job)
    run_id = run_in_log(api.log(job) or "")
    show(console.json_document("submit status", _described(api, found, run_id)), as_json, render.render_job)


@_command("logs", config=False)
@click.argument("job")
@click.option("--follow", is_flag=True, help="Until the job is over; ends with its exit code.")
@_address
def logs(job: str, follow: bool, address: str | None, as_json: bool) -> int:
    """What JOB has printed so far."""
    from lowprec.cli import console
    from lowprec.core.errors import JobError

    api = _jobs_api(address)
    if follow:
        return _follow(api, job, "logs", as_json=as_json)
    api.job(job)
    log = api.log(job)
    if log is None:
        raise JobError(f"job {job}: the cluster at {api.address} cannot read its log; try again, or look there")
    content = {"job": job, "address": api.address, "log": log}
    show(console.json_document("submit logs", content), as_json, _print_log)
    return 0


@_command("stop", config=False)
@click.argument("job")
@_address
def stop(job: str, address: str | None, as_json: bool) -> None:
    """Stop JOB, as Ctrl-C would; what its run has committed stays."""
    from lowprec.cli import console, render
    from lowprec.jobs import run_in_log, stop_job

    api = _jobs_api(address)
    if api.job(job).is_over:
        _note(f"job {job} was over already")
    stopped = stop_job(api, job)
    content = _described(api, stopped, run_in_log(api.log(job) or ""))
    show(console.json_document("submit stop", content), as_json, render.render_job)


def _submit(
    config: Config, name: str, options: Mapping[str, Any], *, address: str | None, follow: bool, python: str | None
) -> int:
    from lowprec.cli import console, render
    from lowprec.jobs import stage_job

    as_json = bool(options["--json"])
    with stage_job(config, name, options, python=python) as staged:
        api = _jobs_api(address)
        for note in staged.notes(is_here=api.is_here):
            _note(note)
        submitted = api.submit(staged)
    if follow:
        return _follow(api, submitted.submission_id, name, as_json=as_json)
    content = _described(api, submitted, None)
    show(console.json_document(f"submit {name}", content), as_json, render.render_submitted)
    return 0


def _follow(api: JobsApi, submission_id: str, name: str, *, as_json: bool) -> int:
    """Show the log of a job on stderr until the job is over; returns its exit code."""
    from lowprec.cli import console, render
    from lowprec.jobs import follow_job

    _note(f"job {submission_id} at {api.address}; Ctrl-C leaves it running")
    try:
        followed = follow_job(
            api,
            submission_id,
            on_log=lambda text: click.echo(text, err=True, nl=False),
            on_lost=lambda reason: _note(f"{reason}; trying again"),
        )
    except KeyboardInterrupt:
        going_on = {"job": submission_id, "address": api.address, "state": "running"}
        _note("the job goes on; to follow it again, look at it, or stop it:")
        for line in render.job_commands(going_on):
            _note(f"    {line}")
        raise
    content = {**_described(api, followed.job, followed.run_id), "document": followed.document}
    show(console.json_document(f"submit {name}", content), as_json, render.render_job)
    return followed.job.result_code


def _print_log(document: dict[str, Any]) -> None:
    from lowprec.cli import console

    console.document_stream().write(document["log"])


def _jobs_api(address: str | None) -> JobsApi:
    from lowprec.jobs import JobsApi

    api = JobsApi(address)
    for note in api.notes:
        _note(note)
    return api


def _described(api: JobsApi, job: SubmittedJob, run_id: str | None) -> dict[str, Any]:
    return {"address": api.address, **job.to_dict(), "run_id": run_id}


def _note(text: str) -> None:
    """A line for people, on stderr."""
    from lowprec.cli import console

    console.stderr.print(text, style="dim", markup=False)
