"""What a command ends with. One that has nothing to prove ends with 0 when it has done what was asked."""

__all__ = ["ERROR", "INTERRUPTED", "USAGE", "VERDICTS"]

VERDICTS = {"certified": 0, "rejected": 2, "inconclusive": 4}
"""Of a search or a verification."""

ERROR, USAGE, INTERRUPTED = 3, 64, 130
