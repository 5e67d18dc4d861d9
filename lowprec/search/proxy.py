"""The Pareto front of the quadratic model: cheapest plans by proxy gap, without reading traffic."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowprec.evaluation.profile import Profile
from lowprec.plan import Plan, Precision
from lowprec.search.space import SearchSpace

__all__ = ["ProxyFront", "ProxyModel", "ProxyPoint", "build_proxy", "solve_front"]

Float = NDArray[np.float64]
Picks = NDArray[np.int64]

# Up to here every plan is scored.
MAX_EXHAUSTIVE = 200_000
NUM_PRICES = 160
CHUNK = 65_536


@dataclass(frozen=True)
class ProxyModel:
    """The quadratic model over the decisions of a space; gaps in percent of the reference loss.

    A plan is a row of picks, int64[D]: for each decision the index of one of its choices. Choice c of decision d is
    entry `starts[d] + c` of `first` float64[C], `second` float64[C, C] and `cost` float64[C].
    """

    space: SearchSpace
    starts: Picks
    first: Float
    second: Float
    cost: Float

    @property
    def num_choices(self) -> Picks:
        """How many choices each decision has."""
        return np.diff(np.append(self.starts, len(self.first)))

    def gaps(self, picks: Picks) -> Float:
        """The proxy gap of each plan, float64[P]; picks int64[P, D]."""
        out = np.empty(len(picks))
        for start in range(0, len(picks), CHUNK):
            part = picks[start : start + CHUNK] + self.starts
            chosen = np.zeros((len(part), len(self.first)), dtype=np.float32)
            np.put_along_axis(chosen, part, 1.0, axis=1)
            coupled = chosen @ self.second.astype(np.float32)
            quadratic = np.take_along_axis(coupled, part, axis=1).sum(axis=1, dtype=np.float64)
            out[start : start + CHUNK] = self.first[part].sum(axis=1) + 0.5 * quadratic
        return out

    def costs(self, picks: Picks) -> Float:
        """The cost of each plan, float64[P]."""
        return np.asarray(self.cost[picks + self.starts].sum(axis=1))

    def plan(self, picks: Picks) -> Plan:
        """The plan of one row of picks."""
        chosen = zip(self.space.decisions, picks, strict=True)
        return self.space.plan({decision.name: decision.choices[k] for decision, k in chosen})

    def picks(self, plan: Plan) -> Picks:
        """The row of picks of a plan of the space."""
        choices = self.space.choices(plan)
        return np.array([d.choices.index(choices[d.name]) for d in self.space.decisions])


@dataclass(frozen=True)
class ProxyPoint:
    """A plan of the front. `cost_bound` is a cost below which no plan has so small a proxy gap."""

    plan: Plan
    cost: float
    gap_pct: float
    cost_bound: float


@dataclass(frozen=True)
class ProxyFront:
    """Points from cheap to exact. `is_exact` says that every plan of the space was scored."""

    points: tuple[ProxyPoint, ...]
    is_exact: bool

    def cheapest_within(self, budget_pct: float) -> ProxyPoint | None:
        """The cheapest point with a proxy gap of at most `budget_pct`."""
        return next((p for p in self.points if p.gap_pct <= budget_pct), None)


def build_proxy(
    profile: Profile, space: SearchSpace, *, cost: Callable[[str, Precision], float], first: Float | None = None
) -> ProxyModel:
    """The quadratic model of `profile` over `space`; `cost(unit, precision)` adds up over units.

    `first` replaces the profile's own first-order sums, float64[K] over its columns: shrunk ones, say, or zeros.
    """
    total = profile.total
    column = {key: k for k, key in enumerate(profile.columns)}
    members = [[(unit, choice) for unit in d.units] for d in space.decisions for choice in d.choices]
    gather = np.zeros((len(members), len(profile.columns)))
    for row, keys in enumerate(members):
        for key in keys:
            if key[1] is not Precision.FP32:
                gather[row, column[key]] = 1.0
    scale = 100 / total.loss
    starts = np.cumsum([0, *(len(d.choices) for d in space.decisions)])[:-1]
    return ProxyModel(
        space=space,
        starts=starts.astype(np.int64),
        first=gather @ (total.first if first is None else first) * scale,
        second=gather @ total.second @ gather.T * scale,
        cost=np.array([sum(cost(*key) for key in keys) for keys in members]),
    )


def solve_front(model: ProxyModel) -> ProxyFront:
    """The front over (cost, proxy gap): all plans where there are few, else a sweep of prices with local search."""
    exhaustive = model.space.num_plans <= MAX_EXHAUSTIVE
    picks = _all_picks(model) if exhaustive else _sweep(model)
    costs, gaps = model.costs(picks), model.gaps(picks)
    kept = _front(costs, gaps)
    bounds = costs[kept] if exhaustive else _cost_bounds(model, gaps[kept])
    points = tuple(
        ProxyPoint(model.plan(picks[k]), float(costs[k]), float(gaps[k]), float(min(bound, costs[k])))
        for k, bound in zip(kept, bounds, strict=True)
    )
    return ProxyFront(points, exhaustive)


def _all_picks(model: ProxyModel) -> Picks:
    return np.array(list(itertools.product(*(range(n) for n in model.num_choices))), dtype=np.int64)


def _front(costs: Float, gaps: Float) -> Picks:
    """Indices of the points that no other beats in both, cheapest first."""
    order = np.lexsort((gaps, costs))
    best = np.minimum.accumulate(gaps[order])
    is_better = np.append(True, gaps[order][1:] < best[:-1])
    return np.asarray(order[is_better])


def _sweep(model: ProxyModel) -> Picks:
    """Minimisers of gap + price * cost over a range of prices, and all their neighbours at one or two moves."""
    found: dict[bytes, Picks] = {}
    for price in _prices(model):
        start = found[next(reversed(found))] if found else np.zeros(len(model.starts), dtype=np.int64)
        for first in (start, model.num_choices - 1):
            picks = _descend(model, first, float(price))
            found[picks.tobytes()] = picks
    supported = np.stack(list(found.values()))
    around = [supported]
    for picks in supported[_front(model.costs(supported), model.gaps(supported))]:
        single = _neighbours(model, picks)
        around.append(single)
        # Of the single moves those that come closest to the front are moved once more.
        score = model.gaps(single) / max(float(np.ptp(model.gaps(single))), 1e-300)
        spread = max(float(np.ptp(model.costs(single))), 1e-300)
        best = np.argsort(score + model.costs(single) / spread)[: len(model.starts)]
        around += [_neighbours(model, row) for row in single[best]]
    return np.unique(np.concatenate(around), axis=0)


def _prices(model: ProxyModel) -> Float:
    """Prices of a unit of cost in gap, from where the most exact plan wins to where the cheapest does."""
    own = model.first + 0.5 * np.diag(model.second)
    slopes = [
        abs(own[s + j] - own[s + i]) / abs(model.cost[s + i] - model.cost[s + j])
        for s, n in zip(model.starts, model.num_choices, strict=True)
        for i, j in itertools.combinations(range(int(n)), 2)
        if model.cost[s + i] != model.cost[s + j]
    ]
    positive = [s for s in slopes if s > 0]
    if not positive:
        return np.array([1.0])
    return np.geomspace(min(positive) / 4, max(positive) * 4, NUM_PRICES)


def _descend(model: ProxyModel, picks: Picks, price: float) -> Picks:
    """Change one decision at a time to its best choice, the others given, until none changes."""
    picks = picks.copy()
    linear = model.first + price * model.cost + 0.5 * np.diag(model.second)
    pull = model.second[:, picks + model.starts].sum(axis=1)
    for _ in range(50):
        changed = False
        for d, (start, n) in enumerate(zip(model.starts, model.num_choices, strict=True)):
            here = start + picks[d]
            span = slice(start, start + n)
            value = linear[span] + pull[span] - model.second[span, here]
            best = int(np.argmin(value))
            if value[best] < value[picks[d]] - 1e-15:
                pull += model.second[:, start + best] - model.second[:, here]
                picks[d] = best
                changed = True
        if not changed:
            break
    return picks


def _neighbours(model: ProxyModel, picks: Picks) -> Picks:
    rows = []
    for d, n in enumerate(model.num_choices):
        for choice in range(int(n)):
            if choice != picks[d]:
                row = picks.copy()
                row[d] = choice
                rows.append(row)
    return np.stack(rows) if rows else picks[None]


def _cost_bounds(model: ProxyModel, gaps: Sequence[float] | Float) -> Float:
    """For each gap a cost that no plan with that gap or less can undercut, by Lagrangian duality.

    The coupling between decisions is replaced by the least that it can be, which makes the problem separable: its dual
    is then solved exactly, price by price.
    """
    least = np.zeros(len(model.first))
    spans = [slice(s, s + n) for s, n in zip(model.starts, model.num_choices, strict=True)]
    for d, span in enumerate(spans):
        for e, other in enumerate(spans):
            if d != e:
                least[span] += 0.5 * model.second[span, other].min(axis=1)
    own = model.first + 0.5 * np.diag(model.second) + least
    best = np.full(len(gaps), sum(float(model.cost[span].min()) for span in spans))
    for price in _prices(model):
        # min over plans of cost + (gap - budget) / price, gap at least the separable one
        dual = sum(float((model.cost[span] + own[span] / price).min()) for span in spans)
        best = np.maximum(best, dual - np.asarray(gaps) / price)
    return best
