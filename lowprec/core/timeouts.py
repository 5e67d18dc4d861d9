"""How long to wait for workers, in seconds, where nobody says otherwise."""

__all__ = ["HUNG_S", "START_S", "TASK_S"]

TASK_S, HUNG_S, START_S = 600.0, 30.0, 300.0
