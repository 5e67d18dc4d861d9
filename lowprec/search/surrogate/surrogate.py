"""The surrogate: the quadratic model of a search, its fronts, and candidates for exact evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lowprec.evaluation.profile.profile import Profile
from lowprec.evaluation.profile.window_profile import MeasuredProfile
from lowprec.evaluation.stats.bounds import spread
from lowprec.evaluation.stats.confidence import Blocks
from lowprec.plan import Plan
from lowprec.search.proposals.study import Known
from lowprec.search.rule import Forecast
from lowprec.search.space.space import SearchSpace
from lowprec.search.surrogate.front_solver import MAX_EXHAUSTIVE, EveryPlan, solve_front
from lowprec.search.surrogate.proxy import ProxyFront, ProxyModel, ProxyPoint, build_proxy
from lowprec.search.surrogate.risk_model import RiskModel
from lowprec.search.surrogate.rule_front import solve_rule
from lowprec.search.surrogate.shrinkage import FirstOrder, shrunk_first_order
from lowprec.session.costs import Costs

__all__ = ["Surrogate", "build_surrogate"]

Float = NDArray[np.float64]

# Points of a front that the sampler begins with, and by which a front is judged.
MAX_ANCHORS = 48


@dataclass(frozen=True)
class Surrogate:
    """The profile of a search with its first-order sums shrunk, and what the quadratic model says is best.

    `front` is over cost and promised gap. `rule_front` is over cost and risk, by which the search chooses: the
    `gap_pct` of its points is a risk. `model` has the promised gaps, and the decisions of the space.
    """

    measured: MeasuredProfile
    first_order: FirstOrder
    costs: Costs
    risk: RiskModel
    budgets: tuple[float, ...]
    front: ProxyFront
    rule_front: ProxyFront
    model: ProxyModel

    @property
    def forecast(self) -> Forecast:
        """How the confirm window will judge, with the time blocks of this one."""
        return self.risk.forecast

    @property
    def profile(self) -> Profile:
        """The profile itself."""
        return self.measured.profile

    def corrections_pct(self, plans: Sequence[Plan]) -> Float:
        """What the promised gap of each plan has above the measured one: the label noise that was taken out."""
        return self.promised_pct(plans) - self.profile.gaps_pct(self.profile.selected(plans))[0]

    def promised_pct(self, plans: Sequence[Plan]) -> Float:
        """The gap that the profile promises for each plan, in percent."""
        z = self.profile.selected(plans)
        shrunk = np.pad(self.first_order.sums, (0, z.shape[1] - len(self.first_order.sums)))
        return self.profile.gaps_pct(z, shrunk)[0]

    def distance_to_front(self, plans: Sequence[Plan]) -> Float:
        """By how much the risk of each plan is above the front at its cost, in percent."""
        points = self.rule_front.points
        costs = np.array([point.cost for point in points])
        risks = np.array([point.gap_pct for point in points])
        own = np.array([self.costs.cost(plan) for plan in plans])
        at = np.clip(np.searchsorted(costs, own, side="right") - 1, 0, len(costs) - 1)
        return np.asarray(self.risk.risks(plans) - risks[at])

    def anchor_points(self) -> list[Known]:
        """Points of the front for the sampler to begin with, evenly spread along it."""
        points = _spread(self.rule_front.points, MAX_ANCHORS)
        return [Known(point.plan, point.cost, point.gap_pct) for point in points]

    def alternatives(self, plan: Plan | None) -> tuple[Float, Float, Callable[[int], Plan]]:
        """Cost and risk (float64[P] each) of plans that may be better than a given one, and the k-th of these plans.

        All of a small space; of a large one the front and what lies one decision away from the plan.
        """
        if self._every is not None:
            every, risks = self._every
            return every.cost, risks, lambda k: self.model.plan(every.picks(np.array([k]))[0].tolist())
        plans = [point.plan for point in self.rule_front.points]
        if plan is not None:
            free = self.model.space.free
            plans += [plan.replace(dict.fromkeys(d.units, p)) for d in free for p in d.choices]
        plans = [p for p in dict.fromkeys(plans) if self.costs.keeps_limits(p)]
        return np.array([self.costs.cost(p) for p in plans]), self.risk.risks(plans), plans.__getitem__

    @cached_property
    def _every(self) -> tuple[EveryPlan, Float] | None:
        """Every plan of a small space with its risk."""
        every = EveryPlan.of(self.model) if self.model.space.num_plans <= MAX_EXHAUSTIVE else None
        return None if every is None else (every, self.risk.risks_of_all(every))

    def candidates(self, count: int) -> list[Plan]:
        """Up to `count` plans: two thirds around the budgets, the others those that add most to the front.

        Around a budget they are those whose risk is spread evenly, on a log scale, from a quarter of the budget to
        double. The others are points of the front of promised gaps, each the one that adds most hypervolume.
        """
        around = -(-2 * count // (3 * len(self.budgets)))
        chosen: dict[Plan, None] = {}
        risks = np.array([point.gap_pct for point in self.rule_front.points])
        for budget in self.budgets:
            for k in range(around):
                target = budget * 2 ** (-2 + 3 * k / max(around - 1, 1))
                within = np.flatnonzero(risks <= target)
                if len(within):
                    chosen.setdefault(self.rule_front.points[int(within[0])].plan)
        gaps = self.promised_pct(list(chosen))
        taken = [(self.costs.cost(plan), float(gap)) for plan, gap in zip(chosen, gaps, strict=True)]
        for point in _most_hypervolume(self.front.points, taken, count - len(chosen)):
            chosen.setdefault(point.plan)
        return list(chosen)[:count]


def build_surrogate(
    measured: MeasuredProfile, space: SearchSpace, costs: Costs, *, budgets: Sequence[float], forecast: Forecast
) -> Surrogate:
    """The quadratic model of a profile over a space, solved; forecast: without the effect of time blocks."""
    profile = measured.profile
    first_order = shrunk_first_order(profile)
    num_columns = len(profile.columns)
    percent = 100 / profile.loss if profile.loss else 0.0
    second = profile.second.dense()[:num_columns, :num_columns] * percent
    promised = build_proxy(
        space, profile.columns, first_order.sums * percent, second, cost=costs.unit_cost, limits=costs.limits
    )
    front = solve_front(promised)
    # No plan shifts or scales the logits as a whole.
    first = np.pad(first_order.sums, (0, len(profile.first) - num_columns))
    forecast = replace(forecast, block_effect=_block_effect(profile, front))
    risk = RiskModel(profile, first, forecast)
    slopes = [_slope_of_upper_end(profile, budget, forecast.deviations) for budget in sorted(budgets)]
    return Surrogate(
        measured=measured,
        first_order=first_order,
        costs=costs,
        risk=risk,
        budgets=tuple(sorted(budgets)),
        front=front,
        rule_front=solve_rule(promised, risk, slopes) if front.points else front,
        model=promised,
    )


def _block_effect(profile: Profile, front: ProxyFront) -> float:
    """How much larger standard errors are for the time blocks of the window, as a median of plans of the front."""
    if not front.points:
        return 1.0
    z = profile.selected([point.plan for point in _spread(front.points, MAX_ANCHORS)])
    change, loss = profile.block_sums(z)
    found = [
        spread(m, Blocks(x, loss)).standard_error / alone
        for m, x in zip(profile.moments(z), change, strict=True)
        if (alone := spread(m).standard_error) > 0
    ]
    return float(np.median(found)) if found else 1.0


def _slope_of_upper_end(profile: Profile, budget_pct: float, deviations: float) -> float:
    """How fast half the width of a plan's interval grows with its KL gap, where KL gap and half width fill the budget.

    The first-order sum of a plan has about the variance z Q z (E[r^2] = h where the reference is calibrated), which is
    twice the sum of its KL divergence: half the width is c sqrt(2 k / Y) for a KL gap k, as fractions of the loss Y.
    """
    if profile.loss <= 0 or profile.num_rows == 0:
        return 0.0
    factor = deviations * math.sqrt(2 / profile.loss)
    budget = budget_pct / 100
    root = (-factor + math.sqrt(factor**2 + 4 * budget)) / 2
    return factor / (2 * root)


def _most_hypervolume(
    points: Sequence[ProxyPoint], taken: Sequence[tuple[float, float]], count: int
) -> list[ProxyPoint]:
    """Up to `count` points of a front, each the one that adds most to the area above those before it.

    The area is that of costs and gaps which some point beats, up to the corner of the least cost's gap and the least
    gap's cost. taken: costs and gaps of plans that are there already. The ends of the front come first.
    """
    if len(points) <= count:
        return list(points)
    costs = np.array([point.cost for point in points])
    gaps = np.array([point.gap_pct for point in points])
    steps = _staircase([*taken, (costs[0], gaps[0]), (costs[-1], gaps[-1])])
    found = [points[0], points[-1]][:count]
    while len(found) < count:
        at = np.array(steps)
        right = np.searchsorted(at[:, 0], costs, side="right")
        above = at[np.maximum(right - 1, 0), 1] - gaps
        ahead = at[np.minimum(right, len(at) - 1), 0] - costs
        best = int(np.argmax(np.maximum(above, 0.0) * np.maximum(ahead, 0.0)))
        if above[best] <= 0 or ahead[best] <= 0:
            break
        found.append(points[best])
        steps = _staircase([*steps, (costs[best], gaps[best])])
    return found


def _staircase(plans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Costs and gaps of those that no other beats, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, gap in sorted(plans):
        if not front or gap < front[-1][1]:
            front.append((cost, gap))
    return front


def _spread(points: Sequence[ProxyPoint], count: int) -> list[ProxyPoint]:
    """Up to `count` points at even steps of the logarithm of cost, both ends included."""
    if len(points) <= count:
        return list(points)
    costs = np.log(np.maximum([point.cost for point in points], 1e-9))
    targets = np.linspace(costs[0], costs[-1], count)
    return [points[k] for k in dict.fromkeys(int(np.argmin(np.abs(costs - t))) for t in targets)]
