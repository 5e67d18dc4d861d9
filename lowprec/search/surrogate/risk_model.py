"""The risk of a plan as predicted from the profile (see `rule`).

With the first-order sums a, Q and the evidence E of a profile, a plan z has the gap a z + 1/2 z Q z, the KL gap
1/2 z Q z, and a standard error that grows with sqrt(z E z). So the risk follows from quadratic forms. The sums a are
those without their label noise (see `shrinkage`): the gap is the one that is expected of later traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowprec.evaluation.profile.profile import Profile
from lowprec.plan import Plan
from lowprec.search.rule import Forecast
from lowprec.search.surrogate.front_solver import EveryPlan
from lowprec.search.surrogate.proxy import Float, build_proxy

__all__ = ["RiskModel"]


@dataclass(frozen=True, eq=False)
class RiskModel:
    """Predicted risks, in percent.

    first: the first-order sums, float64[D].
    """

    profile: Profile
    first: Float
    forecast: Forecast

    def half_widths(self, plans: Sequence[Plan]) -> Float:
        """How far the upper bound of each plan will be above its gap, float64[P]."""
        ahead = np.pad(self.profile.selected(plans), ((0, 0), (0, 1)))
        return self._half_widths(self.profile.evidence.quadratic(ahead))

    def risks(self, plans: Sequence[Plan]) -> Float:
        """The risk of each plan, float64[P]."""
        gaps, divergences = self.profile.gaps_pct(self.profile.selected(plans), self.first)
        return np.asarray(np.maximum(gaps, divergences) + self.half_widths(plans))

    def risks_of_all(self, every: EveryPlan) -> Float:
        """The risk of every plan of a small space, with the gaps of `every.model`."""
        gap_model, profile = every.model, self.profile
        k = len(profile.columns)
        spread = build_proxy(
            gap_model.space,
            profile.columns,
            np.zeros(k),
            2 * profile.evidence.dense()[:k, :k],  # a proxy halves its second-order terms
            cost=lambda unit, precision: 0.0,
        )
        gap = every.totals(gap_model.own, gap_model.second)
        divergence = (gap - every.totals(gap_model.first, None)) * (profile.loss / profile.entropy)
        variance = every.totals(spread.own, spread.second)
        return np.asarray(np.maximum(gap, divergence) + self._half_widths(variance))

    def _half_widths(self, variance: Float) -> Float:
        return np.asarray(100 * self.forecast.deviations * np.sqrt(np.maximum(variance, 0.0)) / self.profile.loss)
