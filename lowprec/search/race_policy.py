"""Racing: plans are evaluated on a growing sample of slices, and each stops when its race is decided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lowprec.evaluation.profile.profile import Profile
from lowprec.evaluation.race.estimate import MIN_SLICES, PlanEstimate, estimates
from lowprec.evaluation.race.race_sums import RaceSums
from lowprec.evaluation.stats.confidence import Interval
from lowprec.plan import Plan
from lowprec.search.rule import Forecast

__all__ = ["Finish", "Rival", "laps", "race"]

# No plan sees more than a quarter of a long window: what is still open then is mostly far from linear, and such plans
# are rarely the ones to recommend.
MAX_SHARE = 0.25
MAX_SLICES = 64
# The half width of an interval is itself an estimate from the slices seen, some percent off after the first laps. So a
# risk is decided where its bounds keep this share of a budget as a distance from it.
SLACK = 0.1


class Rival(Protocol):
    """A plan whose risk on the window is known already: its cost and bounds of that risk, in percent."""

    @property
    def cost(self) -> float:
        """What the search minimises."""

    @property
    def risk_on_window(self) -> Interval | None:
        """The risk on this very window; None where it was not raced."""


@dataclass(frozen=True)
class Finish:
    """Where a plan stopped, and why: `rule`, `dominated`, or `end` where the last lap was over."""

    plan: Plan
    cost: float
    estimate: PlanEstimate
    num_slices: int
    why: str
    risk_on_window: Interval


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
    forecast: Forecast,
    corrections_pct: Sequence[float],
    rivals: Sequence[Rival] = (),
    budgets: Sequence[float],
    confidence: float,
) -> list[Finish]:
    """Race plans on the slices of a window in the random `order`; finishes in the order of plans.

    `run_lap` evaluates plans on slices. corrections_pct: for each plan the expected gap less the measured one. A plan
    stops when it is known for every budget whether the plan meets the rule of a search on this window, when a rival
    that costs no more has a lower risk with confidence, or when more slices would take too long.
    Plans of one race are no rivals of each other, so what is found of a plan does not depend on its company: a wave
    that was cut in two is the same as a whole one.
    """
    known = [(rival.cost, rival.risk_on_window.upper) for rival in rivals if rival.risk_on_window is not None]
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
            risk = forecast.risk_on_window(estimate, corrections_pct[k])
            why = _decided(risk, costs[k], known, budgets)
            if why or seen == planned[-1]:
                finished[k] = Finish(plans[k], costs[k], estimate, seen, why or "end", risk)
        if len(finished) == len(plans):
            break
        sums = sums.only([position for position, k in enumerate(running) if k not in finished])
        running = [k for k in running if k not in finished]
    return [finished[k] for k in range(len(plans))]


def _decided(risk: Interval, cost: float, known: Sequence[tuple[float, float]], budgets: Sequence[float]) -> str | None:
    if all(risk.upper <= (1 - SLACK) * budget or risk.lower > (1 + SLACK) * budget for budget in budgets):
        return "rule"
    return "dominated" if any(other <= cost and upper < risk.lower for other, upper in known) else None
