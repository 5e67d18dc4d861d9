"""The monitor: whether a deployed plan keeps its promise while traffic drifts."""

from lowprec.monitor.outcome import MonitorOutcome
from lowprec.monitor.run import run_monitor

__all__ = ["MonitorOutcome", "run_monitor"]
