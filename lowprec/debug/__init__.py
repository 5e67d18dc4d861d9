"""Where numeric error comes from."""

from lowprec.debug.compare import Comparison, compare_plans
from lowprec.debug.debug_run import debug_plan
from lowprec.debug.report import Change, DebugReport, Suspect, UnitReport

__all__ = ["Change", "Comparison", "DebugReport", "Suspect", "UnitReport", "compare_plans", "debug_plan"]
