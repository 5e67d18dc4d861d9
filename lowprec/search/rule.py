"""What a search expects the confirm window to say of a plan: the rule by which it chooses.

On the search window nothing is promised, so nothing is tested there. A plan meets a budget where its *risk* is within
the budget: the larger of its expected gap and its KL gap, plus what the confirm window takes for chance, which is the
standard error that the gap will have there times the quantile of its one-sided bound. Such a plan is certified with a
probability of about one half; a plan with less risk is certified more often.

The expected gap is that of the search window without the label noise that is in it (see `shrinkage`): the measured gap
alone would pick the plans that label noise favours. The KL gap needs no labels, and keeps a reference that is
overfitted or badly calibrated from making plans look better than fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from scipy import special

from lowprec.evaluation.bounds import MIN_EFFECTIVE_UNITS, normal_quantile
from lowprec.evaluation.confidence import Interval
from lowprec.evaluation.estimate import PlanEstimate
from lowprec.evaluation.metrics import PlanMetrics
from lowprec.search.trial import Trial

__all__ = ["Forecast"]


@dataclass(frozen=True)
class Forecast:
    """How the confirm window will judge what was measured on the search window.

    quantile: standard errors between a gap and its upper bound there. scale: a standard error there over the same one
    here, from the numbers of their examples. block_effect: the factor by which time blocks raise standard errors. It is
    one number for all plans, because that of a single plan is mostly chance.
    """

    quantile: float
    scale: float
    block_effect: float = 1.0

    @classmethod
    def of(cls, *, confidence: float, num_search: int, num_confirm: int) -> Forecast:
        """Of windows with these numbers of examples; confidence: that of the first plans confirmed."""
        scale = math.sqrt(num_search / num_confirm) if num_confirm else math.inf
        return cls(normal_quantile(confidence), scale)

    def at(self, confidence: float) -> Forecast:
        """The same with bounds at another confidence."""
        return replace(self, quantile=normal_quantile(confidence))

    @property
    def deviations(self) -> float:
        """How far the upper bound will be above the gap, in standard errors of independent units on this window."""
        return self.quantile * self.scale * self.block_effect

    def half_width_pct(self, metrics: PlanMetrics) -> float:
        """How far above its gap the upper bound of a plan will be, in percent; infinite with too little evidence."""
        if not math.isfinite(metrics.standard_error_pct):
            return math.inf
        # The reference itself has no error.
        if metrics.standard_error_pct > 0 and metrics.effective_units < MIN_EFFECTIVE_UNITS * self.scale**2:
            return math.inf
        return self.deviations * metrics.standard_error_pct

    def risk_pct(self, trial: Trial) -> float:
        """The risk of a plan in percent; NaN without a finite gap."""
        metrics = trial.metrics
        expected = metrics.gap_pct if trial.expected_pct is None else trial.expected_pct
        return max(expected, metrics.kl_pct) + self.half_width_pct(metrics)

    def risk_on_window(self, estimate: PlanEstimate, correction_pct: float) -> Interval:
        """Bounds of the risk that a plan would have if every slice of the search window had been seen, in percent.

        correction_pct: the expected gap less the measured one.
        """
        half = self.half_width_pct(estimate.metrics)
        gaps, divergences = estimate.on_window, estimate.kl_on_window
        if not math.isfinite(half) or not math.isfinite(gaps.upper):
            return Interval(-math.inf, math.inf)
        return Interval(
            max(gaps.lower + correction_pct, divergences.lower) + half,
            max(gaps.upper + correction_pct, divergences.upper) + half,
        )

    def chance(self, trial: Trial, budget_pct: float) -> float:
        """The probability that the confirm window certifies a plan: both windows have their own chance errors."""
        risk = self.risk_pct(trial)
        deviation = trial.metrics.standard_error_pct * self.block_effect * math.hypot(1.0, self.scale)
        if not math.isfinite(risk) or not deviation > 0:
            return float(risk <= budget_pct)
        return float(special.ndtr((budget_pct - risk) / deviation))
