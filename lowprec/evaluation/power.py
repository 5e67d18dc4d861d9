"""What a window can certify: of a plan that was judged on it, and of plans before anything was judged."""

from __future__ import annotations

import math

from lowprec.evaluation.bounds import normal_quantile
from lowprec.evaluation.metrics import PlanMetrics

__all__ = ["certifiable_kl_pct", "certifiable_pct"]


def certifiable_pct(metrics: PlanMetrics) -> float | None:
    """The smallest budget (percent) that the window certifies the plan for; None with too little evidence.

    That is the upper bound of the gap, or 0 where even that is below.
    """
    upper = metrics.gap_interval_pct.upper
    return max(upper, 0.0) if math.isfinite(upper) else None


def certifiable_kl_pct(budget_pct: float, *, num_examples: int, loss: float, confidence: float) -> float:
    """The largest KL gap (percent) that a window of independent examples certifies with a probability of one half.

    loss: the reference's mean loss, in nats, taken for its entropy too: the reference is calibrated then, and the gap
    that labels show is the KL gap and label noise. The changes of the loss have the variance 2 k for a mean KL
    divergence of k nats, so the bound is k + z sqrt(2 k / n) <= budget * loss, solved for sqrt(k).
    """
    if num_examples <= 0 or loss <= 0:
        return 0.0
    half = normal_quantile(confidence) * math.sqrt(2 / (num_examples * loss)) / 2
    root = -half + math.sqrt(half**2 + budget_pct / 100)
    return 100 * root**2
