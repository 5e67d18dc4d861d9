"""Jobs on a Ray cluster, through Ray's Jobs API: what is sent, and how it is followed to its end."""

from lowprec.submit.client import JobsApi
from lowprec.submit.follow import FollowedJob, follow_job, stop_job
from lowprec.submit.job import SubmittedJob, run_in_log
from lowprec.submit.staging import StagedJob, stage_job

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
