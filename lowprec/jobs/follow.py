"""Stays with a job until it is over, also over a connection that comes and goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowprec.core.errors import ConfigError, JobError, LowprecError
from lowprec.jobs.client import STOP_WAIT_S, JobsApi
from lowprec.jobs.job import JobLog, SubmittedJob, run_in_log

__all__ = ["FollowedJob", "follow_job", "stop_job"]

POLL_S = 1.0
# A log comes whole every time. Where that takes long it is asked for less often, to take a twentieth of the time.
POLL_TO_REQUEST = 20.0
MAX_POLL_S = 30.0
# A log may be unreadable for a moment, also for the one in which the job ends.
LAST_READS = 5
# Of a forwarded port, or a head node that restarts behind a service; then it is for the user to look.
LOST_AFTER_S = 30.0
# After the time that the job has to stop by itself, Ray kills it.
STOPPED_AFTER_S = STOP_WAIT_S + 30.0


@dataclass(frozen=True)
class FollowedJob:
    """A job that is over: what it printed with `--json`, and which run it was, where it came to that."""

    job: SubmittedJob
    document: dict[str, Any] | None
    run_id: str | None


def follow_job(
    api: JobsApi,
    submission_id: str,
    *,
    on_log: Callable[[str], None],
    on_lost: Callable[[str], None],
    lost_after_s: float = LOST_AFTER_S,
) -> FollowedJob:
    """Wait for the end of a job and pass on its log as it grows.

    on_lost: told the reason, once each time that the connection breaks; it is tried again for `lost_after_s` seconds,
    and then `JobError` is raised. That says nothing of the job, which goes on without us.
    """
    log, reads_left = JobLog(), LAST_READS
    lost_since: float | None = None
    job: SubmittedJob | None = None
    while True:
        began = time.monotonic()
        try:
            job = api.job(submission_id)
            text = api.log(submission_id)
        except ConfigError as error:
            if job is None:
                raise
            raise _lost(api, submission_id, _reason(error), run_in_log(log.text)) from None  # another cluster
        except JobError as error:
            reason = _reason(error)
            if lost_since is None:
                lost_since = began
                on_lost(reason)
            if time.monotonic() - lost_since > lost_after_s:
                raise _lost(api, submission_id, reason, run_in_log(log.text)) from None
        else:
            lost_since = None
            if text is not None:
                on_log(log.grown(text, is_over=job.is_over))
            if job.is_over:
                reads_left -= 1
                if text is not None or not reads_left:
                    return FollowedJob(job, log.document, run_in_log(log.text))
        time.sleep(_pause(time.monotonic() - began) if lost_since is None else POLL_S)


def stop_job(api: JobsApi, submission_id: str) -> SubmittedJob:
    """Stop a job and wait until it is over; one that is over already stays as it is."""
    job = api.job(submission_id)
    if not job.is_over:
        api.stop(submission_id)
    deadline = time.monotonic() + STOPPED_AFTER_S
    while not job.is_over:
        if time.monotonic() > deadline:
            raise JobError(
                f"job {submission_id}: is {job.state} {STOPPED_AFTER_S:.0f} s after it was told to stop; look at it: "
                f"lowprec submit status {submission_id} --address {api.address}"
            )
        time.sleep(POLL_S)
        job = api.job(submission_id)
    return job


def _pause(request_s: float) -> float:
    """How long to wait after a request that took so long."""
    return min(max(POLL_S, POLL_TO_REQUEST * request_s), MAX_POLL_S)


def _reason(error: LowprecError) -> str:
    """What is wrong, without what to do about it."""
    return str(error).partition(";")[0]


def _lost(api: JobsApi, submission_id: str, reason: str, run_id: str | None) -> JobError:
    look = f"lowprec submit logs {submission_id} --follow --address {api.address}"
    resume = f"; if it is gone with its cluster, go on with: lowprec submit search CONFIG --resume {run_id}"
    return JobError(
        f"lost job {submission_id}, which may still run: {reason}; look at it with: {look}{resume if run_id else ''}"
    )
