"""The monitor: whether a deployed plan stays within its budget while traffic drifts."""

from lowprec.monitor.monitor_run import run_monitor
from lowprec.monitor.outcome import MonitorOutcome

__all__ = ["MonitorOutcome", "run_monitor"]
