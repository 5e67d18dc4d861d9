"""The first plans of a search: uniform ones, and a greedy path from exact to cheap along measured sensitivities."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowprec.evaluation.metrics import PlanMetrics
from lowprec.plan import Plan, Precision
from lowprec.search.space import SearchSpace

__all__ = ["Sensitivity", "Swap", "greedy_path", "plans_around_budget", "single_swaps", "uniform_plans"]


@dataclass(frozen=True)
class Swap:
    """The most exact plan with one decision changed."""

    decision: str
    precision: Precision
    plan: Plan


@dataclass(frozen=True)
class Sensitivity:
    """What one swap does by itself, measured on a sample of the search window."""

    decision: str
    precision: Precision
    bytes_saved: int
    metrics: PlanMetrics


@dataclass(frozen=True)
class PathStep:
    """A plan on the greedy path and the KL gap (percent) that its sensitivities add up to."""

    plan: Plan
    kl_pct: float


def uniform_plans(space: SearchSpace) -> list[Plan]:
    """One plan for each precision, every decision as near to it as it may be; most exact first, none twice."""
    plans = [space.nearest_uniform(precision) for precision in Precision]
    return list(dict.fromkeys([*plans, space.cheapest]))


def single_swaps(space: SearchSpace) -> list[Swap]:
    """Every decision at every choice but its most exact one, all else at its most exact."""
    return [Swap(d.name, p, space.plan({d.name: p})) for d in space.free for p in d.choices[1:]]


def greedy_path(space: SearchSpace, sensitivities: Sequence[Sensitivity]) -> list[PathStep]:
    """Plans from the most exact to the cheapest; each step saves the most bytes for the KL gap it adds.

    KL gaps are used for the order and not labelled gaps, because labels are nearly all of the noise of a single swap.
    Steps may skip a precision: a decision moves along the convex hull of its (bytes, KL) points.
    """
    points: dict[str, list[tuple[float, float, Precision]]] = {d.name: [(0.0, 0.0, d.choices[0])] for d in space.free}
    for s in sensitivities:
        if math.isfinite(s.metrics.kl_pct):
            points[s.decision].append((float(s.bytes_saved), s.metrics.kl_pct, s.precision))
    moves: list[tuple[float, int, str, int]] = []
    hulls = {name: _hull(sorted(found, key=lambda p: p[0])) for name, found in points.items()}
    order = {name: number for number, name in enumerate(hulls)}

    def push(name: str, position: int) -> None:
        hull = hulls[name]
        if position + 1 < len(hull):
            heapq.heappush(moves, (_slope(hull[position], hull[position + 1]), order[name], name, position + 1))

    for name in hulls:
        push(name, 0)
    choices: dict[str, Precision] = {}
    path = [PathStep(space.most_exact, 0.0)]
    while moves:
        _, _, name, position = heapq.heappop(moves)
        before, after = hulls[name][position - 1], hulls[name][position]
        choices[name] = after[2]
        path.append(PathStep(space.plan(choices), path[-1].kl_pct + after[1] - before[1]))
        push(name, position)
    return path


def plans_around_budget(path: Sequence[PathStep], budget_pct: float, count: int) -> list[Plan]:
    """Up to `count` plans of the path whose predicted gap is spread evenly, on a log scale, from 1/8 to 4 budgets."""
    targets = [budget_pct * 2 ** (-3 + 5 * k / max(count - 1, 1)) for k in range(count)]
    chosen = [max((s for s in path if s.kl_pct <= target), key=lambda s: s.kl_pct) for target in targets]
    return list(dict.fromkeys(step.plan for step in chosen))


def _slope(left: tuple[float, float, Precision], right: tuple[float, float, Precision]) -> float:
    """KL gap added for each byte saved."""
    return (right[1] - left[1]) / (right[0] - left[0])


def _hull(points: Sequence[tuple[float, float, Precision]]) -> list[tuple[float, float, Precision]]:
    """The lower convex hull of (bytes saved, KL): the choices that a fixed price of KL would ever pick."""
    hull: list[tuple[float, float, Precision]] = []
    for point in points:
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull
