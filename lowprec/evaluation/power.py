"""The power of a window: the smallest budget or the largest KL gap that it can certify."""

from __future__ import annotations

import math

from lowprec.evaluation.metrics import PlanMetrics
from lowprec.evaluation.stats.bounds import normal_quantile

__all__ = ["certifiable_kl_pct", "certifiable_pct"]


def certifiable_pct(metrics: PlanMetrics) -> float | None:
    """The smallest budget (percent) for which the window certifies the plan; None without an upper bound.

    This is the upper bound of the gap, or 0 if the bound is negative.
    """
    upper = metrics.gap_interval_pct.upper
    return max(upper, 0.0) if math.isfinite(upper) else None


def certifiable_kl_pct(budget_pct: float, *, num_examples: int, loss: float, confidence: float) -> float:
    """The largest KL gap (percent) that a window of independent examples certifies with a probability of one half.

    For a calibrated reference the expected gap equals the KL gap, and loss changes have a variance of 2 k for a mean KL
    divergence of k nats. So k + z sqrt(2 k / n) <= budget * loss is solved for k.

    Args:
        budget_pct: The accuracy budget in percent.
        num_examples: Examples n of the window.
        loss: Mean loss of the reference in nats, which equals its mean entropy if it is calibrated.
        confidence: Of the one-sided bound.
    """
    if num_examples <= 0 or loss <= 0:
        return 0.0
    half = normal_quantile(confidence) * math.sqrt(2 / (num_examples * loss)) / 2
    root = -half + math.sqrt(half**2 + budget_pct / 100)
    return 100 * root**2
