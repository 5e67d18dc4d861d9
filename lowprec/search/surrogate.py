"""What the profile promises: the quadratic model of a search, its fronts, and the plans worth an exact evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowprec.evaluation.confidence import radius
from lowprec.evaluation.measure import MeasuredProfile
from lowprec.evaluation.profile import Profile
from lowprec.plan import Plan
from lowprec.search.costs import Costs
from lowprec.search.proxy import ProxyFront, ProxyPoint, build_proxy
from lowprec.search.shrinkage import FirstOrder, shrunk_first_order
from lowprec.search.space import SearchSpace
from lowprec.search.study import Known
from lowprec.search.sweep import solve_front

__all__ = ["Surrogate", "build_surrogate"]

Float = NDArray[np.float64]

# Points of a front that the sampler is told of.
MAX_TOLD = 48


@dataclass(frozen=True)
class Surrogate:
    """The profile of a search with its first-order sums shrunk, and what the quadratic model says is best.

    `front` is over cost and promised gap. A certificate asks for more than a small gap: the upper end of its interval,
    which grows with the KL gap of the plan. `secure` has for each budget the front over cost and an upper end that is
    linear in the KL gap, with the slope `caution` that it has where it meets the budget.
    """

    measured: MeasuredProfile
    first_order: FirstOrder
    costs: Costs
    confidence: float
    front: ProxyFront
    secure: Mapping[float, ProxyFront]
    caution: Mapping[float, float]

    @property
    def profile(self) -> Profile:
        """The profile itself."""
        return self.measured.profile

    def promised_pct(self, plans: Sequence[Plan]) -> Float:
        """The gap that the profile promises for each plan, in percent."""
        return self._promised(plans)[0]

    def excess(self, plans: Sequence[Plan]) -> Float:
        """By how much each plan is above the front of the loosest budget at its cost, in percent."""
        budget = max(self.secure)
        points = self.secure[budget].points
        costs = np.array([point.cost for point in points])
        ends = np.array([point.gap_pct for point in points])
        own = np.array([self.costs.cost(plan) for plan in plans])
        at = np.clip(np.searchsorted(costs, own, side="right") - 1, 0, len(costs) - 1)
        promised, kl = self._promised(plans)
        return np.asarray(promised + self.caution[budget] * kl - ends[at])

    def told(self) -> list[Known]:
        """Points of the fronts for the sampler, evenly spread along them."""
        each = max(1, MAX_TOLD // len(self.secure))
        points = [p for front in self.secure.values() for p in _spread(front.points, each)]
        plans = list(dict.fromkeys(p.plan for p in points))
        promised = self.promised_pct(plans)
        return [Known(plan, self.costs.cost(plan), float(gap)) for plan, gap in zip(plans, promised, strict=True)]

    def candidates(self, count: int) -> list[Plan]:
        """Up to `count` plans: two thirds around the budgets, the others spread along the front of promised gaps.

        Around a budget they are those whose predicted upper end is spread evenly, on a log scale, from a quarter of the
        budget to double.
        """
        around = -(-2 * count // (3 * len(self.secure)))
        chosen: dict[Plan, None] = {}
        for budget, front in self.secure.items():
            plans = [point.plan for point in front.points]
            upper = self._upper_pct(plans)
            for k in range(around):
                target = budget * 2 ** (-2 + 3 * k / max(around - 1, 1))
                within = np.flatnonzero(upper <= target)
                if len(within):
                    chosen.setdefault(plans[int(within[0])])
        for point in _spread(self.front.points, count):
            if len(chosen) >= count:
                break
            chosen.setdefault(point.plan)
        return list(chosen)[:count]

    def _promised(self, plans: Sequence[Plan]) -> tuple[Float, Float]:
        z = self.profile.selected(plans)
        shrunk = np.pad(self.first_order.sums, (0, z.shape[1] - len(self.first_order.sums)))
        return self.profile.gaps_pct(z, shrunk)

    def _upper_pct(self, plans: Sequence[Plan]) -> Float:
        """The upper end that the interval of each plan will have if its gap is what is promised."""
        intervals = self.profile.intervals_pct(self.profile.selected(plans), confidence=self.confidence)
        return np.asarray(self.promised_pct(plans) + np.array([(i.upper - i.lower) / 2 for i in intervals]))


def build_surrogate(
    measured: MeasuredProfile, space: SearchSpace, costs: Costs, *, budgets: Sequence[float], confidence: float
) -> Surrogate:
    """The quadratic model of a profile over a space, solved."""
    profile = measured.profile
    first_order = shrunk_first_order(profile)
    num_columns = len(profile.columns)
    percent = 100 / profile.loss if profile.loss else 0.0
    second = profile.second.dense()[:num_columns, :num_columns] * percent

    def solved(caution: float) -> ProxyFront:
        return solve_front(
            build_proxy(
                space,
                profile.columns,
                first_order.sums * percent,
                second * (1 + caution),
                cost=costs.unit_cost,
                limits=costs.limits,
            )
        )

    caution = {budget: _slope_of_upper_end(profile, budget, confidence) for budget in sorted(budgets)}
    return Surrogate(
        measured=measured,
        first_order=first_order,
        costs=costs,
        confidence=confidence,
        front=solved(0.0),
        secure={budget: solved(slope) for budget, slope in caution.items()},
        caution=caution,
    )


def _slope_of_upper_end(profile: Profile, budget_pct: float, confidence: float) -> float:
    """How fast half the width of a plan's interval grows with its KL gap, where KL gap and half width fill the budget.

    The first-order sum of a plan has about the variance z Q z (E[r^2] = h where the reference is calibrated), which is
    twice the sum of its KL divergence: half the width is c sqrt(2 k / Y) for a KL gap k, as fractions of the loss Y.
    """
    if profile.loss <= 0 or profile.num_rows == 0:
        return 0.0
    c = radius(profile.num_rows, 1 - confidence, tuned_for=profile.num_rows) * math.sqrt(profile.num_rows)
    factor = c * math.sqrt(2 / profile.loss)
    budget = budget_pct / 100
    root = (-factor + math.sqrt(factor**2 + 4 * budget)) / 2
    return factor / (2 * root)


def _spread(points: Sequence[ProxyPoint], count: int) -> list[ProxyPoint]:
    """Up to `count` points at even steps of the logarithm of cost, both ends included."""
    if len(points) <= count:
        return list(points)
    costs = np.log(np.maximum([point.cost for point in points], 1e-9))
    targets = np.linspace(costs[0], costs[-1], count)
    return [points[k] for k in dict.fromkeys(int(np.argmin(np.abs(costs - t))) for t in targets)]
