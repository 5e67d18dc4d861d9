"""The evidence that a verdict lacks, and the additional traffic that would provide it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lowprec.evaluation.metrics import PlanMetrics
from lowprec.evaluation.stats.bounds import MIN_EFFECTIVE_UNITS, normal_quantile
from lowprec.evaluation.stats.confidence import Verdict

__all__ = ["Shortfall", "shortfall"]

# More than so many times the traffic is out of reach, and the estimate of it is worth nothing.
MAX_FACTOR = 1_000.0


@dataclass(frozen=True)
class Shortfall:
    """Evidence found and needed.

    Units are examples, or the groups of `traffic.group`. num_units, effective_units: found in the window, all of them
    and as many equal ones as carry as much of the change; units_needed: of all, for a decision. factor: units_needed
    over num_units, at least 1. The numbers that depend on what is not known are lower bounds: None where more than
    `MAX_FACTOR` times the traffic is needed or nothing changed. days_needed: more of them, at the rate of the window.
    """

    unit: str
    num_units: int
    effective_units: float
    effective_needed: int
    units_needed: int | None
    examples_needed: int | None
    days_needed: float | None

    def sentence(self) -> str:
        """What is missing, for a person."""
        found = (
            f"{self.effective_units:,.0f} effective {self.unit} found (of {self.num_units:,}), "
            f"at least {self.effective_needed:,} needed"
        )
        if self.effective_units == 0:
            return f"{found}: no logit changed in this window, so it says nothing about the plan"
        if self.examples_needed is None or self.units_needed is None:
            return f"{found}: a decision needs more than {MAX_FACTOR:,.0f} times this traffic; the gap is at the budget"
        groups = "" if self.unit == "examples" else f" ({self.units_needed - self.num_units:,} more groups)"
        days = "" if self.days_needed is None else f", about {_number(self.days_needed)} more days at the current rate"
        return f"{found}: a decision needs about {self.examples_needed:,} more examples{groups}{days}"

    def to_dict(self) -> dict[str, Any]:
        """For documents."""
        return dict(vars(self))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def shortfall(
    metrics: PlanMetrics, budget_pct: float, verdict: Verdict, *, days: float | None = None, by_group: bool = False
) -> Shortfall | None:
    """What an inconclusive verdict lacks; None for other verdicts.

    A decision needs units enough for bounds, and a bound that is nearer to the gap than the budget is: its distance
    falls with the square root of the number of units. days: the length of the window.
    """
    if verdict != "inconclusive":
        return None
    n, effective = metrics.num_units, metrics.effective_units
    factors = [MIN_EFFECTIVE_UNITS / effective if n and effective > 0 else math.inf]
    distance = abs(metrics.gap_pct - budget_pct)
    bounds = metrics.gap_interval_pct
    half = bounds.upper - metrics.gap_pct if metrics.gap_pct <= budget_pct else metrics.gap_pct - bounds.lower
    if not math.isfinite(half):
        half = normal_quantile(metrics.confidence) * metrics.standard_error_pct
    if math.isfinite(half) and n:
        factors.append((half / distance) ** 2 if distance else math.inf)
    factor = max(1.0, *factors)
    is_known = factor <= MAX_FACTOR
    needed = math.ceil(factor * n) if is_known else None
    return Shortfall(
        unit="groups" if by_group else "examples",
        num_units=n,
        effective_units=effective,
        effective_needed=MIN_EFFECTIVE_UNITS,
        units_needed=needed,
        examples_needed=math.ceil((factor - 1) * metrics.num_examples) if is_known else None,
        days_needed=(factor - 1) * days if is_known and days is not None else None,
    )
