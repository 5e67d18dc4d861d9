"""Search for the cheapest plan within budget, and its confirmation."""

from lowprec.search.job import SearchJob, open_job
from lowprec.search.record.outcome import SearchOutcome
from lowprec.search.search_run import run_search

__all__ = ["SearchJob", "SearchOutcome", "open_job", "run_search"]
