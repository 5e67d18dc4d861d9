"""Results: append-only Delta tables, and SQL over them."""

from lowprec.results.query import latest_front, query, query_arrow, sensitivity_report
from lowprec.results.store import ResultsStore

__all__ = ["ResultsStore", "latest_front", "query", "query_arrow", "sensitivity_report"]
