"""Finding the cheapest plan within budget, and proving it."""

from lowprec.search.job import Job, open_job, open_workers
from lowprec.search.outcome import SearchOutcome
from lowprec.search.run import run_search
from lowprec.search.verify import Verification, verify_plan

__all__ = ["Job", "SearchOutcome", "Verification", "open_job", "open_workers", "run_search", "verify_plan"]
