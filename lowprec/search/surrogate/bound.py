"""Lower bounds on cost at a gap, and infeasible limits."""

from __future__ import annotations

import numpy as np

from lowprec.search.surrogate.local_search import PlanFront, choice_table
from lowprec.search.surrogate.proxy import Float, Index, Matrix, ProxyModel

__all__ = ["beyond_limits", "beyond_one_limit", "cost_bounds"]

# Up to so many choices the spectrum of the second-order terms is computed: time grows with the cube.
MAX_SPECTRUM = 1_024
# Prices whose duals are solved, and steps of each.
NUM_PRICES, NUM_STEPS = 48, 16


def beyond_one_limit(model: ProxyModel) -> str | None:
    """A sentence about a limit that no plan keeps, or None where each limit can be kept by itself."""
    for limit, row, bound in zip(model.limits, model.usage, model.at_most, strict=True):
        reached = float(np.minimum.reduceat(row, model.starts).sum())
        if reached > bound:
            return (
                f'limit "{limit.name}": no plan of the space keeps at most {limit.at_most:g}; the least that any plan '
                f"reaches is {reached:g}; raise the limit or allow more precisions"
            )
    return None


def cost_bounds(model: ProxyModel, front: PlanFront) -> Float:
    """For the gap of each point a cost below which no plan that keeps the limits has so small a gap, float64[P].

    Duality in three steps. A price turns the gap into a cost. The second-order matrix is split into a part that is
    linear in plans (a plan takes exactly one choice of a decision) and a positive semidefinite rest, which is at least
    its tangent at any mixture of plans. What is left is separable, and solved exactly, with a multiplier for each
    limit. The mixture is improved by Frank-Wolfe steps, each of which gives a valid bound.

    Beyond `MAX_SPECTRUM` choices the second-order matrix is taken to be positive semidefinite, as mean(w h s s^T) is.
    """
    table = choice_table(model)
    linear, rest = _split(model)
    best = np.full(len(front.cost), np.minimum.reduceat(model.cost, model.starts).sum())
    for k, price in _dual_prices(model, front):
        start = np.zeros(len(model.first))
        start[front.picks[k] + model.starts] = 1.0
        least_total = _dual(model, table, model.first + 0.5 * linear + price * model.cost, rest, start)
        best = np.maximum(best, (least_total - front.gap) / price)
    return best


def beyond_limits(model: ProxyModel, *, is_proven: bool) -> str:
    """A sentence about limits that can be kept one by one, and together by no plan (or by none that was found)."""
    names = " and ".join(f'"{limit.name}"' for limit in model.limits)
    reach = "; ".join(
        f'the least "{limit.name}" of any plan is {np.minimum.reduceat(row, model.starts).sum():g}, allowed is '
        f"{limit.at_most:g}"
        for limit, row in zip(model.limits, model.usage, strict=True)
    )
    verb = "no plan of the space keeps" if is_proven else "no plan was found that keeps"
    return f"limits {names}: {verb} all of them at once ({reach}); raise one of them or allow more precisions"


def _dual_prices(model: ProxyModel, front: PlanFront) -> list[tuple[int, float]]:
    """Points of the front and prices at which they are best: edges of the hull, and what lies beyond its ends."""
    corners = front.hull()
    if len(corners) == 1:
        spread = float(np.ptp(model.cost)) or 1.0
        scale = float(np.ptp(model.own)) or 1.0
        return [(0, factor * scale / spread) for factor in (0.01, 0.1, 1.0, 10.0, 100.0)]
    prices = -np.diff(front.gap[corners]) / np.diff(front.cost[corners])
    taken = np.unique(np.linspace(0, len(prices) - 1, NUM_PRICES).astype(int))
    edges = [(int(corners[k]), float(prices[k])) for k in taken]
    return [(edges[0][0], 4 * edges[0][1]), *edges, (int(corners[-1]), edges[-1][1] / 4)]


def _split(model: ProxyModel) -> tuple[Float, Matrix]:
    """A part of the diagonal, float64[C], and a positive semidefinite rest: together `second`, for every plan."""
    second, size = model.second, len(model.first)
    diagonal = np.diagonal(second).astype(np.float64)
    if size > MAX_SPECTRUM:
        # What rounding a Gram matrix can take away: an ulp of each coupling of the D choices of a plan.
        slack = len(model.starts) * float(np.finfo(second.dtype).eps)
        return -slack * np.maximum(diagonal, 0), second
    same = model.owner[:, None] == model.owner
    blocks = np.where(same, second, 0.0)
    scale, vectors = np.linalg.eigh(blocks)
    used = scale > 1e-10 * max(float(scale[-1]), 1e-300)
    whiten = vectors[:, used] / np.sqrt(scale[used])
    share = float(np.linalg.eigvalsh(whiten.T @ second @ whiten)[0]) if used.any() else 0.0
    rest = second - share * blocks
    # Whatever is left below zero, of rounding or of a matrix that is not positive, goes to the diagonal.
    unit = np.sqrt(np.maximum(diagonal, 1e-6 * float(np.abs(second).max())) + 1e-300)
    low = min(0.0, float(np.linalg.eigvalsh(rest / np.outer(unit, unit))[0])) - 1e-12 * size
    rest[np.arange(size), np.arange(size)] -= low * unit**2
    return share * diagonal + low * unit**2, rest


def _dual(model: ProxyModel, table: Index, weight: Float, rest: Matrix, mixture: Float) -> float:
    """A value that weight . z + 1/2 z rest z cannot undercut for any plan z that keeps the limits."""
    pull = _product(rest, mixture)
    best, multiplier = -np.inf, np.zeros(len(model.limits))
    for step in range(NUM_STEPS):
        slope = weight + pull
        if len(multiplier) and step in (0, NUM_STEPS - 1):
            multiplier = _multiplier(model, table, slope)
        slope = slope + multiplier @ model.usage
        corner = table[np.arange(len(table)), slope[table].argmin(axis=1)]
        value = slope[corner].sum() - multiplier @ model.at_most - 0.5 * mixture @ pull
        best = max(best, float(value))
        toward = -mixture
        toward[corner] += 1.0
        change = rest[corner].sum(axis=0, dtype=np.float64) - pull
        curvature, descent = float(toward @ change), -float(slope @ toward)
        if descent <= 0:
            break
        size = min(1.0, descent / curvature) if curvature > 0 else 1.0
        mixture = mixture + size * toward
        pull = pull + size * change
    return best


def _product(rest: Matrix, mixture: Float) -> Float:
    """Rest @ mixture of a plan."""
    return np.asarray(rest[np.flatnonzero(mixture)].sum(axis=0, dtype=np.float64))


def _multiplier(model: ProxyModel, table: Index, slope: Float) -> Float:
    """Prices of the limits that lift the least of slope . z + multiplier . (usage - bound), by coordinate bisection."""
    multiplier, rows = np.zeros(len(model.limits)), np.arange(len(table))
    for k in [*range(len(multiplier))] * min(2, len(multiplier)):
        multiplier[k] = 0.0
        others, usage = slope + multiplier @ model.usage, model.usage[k]
        first = 1e-3 * (float(np.ptp(slope)) or 1.0) / (float(np.ptp(usage)) or 1.0)
        low, high, tried = 0.0, np.inf, 0.0
        for _ in range(40):
            total = others + tried * usage
            plan = table[rows, total[table].argmin(axis=1)]
            if usage[plan].sum() > model.at_most[k]:
                low = tried
            else:
                high = tried
            if high == 0.0:
                break
            tried = max(4 * low, first) if np.isinf(high) else 0.5 * (low + high)
        multiplier[k] = low
    return multiplier
