"""Solves for the Pareto front of the quadratic model: exhaustively, or by prices and local search."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowprec.search.surrogate.bound import beyond_limits, beyond_one_limit, cost_bounds
from lowprec.search.surrogate.local_search import Picks, PlanFront, Walk, least, undominated
from lowprec.search.surrogate.proxy import Float, Index, Matrix, ProxyFront, ProxyModel, ProxyPoint, pair_gaps

__all__ = ["EveryPlan", "front_of", "solve_front", "swept"]

# Up to here every plan is scored.
MAX_EXHAUSTIVE = 200_000
# Prices of a unit of cost in one direction of the sweep, beside two for each decision.
NUM_PRICES = 160
# Where a limit binds: prices at which its multiplier is searched, and steps of that search.
NUM_LIMIT_PRICES, LIMIT_STEPS = 40, 16
# Weightings of the limits that are tried to find a plan that keeps them all.
NUM_WEIGHTINGS = 300
# Points of the front around which pairs of moves are tried, in all, and at once.
MAX_EXPANSIONS, BATCH = 4_000, 64
# Single moves of a point that are combined in pairs: those that stay closest to the front.
NUM_PAIRED = 24


def solve_front(model: ProxyModel) -> ProxyFront:
    """The front over (cost, proxy gap) of the plans that keep the limits of the model."""
    is_exact = model.space.num_plans <= MAX_EXHAUSTIVE
    if reason := beyond_one_limit(model):
        return ProxyFront((), is_exact, reason)
    if is_exact:
        every = EveryPlan.of(model)
        front = None if every is None else every.front(every.totals(model.own, model.second))
    else:
        front = swept(model)
    if front is None:
        return ProxyFront((), is_exact, beyond_limits(model, is_proven=is_exact))
    return front_of(model, front, front.cost if is_exact else cost_bounds(model, front), is_exact=is_exact)


def front_of(model: ProxyModel, front: PlanFront, bounds: Float, *, is_exact: bool) -> ProxyFront:
    """A front as it is handed on; bounds: float64[P], costs below which no plan has so small a gap."""
    rows = zip(front.cost.tolist(), front.gap.tolist(), bounds.tolist(), front.picks, strict=True)
    points = tuple(ProxyPoint(cost, gap, min(bound, cost), picks.tobytes(), model) for cost, gap, bound, picks in rows)
    return ProxyFront(points, is_exact)


@dataclass(frozen=True, eq=False)
class EveryPlan:
    """Every plan of a small space that keeps the limits; fixed decisions are folded into the terms of the free ones.

    entries: int64[P, F], choices of the F free decisions, counted among the choices `moves` (bool[C]) of these; fixed:
    the entries of the others; cost: float64[P].
    """

    model: ProxyModel
    entries: Index
    moves: NDArray[np.bool_]
    fixed: Index
    cost: Float

    @classmethod
    def of(cls, model: ProxyModel) -> EveryPlan | None:
        """All of a space of at most `MAX_EXHAUSTIVE` plans; None where no plan keeps the limits."""
        free = np.flatnonzero(model.num_choices > 1)
        moves = model.num_choices[model.owner] > 1
        fixed = np.flatnonzero(~moves)
        shape = tuple(model.num_choices[free].tolist())
        numbers = np.arange(model.space.num_plans)
        picks = np.stack(np.unravel_index(numbers, shape), axis=1) if shape else np.zeros((1, 0), dtype=np.int64)
        entries = picks + np.cumsum([0, *shape])[: len(shape)].astype(np.int64)
        usage = model.usage[:, moves][:, entries].sum(axis=2) + model.usage[:, fixed].sum(axis=1)[:, None]
        kept = (usage <= model.at_most[:, None]).all(axis=0)
        if not kept.any():
            return None
        entries = entries[kept]
        return cls(model, entries, moves, fixed, model.cost[moves][entries].sum(axis=1) + model.cost[fixed].sum())

    def totals(self, own: Float, second: Matrix | None) -> Float:
        """The sum of own terms (float64[C]) and of couplings (float[C, C], None for none) of each plan, float64[P]."""
        moves, fixed = self.moves, self.fixed
        if second is None:
            return np.asarray(own[moves][self.entries].sum(axis=1) + own[fixed].sum())
        lean = own[moves] + second[np.ix_(moves, fixed)].sum(axis=1, dtype=np.float64)
        total = pair_gaps(lean, second[np.ix_(moves, moves)], self.entries)
        total += pair_gaps(own, second, fixed[None])
        return total

    def picks(self, chosen: Index) -> Picks:
        """Choices of every decision of some of the plans, uint8[N, D]."""
        model, free = self.model, np.flatnonzero(self.model.num_choices > 1)
        starts = np.cumsum([0, *model.num_choices[free].tolist()])[: len(free)].astype(np.int64)
        whole = np.zeros((len(chosen), len(model.starts)), dtype=np.uint8)
        whole[:, free] = self.entries[chosen] - starts
        return whole

    def front(self, gap: Float) -> PlanFront:
        """Those that no other beats in cost and gap (float64[P])."""
        slack = 1e-12 * float(np.abs(self.model.own).max())
        kept = undominated(self.cost, gap, slack)
        return PlanFront.of(self.model, self.cost[kept], gap[kept], self.picks(kept))


def swept(model: ProxyModel) -> PlanFront | None:
    """The front of a large space; None where no plan was found that keeps the limits.

    Minimisers of gap + price * cost over all prices, the plans on the way between them, and their neighbourhood.
    """
    walk = Walk(model, model.starts)
    walk.move_to(least(model, model.cost, walk.table))
    walk.note()
    slopes = walk.slopes(model.cost)
    walk.descend(np.zeros(len(model.cost)))
    slopes = np.append(slopes, walk.slopes(model.cost))
    prices = _prices(slopes, NUM_PRICES + 2 * len(model.starts))
    for price in [*prices[::-1], *prices, 0.0]:
        walk.descend(price * model.cost)
    if walk.num_over:
        _keep_limits(walk)
        for price in _prices(slopes, NUM_LIMIT_PRICES):
            _sweep_multipliers(walk, price)
    front = walk.front().thinned()
    return _refined(walk, front) if len(front.cost) else None


def _prices(slopes: Float, num: int) -> list[float]:
    """Prices of a unit of cost, from above the steepest trade to below the flattest."""
    if not len(slopes):
        return [1.0]
    steepest = float(slopes.max())
    flattest = max(float(slopes.min()), 1e-14 * steepest)  # below that slopes are rounding
    return [float(price) for price in np.geomspace(2 * steepest, 0.5 * flattest, num)]


def _keep_limits(walk: Walk) -> None:
    """Look for a plan that keeps every limit: the least by weights that grow with what they have been exceeded by."""
    model = walk.model
    spread = np.maximum(np.ptp(model.usage[:, walk.table], axis=2).sum(axis=1), 1e-300)
    total = np.zeros(len(spread))
    for step in range(NUM_WEIGHTINGS):
        weight = np.exp(total - total.max())
        walk.move_to(least(model, (weight / spread) @ model.usage, walk.table))
        excess = walk.note() / spread
        if (excess <= 0).all():
            break
        total += excess / np.abs(excess).max() / np.sqrt(1 + step)


def _sweep_multipliers(walk: Walk, price: float) -> None:
    """Descend at one price while the multiplier of each limit is bisected to where the limit is just kept."""
    model = walk.model
    typical = np.array([np.median(s) if len(s) else 0.0 for s in (walk.slopes(row) for row in model.usage)])
    low, high, multiplier = np.zeros(len(typical)), np.full(len(typical), np.inf), np.zeros(len(typical))
    for _ in range(LIMIT_STEPS):
        walk.descend(price * model.cost + multiplier @ model.usage)
        is_over = walk.note() > 0
        if not is_over.any() and not multiplier.any():
            break
        low = np.where(is_over, multiplier, low)
        high = np.where(is_over, high, multiplier)
        is_open = np.isinf(high)
        middle = np.where(low > 0, np.sqrt(low * np.where(is_open, low, high)), np.where(is_open, 0.0, high) / 8)
        multiplier = np.where(is_open, np.where(low > 0, 8 * low, typical), middle)


def _refined(walk: Walk, front: PlanFront) -> PlanFront:
    """The front after changing one decision, or two at once, of its own points, until nothing is gained."""
    budget = MAX_EXPANSIONS if len(walk.value) > len(walk.entries) else 0
    while budget > 0 and not front.is_done.all():
        todo = front.picks[~front.is_done][:budget]
        budget -= len(todo)
        for start in range(0, len(todo), BATCH):
            # points that have been beaten in the meantime are left out
            standing = {row.tobytes() for row in front.picks}
            batch = [row for row in todo[start : start + BATCH] if row.tobytes() in standing]
            if batch:
                picks = np.stack(batch)
                front = front.done(picks).with_more(*_around(walk, front, picks + walk.model.starts)).thinned()
    return front


def _around(walk: Walk, front: PlanFront, entries: Index) -> tuple[Float, Float, Picks]:
    """Costs, gaps and picks of plans one or two moves from these that improve the front; entries int64[B, D]."""
    model, owner, second = walk.model, walk.model.owner, walk.model.second
    num_paired = min(NUM_PAIRED, len(owner) - len(model.starts))
    cost = model.cost[entries].sum(axis=1)
    price = _local_prices(front, cost)
    gap, moves = np.empty(len(cost)), np.empty((len(cost), num_paired), dtype=np.int64)
    gains = np.empty(moves.shape)
    for k, row in enumerate(entries):
        walk.move_to(row)
        gap[k] = walk.gap
        change = walk.value - walk.value[row][owner]
        rank = change + price[k] * (model.cost - model.cost[row][owner])
        rank[row] = np.inf
        moves[k] = np.argpartition(rank, num_paired - 1)[:num_paired]
        gains[k] = change[moves[k]]
    left = np.take_along_axis(entries, owner[moves], axis=1)
    i, j = np.triu_indices(num_paired)
    is_pair = i != j  # else the single move
    to_a, to_b, from_a, from_b = moves[:, i], moves[:, j], left[:, i], left[:, j]
    joint = second[to_a, to_b].astype(np.float64) - second[to_a, from_b] - second[from_a, to_b] + second[from_a, from_b]
    new_gap = gap[:, None] + gains[:, i] + is_pair * (gains[:, j] + joint)

    def moved(total: Float, part: Float) -> Float:
        return np.asarray(total[:, None] + part[to_a] - part[from_a] + is_pair * (part[to_b] - part[from_b]))

    new_cost = moved(cost, model.cost)
    better = (new_gap < front.best_gap(new_cost) - front.slack) & (~is_pair | (owner[to_a] != owner[to_b]))
    for row, bound in zip(model.usage, model.at_most, strict=True):
        better &= moved(row[entries].sum(axis=1), row) <= bound
    found = np.flatnonzero(better)
    found = found[undominated(new_cost.flat[found], new_gap.flat[found], front.slack)]
    source, lines = found // len(i), np.arange(len(found))
    picks = (entries - model.starts)[source]
    for target in (to_a.flat[found], to_b.flat[found]):
        picks[lines, owner[target]] = target - model.starts[owner[target]]
    return new_cost.flat[found], new_gap.flat[found], picks.astype(np.uint8)


def _local_prices(front: PlanFront, cost: Float) -> Float:
    """The slope of the hull of the front at each cost; 0 where the front is one point."""
    corners = front.hull()
    if len(corners) == 1:
        return np.zeros(len(cost))
    slopes = -np.diff(front.gap[corners]) / np.diff(front.cost[corners])
    return np.asarray(slopes[np.searchsorted(front.cost[corners[1:-1]], cost, side="right")])
