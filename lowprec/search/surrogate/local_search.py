"""Local search over plans under the quadratic model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowprec.search.surrogate.proxy import Float, Index, ProxyModel

__all__ = ["Picks", "PlanFront", "Walk", "choice_table", "least", "undominated"]

# A choice for each decision, uint8[P, D].
Picks = NDArray[np.uint8]

# Points kept of a front that was not found by scoring every plan.
MAX_POINTS = 4_096


@dataclass(frozen=True)
class PlanFront:
    """Plans none of which beats another, cheapest first: cost and gap float64[P], picks uint8[P, D].

    Gaps that differ by no more than `slack` are the same but for rounding. `is_done` marks plans whose neighbourhood
    has been looked at.
    """

    cost: Float
    gap: Float
    picks: Picks
    is_done: NDArray[np.bool_]
    slack: float

    @classmethod
    def of(cls, model: ProxyModel, cost: Float, gap: Float, picks: Picks) -> PlanFront:
        """The best of these plans."""
        slack = 1e-12 * float(np.abs(model.own).max())
        return cls(cost, gap, picks, np.zeros(len(cost), dtype=bool), slack)._pruned()

    def best_gap(self, cost: Float) -> Float:
        """The least gap of these plans at each cost or below."""
        return np.append(np.inf, self.gap)[np.searchsorted(self.cost, cost, side="right")]

    def with_more(self, cost: Float, gap: Float, picks: Picks) -> PlanFront:
        """The best of these plans and of new ones."""
        return PlanFront(
            np.append(self.cost, cost),
            np.append(self.gap, gap),
            np.concatenate([self.picks, picks]),
            np.append(self.is_done, np.zeros(len(cost), dtype=bool)),
            self.slack,
        )._pruned()

    def done(self, picks: Picks) -> PlanFront:
        """These plans with some of them marked."""
        marked = {row.tobytes() for row in picks}
        is_done = self.is_done | np.array([row.tobytes() in marked for row in self.picks])
        return PlanFront(self.cost, self.gap, self.picks, is_done, self.slack)

    def hull(self) -> Index:
        """Indices of the corners of the lower convex hull, cheapest first."""
        corners: list[tuple[float, float, int]] = []
        for c, g, k in zip(self.cost.tolist(), self.gap.tolist(), range(len(self.cost)), strict=True):
            while len(corners) > 1:
                (c0, g0, _), (c1, g1, _) = corners[-2:]
                if (g1 - g0) * (c - c1) < (g - g1) * (c1 - c0):
                    break
                corners.pop()
            corners.append((c, g, k))
        return np.array([k for _, _, k in corners])

    def thinned(self) -> PlanFront:
        """At most about `MAX_POINTS` of these: the most exact of neighbours with nearly the same cost and gap.

        Nearly the same: in one of as many steps, half of them even in cost, half in the logarithm of the gap above the
        least, so that small gaps are told apart as well as large ones.
        """
        if len(self.cost) <= MAX_POINTS:
            return self
        above = (self.gap - self.gap[-1]) / (self.gap[0] - self.gap[-1])
        positions = (self.cost - self.cost[0]) / (self.cost[-1] - self.cost[0]), np.log10(above + 1e-8) / 8
        steps = [np.floor(position * (MAX_POINTS // 2)) for position in positions]
        is_last = np.append((np.diff(steps) != 0).any(axis=0), True)
        is_last[0] = True
        return self._only(np.flatnonzero(is_last))

    def _pruned(self) -> PlanFront:
        return self._only(undominated(self.cost, self.gap, self.slack))

    def _only(self, kept: Index) -> PlanFront:
        return PlanFront(self.cost[kept], self.gap[kept], self.picks[kept], self.is_done[kept], self.slack)


class Walk:
    """A plan that changes, and what it has been.

    entries: int64[D], the plan; value: float64[C], what the gap gains by each choice, the other decisions given. Both
    follow a move in time proportional to the choices, and the gap of each single change can be read off.
    """

    def __init__(self, model: ProxyModel, entries: Index):
        self.model = model
        self.table = choice_table(model)
        self.entries = model.starts
        own_decision = model.second[np.arange(len(model.first)), model.starts[model.owner]]
        self.value = model.own + model.second[model.starts].sum(axis=0, dtype=np.float64) - own_decision
        self.num_over = 0
        self._seen: dict[bytes, tuple[float, float]] = {}
        self.move_to(entries)
        self.note()

    @property
    def gap(self) -> float:
        """The gap: a coupling counts in the values of two choices, an own term in one."""
        return float(0.5 * (self.model.own + self.value)[self.entries].sum())

    def move_to(self, entries: Index) -> None:
        """Become another plan."""
        changed = np.flatnonzero(entries != self.entries)
        if not len(changed):
            return
        second, new, old = self.model.second, entries[changed], self.entries[changed]
        shift = second[new].sum(axis=0, dtype=np.float64) - second[old].sum(axis=0, dtype=np.float64)
        span = self.table[changed]  # a choice does not feel its own decision
        shift[span] -= second[span, new[:, None]].astype(np.float64) - second[span, old[:, None]]
        self.value += shift
        self.entries = entries

    def note(self) -> Float:
        """Remember the plan if it keeps the limits; what it takes of each beyond its bound, float64[L]."""
        excess = self.model.usage[:, self.entries].sum(axis=1) - self.model.at_most
        if (excess > 0).any():
            self.num_over += 1
        else:
            picks = (self.entries - self.model.starts).astype(np.uint8)
            self._seen[picks.tobytes()] = float(self.model.cost[self.entries].sum()), self.gap
        return np.asarray(excess)

    def descend(self, weight: Float) -> None:
        """Make the one change that lowers gap + weight most, until none does; weight float64[C]."""
        slack = 1e-13 * float(np.abs(self.value).max() + np.abs(weight).max())
        for _ in range(50 * len(self.entries)):
            total = self.value + weight
            gain = total - total[self.entries][self.model.owner]
            best = int(gain.argmin())
            if gain[best] >= -slack:
                break
            entries = self.entries.copy()
            entries[self.model.owner[best]] = best
            self.move_to(entries)
            self.note()

    def slopes(self, cost: Float) -> Float:
        """What the gap loses for each unit of cost, by every change of one decision that trades one for the other."""
        gap, cost = self.value[self.table], cost[self.table]
        less = gap[:, :, None] - gap[:, None, :]
        more = cost[:, None, :] - cost[:, :, None]
        trades = (less > 0) & (more > 0)
        return np.asarray(less[trades] / more[trades])

    def front(self) -> PlanFront:
        """The best of the plans that it has been and that keep the limits; there may be none."""
        cost, gap = np.array(list(self._seen.values())).reshape(-1, 2).T
        picks = np.frombuffer(b"".join(self._seen), dtype=np.uint8).reshape(len(cost), len(self.entries))
        return PlanFront.of(self.model, cost, gap, picks) if len(cost) else PlanFront(cost, gap, picks, cost > 0, 0.0)


def undominated(cost: Float, gap: Float, slack: float) -> Index:
    """Indices of the points that no other beats in both, cheapest first; a gap must be smaller by more than `slack`."""
    order = np.lexsort((gap, cost))
    best = np.minimum.accumulate(gap[order])
    is_better = np.append(True, gap[order][1:] < best[:-1] - slack)
    return np.asarray(order[is_better[: len(order)]])


def choice_table(model: ProxyModel) -> Index:
    """Entries of the choices of each decision, int64[D, N], where N is the most that one has; the last one repeats."""
    offsets = np.arange(model.num_choices.max())
    return np.asarray(model.starts[:, None] + np.minimum(offsets, model.num_choices[:, None] - 1))


def least(model: ProxyModel, cost: Float, table: Index) -> Index:
    """Entries of the plan of least cost, int64[D]; among equal ones of the least gap by itself."""
    tied = cost[table] == cost[table].min(axis=1, keepdims=True)
    picked = np.where(tied, model.own[table], np.inf).argmin(axis=1)
    return np.asarray(table[np.arange(len(table)), picked])
