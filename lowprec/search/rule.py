"""The rule by which a search chooses plans: a forecast of the verdict on the confirm window.

Nothing is tested on the search window. A plan meets a budget if its *risk* is within the budget. The risk is the larger
of its expected gap and its KL gap, plus the margin of the one-sided bound on the confirm window. The margin is the
expected standard error there times the quantile. A plan whose risk equals the budget is certified with a probability of
about one half.

The expected gap is the measured gap without its label noise (see `shrinkage`). The measured gap alone would favour
plans that profit from label noise. The KL gap needs no labels. It keeps an overfitted or badly calibrated reference
from making plans look better than fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from scipy import special

from lowprec.evaluation.metrics import PlanMetrics
from lowprec.evaluation.race.estimate import PlanEstimate
from lowprec.evaluation.stats.bounds import MIN_EFFECTIVE_UNITS, normal_quantile
from lowprec.evaluation.stats.confidence import Interval
from lowprec.search.record.trial import Trial

__all__ = ["Forecast"]


@dataclass(frozen=True)
class Forecast:
    """A forecast of bounds on the confirm window, from what was measured on the search window.

    quantile: standard errors between a gap and its upper bound. scale: standard error on the confirm window over the
    standard error on the search window, from the numbers of examples. block_effect: factor by which correlation in time
    raises standard errors. It is shared by all plans, because the estimate for a single plan is mostly noise.
    """

    quantile: float
    scale: float
    block_effect: float = 1.0

    @classmethod
    def of(cls, *, confidence: float, num_search: int, num_confirm: int) -> Forecast:
        """The forecast for windows with these numbers of examples and one-sided bounds at `confidence`."""
        scale = math.sqrt(num_search / num_confirm) if num_confirm else math.inf
        return cls(normal_quantile(confidence), scale)

    def at(self, confidence: float) -> Forecast:
        """The same forecast with bounds at another confidence."""
        return replace(self, quantile=normal_quantile(confidence))

    @property
    def deviations(self) -> float:
        """The margin of the upper bound, in standard errors of independent units on the search window."""
        return self.quantile * self.scale * self.block_effect

    def margin_pct(self, metrics: PlanMetrics) -> float:
        """The margin of a plan's upper bound, in percent; infinite without enough effective units."""
        if not math.isfinite(metrics.standard_error_pct):
            return math.inf
        # The gap of the reference is zero without error.
        if metrics.standard_error_pct > 0 and metrics.effective_units < MIN_EFFECTIVE_UNITS * self.scale**2:
            return math.inf
        return self.deviations * metrics.standard_error_pct

    def risk_pct(self, trial: Trial) -> float:
        """The risk of a plan in percent; NaN without a finite gap."""
        metrics = trial.metrics
        expected = metrics.gap_pct if trial.expected_pct is None else trial.expected_pct
        return max(expected, metrics.kl_pct) + self.margin_pct(metrics)

    def risk_on_window(self, estimate: PlanEstimate, correction_pct: float) -> Interval:
        """Bounds of a plan's risk if all slices of the search window were evaluated, in percent.

        correction_pct: expected gap minus measured gap.
        """
        half = self.margin_pct(estimate.metrics)
        gaps, divergences = estimate.on_window, estimate.kl_on_window
        if not math.isfinite(half) or not math.isfinite(gaps.upper):
            return Interval(-math.inf, math.inf)
        return Interval(
            max(gaps.lower + correction_pct, divergences.lower) + half,
            max(gaps.upper + correction_pct, divergences.upper) + half,
        )

    def probability(self, trial: Trial, budget_pct: float) -> float:
        """The probability that the confirm window certifies a plan, given the sampling errors of both windows."""
        risk = self.risk_pct(trial)
        deviation = trial.metrics.standard_error_pct * self.block_effect * math.hypot(1.0, self.scale)
        if not math.isfinite(risk) or not deviation > 0:
            return float(risk <= budget_pct)
        return float(special.ndtr((budget_pct - risk) / deviation))
