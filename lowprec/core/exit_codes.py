"""Exit codes. A command that proves nothing exits with 0 when its work is done."""

__all__ = ["ERROR", "INTERRUPTED", "STATES", "TERMINATED", "USAGE", "VERDICTS"]

ERROR, USAGE, INTERRUPTED, TERMINATED = 3, 64, 130, 143

VERDICTS = {"certified": 0, "rejected": 2, "inconclusive": 4}
"""Of a search or a verification."""

STATES = {"ok": 0, "warn": 1, "breach": 2, "error": ERROR, "insufficient_data": 4}
"""Of a run of the monitor."""
