"""The rule that a plan must meet on the search window, and what is known of it during a race.

A plan meets a budget where its *risk* is within the budget: the larger of its gap and its KL gap, plus half the width
of its interval. The labelled gap alone would pick the plans that label noise favours, and with an overfitted or badly
calibrated reference those whose gap is negative. The KL gap needs no labels.
"""

from __future__ import annotations

import math

from lowprec.evaluation.confidence import Interval
from lowprec.evaluation.estimate import PlanEstimate
from lowprec.evaluation.metrics import PlanMetrics

__all__ = ["known_risk", "risk_on_window", "risk_pct"]


def risk_pct(metrics: PlanMetrics) -> float:
    """The risk of a plan by what is known of it, in percent; infinite without an interval, NaN without a finite gap."""
    interval = metrics.gap_interval_pct
    return max(metrics.gap_pct, metrics.kl_pct) + (interval.upper - interval.lower) / 2


def risk_on_window(estimate: PlanEstimate) -> Interval:
    """Bounds of the risk that a plan would have if every slice of this window had been seen, in percent."""
    half = estimate.window_half_pct
    if not math.isfinite(half):
        return Interval(-math.inf, math.inf)
    gaps, divergences = estimate.on_window, estimate.kl_on_window
    return Interval(max(gaps.lower, divergences.lower) + half, max(gaps.upper, divergences.upper) + half)


def known_risk(metrics: PlanMetrics) -> Interval:
    """The risk of a plan that was evaluated on a whole window, as bounds that meet."""
    return Interval(risk_pct(metrics), risk_pct(metrics))
