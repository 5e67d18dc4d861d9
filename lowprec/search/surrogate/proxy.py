"""The quadratic model of the gap over the plans of a space, and its Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.core.errors import ConfigError
from lowprec.plan import Plan, Precision
from lowprec.search.space.space import SearchSpace
from lowprec.session.costs import Limit

__all__ = ["ProxyFront", "ProxyModel", "ProxyPoint", "build_proxy", "pair_gaps"]

Float = NDArray[np.float64]
Index = NDArray[np.int64]
Matrix = NDArray[np.floating[Any]]
UnitCost = Callable[[str, Precision], float]

# `second` is kept in double precision where that fits, else in single: 10,000 choices take 400 MB.
MAX_DOUBLE_BYTES = 400_000_000
# Values looked up at once when plans are scored: what stays in the second-level cache.
CHUNK = 16_384


@dataclass(frozen=True, eq=False)
class ProxyModel:
    """The quadratic model over the decisions of a space; gaps in percent of the reference loss.

    A plan is a row of picks, int64[D]: for each decision the index of one of its choices. Choice c of decision d is
    entry `starts[d] + c` of `first` float64[C], `second` [C, C] (symmetric, float64 or float32), `cost` float64[C] and
    `usage` float64[L, C], which holds the cost of each choice under each of the `limits`.
    """

    space: SearchSpace
    starts: Index
    first: Float
    second: Matrix
    cost: Float
    limits: tuple[Limit, ...]
    usage: Float

    @cached_property
    def num_choices(self) -> Index:
        """How many choices each decision has, int64[D]."""
        return np.diff(np.append(self.starts, len(self.first)))

    @cached_property
    def owner(self) -> Index:
        """The decision of each choice, int64[C]."""
        return np.repeat(np.arange(len(self.starts)), self.num_choices)

    @cached_property
    def own(self) -> Float:
        """What each choice adds to the gap by itself, float64[C]."""
        return np.asarray(self.first + 0.5 * np.diagonal(self.second))

    @cached_property
    def at_most(self) -> Float:
        """The bound of each limit, with room for the rounding of sums, float64[L]."""
        bounds = np.array([limit.at_most for limit in self.limits])
        return np.asarray(bounds + 1e-9 * np.abs(bounds))

    def gaps(self, picks: Index) -> Float:
        """The proxy gap of each plan, float64[P]; picks int64[P, D]."""
        return pair_gaps(self.own, self.second, picks + self.starts)

    def costs(self, picks: Index) -> Float:
        """The cost of each plan, float64[P]."""
        return np.asarray(self.cost[picks + self.starts].sum(axis=1))

    def usages(self, picks: Index) -> Float:
        """What each plan takes of each limit, float64[L, P]."""
        return np.asarray(self.usage[:, picks + self.starts].sum(axis=2))

    def plan(self, picks: Sequence[int] | Index) -> Plan:
        """The plan of one row of picks."""
        chosen = zip(self.space.decisions, picks, strict=True)
        return self.space.plan({decision.name: decision.choices[k] for decision, k in chosen})

    def picks(self, plan: Plan) -> Index:
        """The row of picks of a plan of the space."""
        choices = self.space.choices(plan)
        return np.array([d.choices.index(choices[d.name]) for d in self.space.decisions], dtype=np.int64)


@dataclass(frozen=True)
class ProxyPoint:
    """A plan of the front. No plan that keeps the limits has so small a proxy gap at a cost below `cost_bound`."""

    cost: float
    gap_pct: float
    cost_bound: float
    picks: bytes = field(repr=False)
    model: ProxyModel = field(repr=False, compare=False)

    @property
    def distance(self) -> float:
        """The largest part of the cost that a plan with the same gap may still save."""
        return (self.cost - self.cost_bound) / abs(self.cost) if self.cost else 0.0

    @property
    def plan(self) -> Plan:
        """The plan itself, made when asked for: a front can have ten thousand points of thousands of units."""
        return self.model.plan(tuple(self.picks))


@dataclass(frozen=True)
class ProxyFront:
    """Points from cheap to exact. `is_exact` says that every plan of the space was scored.

    `infeasible` is None, or the sentence that says which limit no plan keeps; then there are no points.
    """

    points: tuple[ProxyPoint, ...]
    is_exact: bool
    infeasible: str | None = None

    @property
    def worst_distance(self) -> float:
        """The largest `distance` of a point: how far from the optimum the front may be; 0 where it is exact."""
        return max((p.distance for p in self.points), default=0.0)

    def cheapest_within(self, budget_pct: float) -> ProxyPoint | None:
        """The cheapest point with a proxy gap of at most `budget_pct`."""
        return next((p for p in self.points if p.gap_pct <= budget_pct), None)


def build_proxy(
    space: SearchSpace,
    columns: Sequence[tuple[str, Precision]],
    first: Float,
    second: Matrix,
    *,
    cost: UnitCost,
    limits: Sequence[Limit] = (),
) -> ProxyModel:
    """The model in which a plan with one column z per (unit, precision) has the gap first . z + 1/2 z second z.

    Args:
        space: The decisions.
        columns: K of them: every unit at every precision but fp32 that the space allows, in any order; more do no harm.
        first: float64[K], in percent of the reference loss.
        second: float64[K, K] or float32[K, K], in the same unit; only its symmetric part counts.
        cost: The cost of a unit at a precision; it adds up over units.
        limits: Further costs that plans must keep.

    Raises:
        ConfigError: A column is missing, or the statistics have the wrong shape or are not finite.
    """
    if first.shape != (len(columns),) or second.shape != (len(columns),) * 2:
        raise ConfigError(
            f"search: {len(columns)} columns need first-order terms [{len(columns)}] and second-order terms "
            f"[{len(columns)}, {len(columns)}]; got {list(first.shape)} and {list(second.shape)}"
        )
    if not (np.isfinite(first).all() and all(np.isfinite(row).all() for row in second)):
        raise ConfigError("search: the statistics of the profile hold NaN or infinity; profile the window again")
    members = [[(unit, choice) for unit in d.units] for d in space.decisions for choice in d.choices]
    rows = _columns_of_choices(members, columns)
    return ProxyModel(
        space=space,
        starts=np.cumsum([0, *(len(d.choices) for d in space.decisions)])[:-1].astype(np.int64),
        first=np.array([first[row].sum() for row in rows]),
        second=_second_of_choices(rows, second),
        cost=_costs(members, cost),
        limits=tuple(limits),
        usage=np.array([_costs(members, limit.cost) for limit in limits]).reshape(len(limits), len(members)),
    )


def pair_gaps(own: Float, second: Matrix, entries: Index) -> Float:
    """The sum of own terms and of couplings between pairs, float64[P]; entries int64[P, D] into own and second.

    Looked-up pairs add up in double precision whatever the type of `second`, so nothing is lost to the size of a plan.
    """
    num_plans, num_decisions = entries.shape
    flat, out = second.reshape(-1), np.empty(num_plans)
    rows = max(1, CHUNK // max(1, num_decisions))
    for start in range(0, num_plans, rows):
        part = np.ascontiguousarray(entries[start : start + rows].T)
        total = own[part].sum(axis=0)
        for d in range(num_decisions - 1):
            total += flat.take(part[d] * len(own) + part[d + 1 :]).sum(axis=0, dtype=np.float64)
        out[start : start + rows] = total
    return out


def _columns_of_choices(
    members: Sequence[Sequence[tuple[str, Precision]]], columns: Sequence[tuple[str, Precision]]
) -> list[list[int]]:
    """For each choice the columns that it adds up."""
    position = {key: k for k, key in enumerate(columns)}
    missing = [key for keys in members for key in keys if key[1] is not Precision.FP32 and key not in position]
    if missing:
        unit, precision = missing[0]
        raise ConfigError(
            f"search: {unit} may be {precision}; the profile has no statistics for it ({len(missing)} missing); "
            "profile the window again with every precision of the space, or rule it out in `space`"
        )
    return [[position[key] for key in keys if key[1] is not Precision.FP32] for keys in members]


def _second_of_choices(rows: Sequence[Sequence[int]], second: Matrix) -> Matrix:
    """`second` between choices, made symmetric; row by row and in place, so that one matrix is held."""
    num_choices = len(rows)
    fits = num_choices**2 * 8 <= MAX_DOUBLE_BYTES
    out = np.zeros((num_choices, num_choices), dtype=np.float64 if fits else np.float32)
    choice_of = np.repeat(np.arange(num_choices), [len(row) for row in rows])
    taken = np.array([column for row in rows for column in row], dtype=np.int64)
    for choice, row in enumerate(rows):
        if row:
            summed = second[row].sum(axis=0, dtype=np.float64)
            out[choice] = np.bincount(choice_of, weights=summed[taken], minlength=num_choices)
    for k in range(num_choices):
        mean = 0.5 * (out[k, k:] + out[k:, k])
        out[k, k:] = out[k:, k] = mean
    return out


def _costs(members: Sequence[Sequence[tuple[str, Precision]]], cost: UnitCost) -> Float:
    return np.array([float(sum(cost(*key) for key in keys)) for keys in members])
