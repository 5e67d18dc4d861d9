"""Finding the cheapest plan within budget, and proving it."""

from lowprec.search.job import Job, open_job, open_workers
from lowprec.search.record.outcome import SearchOutcome
from lowprec.search.search_run import run_search

__all__ = ["Job", "SearchOutcome", "open_job", "open_workers", "run_search"]
