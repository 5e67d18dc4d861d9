"""Racing: plans are evaluated on more and more of a window's slices, and each stops as soon as its race is decided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lowprec.evaluation.confidence import Interval
from lowprec.evaluation.estimate import MIN_SLICES, PlanEstimate, estimates
from lowprec.evaluation.profile import Profile
from lowprec.evaluation.race import RaceSums
from lowprec.plan import Plan

__all__ = ["Finish", "Rival", "laps", "race"]

# No plan sees more than a quarter of a long window: what is still open then is mostly far from linear, and such plans
# are rarely the ones to recommend.
MAX_SHARE = 0.25
MAX_SLICES = 64
# A plan stops where the slices not seen could narrow its interval by no more than this share.
RESOLVED = 0.25


class Rival(Protocol):
    """A plan whose gap on the window is known already: its cost and an interval of that gap, in percent."""

    @property
    def cost(self) -> float:
        """What the search minimises."""

    @property
    def on_window(self) -> Interval:
        """The gap on this very window."""


@dataclass(frozen=True)
class Finish:
    """Where a plan stopped, and why: `verdict`, `dominated`, `resolved`, or `end` where the last lap was over."""

    plan: Plan
    cost: float
    estimate: PlanEstimate
    num_slices: int
    why: str

    @property
    def on_window(self) -> Interval:
        """The gap on this very window."""
        return self.estimate.on_window


def laps(num_slices: int) -> list[int]:
    """How many slices have been seen after each lap: a half more every time; all of a short window, at once if few."""
    most = num_slices if num_slices <= MAX_SLICES else max(MAX_SLICES, int(MAX_SHARE * num_slices))
    if most < 2 * MIN_SLICES:
        return [most]
    seen = [MIN_SLICES]
    while seen[-1] < most:
        grown = seen[-1] + max(1, seen[-1] // 2)
        # A last lap of a few slices is not worth its while.
        seen.append(grown if grown <= 0.8 * most else most)
    return seen


def race(
    plans: Sequence[Plan],
    costs: Sequence[float],
    run_lap: Callable[[Sequence[Plan], Sequence[int]], RaceSums],
    profile: Profile,
    order: Sequence[int],
    *,
    rivals: Sequence[Rival] = (),
    budgets: Sequence[float],
    confidence: float,
) -> list[Finish]:
    """Race plans on the slices of a window in the random `order`; finishes in the order of plans.

    `run_lap` evaluates plans on slices. A plan stops when every budget has its verdict, when a rival that costs no more
    is better on this window with confidence, or when the slices not seen no longer matter (or would take too long).
    Plans of one race are no rivals of each other, so what is found of a plan does not depend on its company: a wave
    that was cut in two is the same as a whole one.
    """
    known = [(rival.cost, rival.on_window.upper) for rival in rivals]
    finished: dict[int, Finish] = {}
    running = list(range(len(plans)))
    sums: RaceSums | None = None
    begun = 0
    planned = laps(len(order))
    for seen in planned:
        lap = run_lap([plans[k] for k in running], order[begun:seen])
        sums = lap if sums is None else sums + lap
        begun = seen
        found = dict(
            zip(
                running,
                estimates(
                    sums,
                    profile,
                    [plans[k] for k in running],
                    num_slices=len(order),
                    confidence=confidence,
                ),
                strict=True,
            )
        )
        for k, estimate in found.items():
            why = _decided(estimate, costs[k], known, budgets)
            if why or seen == planned[-1]:
                finished[k] = Finish(plans[k], costs[k], estimate, seen, why or "end")
        if len(finished) == len(plans):
            break
        sums = sums.only([position for position, k in enumerate(running) if k not in finished])
        running = [k for k in running if k not in finished]
    return [finished[k] for k in range(len(plans))]


def _decided(
    estimate: PlanEstimate, cost: float, known: Sequence[tuple[float, float]], budgets: Sequence[float]
) -> str | None:
    if all(estimate.metrics.verdict(budget) != "inconclusive" for budget in budgets):
        return "verdict"
    if any(other <= cost and upper < estimate.on_window.lower for other, upper in known):
        return "dominated"
    return "resolved" if estimate.unresolved <= RESOLVED else None
