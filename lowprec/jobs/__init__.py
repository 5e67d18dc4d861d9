"""Jobs on a Ray cluster, through Ray's Jobs API: what is sent, and how it is followed to its end."""

from lowprec.jobs.client import JobsApi
from lowprec.jobs.follow import FollowedJob, follow_job, stop_job
from lowprec.jobs.job import SubmittedJob, run_in_log
from lowprec.jobs.staging import StagedJob, stage_job

__all__ = [
    "FollowedJob",
    "JobsApi",
    "StagedJob",
    "SubmittedJob",
    "follow_job",
    "run_in_log",
    "stage_job",
    "stop_job",
]
