"""Finding the cheapest plan within budget, and proving it."""

from lowprec.search.job import SearchJob, open_job
from lowprec.search.record.outcome import SearchOutcome
from lowprec.search.search_run import run_search

__all__ = ["SearchJob", "SearchOutcome", "open_job", "run_search"]
