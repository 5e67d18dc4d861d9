"""Default timeouts of workers, in seconds."""

__all__ = ["HUNG_S", "START_S", "TASK_S"]

TASK_S, HUNG_S, START_S = 600.0, 30.0, 300.0
