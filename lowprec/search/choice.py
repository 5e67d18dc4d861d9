"""Which plans to confirm, and which one to recommend."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lowprec.evaluation.confidence import Verdict
from lowprec.evaluation.metrics import PlanMetrics
from lowprec.evaluation.rows import RowAccount
from lowprec.plan import Plan
from lowprec.search.rule import Forecast
from lowprec.search.trial import Trial

__all__ = ["Choice", "Confirmed", "confidence_of_try", "finalists", "next_try", "recommended"]

# With what probability the confirm window certifies a finalist: the first is the boldest, the last almost sure.
LADDER = (0.5, 0.8, 0.95, 0.995)
# Shares of the budget for the risk of one more plan where every finalist failed on the confirm window, try after try.
LATER_TRIES = (0.25, 0.1)
# The share of the error rate that is left to all later tries together; of that the same share to all but the next.
LEFT_TO_LATER_TRIES = 0.1


@dataclass(frozen=True)
class Choice:
    """A trial to confirm: whether it meets the budget on the search window, and how it was picked.

    chance: the probability with which it was expected to be certified; None where that is not known.
    """

    trial: Trial
    meets_budget: bool
    because: str
    chance: float | None = None


@dataclass(frozen=True)
class Confirmed:
    """A choice, evaluated in full on the confirm window in one of the tries there."""

    choice: Choice
    metrics: PlanMetrics
    verdict: Verdict
    rows: RowAccount
    attempt: int = 0


def finalists(
    trials: Sequence[Trial], budget_pct: float, forecast: Forecast, reference_cost: float = math.inf
) -> list[Choice]:
    """The plans worth confirming, safest first; empty without trials that have a finite gap.

    Each is the cheapest plan that the confirm window certifies with a probability of `LADDER` (see `rule`). Without
    such a plan it is the cheapest whose estimate is within budget, else the most accurate. Where all of them cost as
    much as the reference, the cheapest plan whose gap and KL gap are within budget is added: the confirm window may
    have more evidence than was expected.
    """
    trials = [t for t in trials if math.isfinite(t.metrics.gap_pct)]
    chosen: dict[int, Choice] = {}
    for chance in LADDER:
        likely_there = [t for t in trials if forecast.chance(t, budget_pct) >= chance]
        if likely_there:
            cheapest = min(likely_there, key=_cheapest_first)
            found = forecast.chance(cheapest, budget_pct)
            because = (
                f"cheapest plan of those that the confirm window certifies with a probability of {chance:.1%} or more "
                f"(this one: {_percent(found)})"
            )
            chosen.setdefault(cheapest.number, Choice(cheapest, True, because, found))
    if chosen and all(choice.trial.cost >= reference_cost for choice in chosen.values()):
        hopeful = [
            t for t in trials if max(t.metrics.gap_pct, t.metrics.kl_pct) <= budget_pct and t.cost < reference_cost
        ]
        if hopeful:
            because = "cheapest plan whose gap and KL gap are within budget; no interval is narrow enough to be sure"
            cheapest = min(hopeful, key=_cheapest_first)
            chosen[cheapest.number] = Choice(cheapest, True, because)
    if chosen:
        return sorted(chosen.values(), key=lambda c: _cheapest_first(c.trial), reverse=True)
    likely = [t for t in trials if t.metrics.gap_pct <= budget_pct]
    if likely:
        because = "cheapest plan whose estimated gap is within budget; no interval is narrow enough to be sure"
        return [Choice(min(likely, key=_cheapest_first), True, because)]
    if trials:
        best = min(trials, key=lambda t: (t.metrics.gap_pct, t.cost))
        return [Choice(best, False, "no plan meets the budget; this is the most accurate one so far")]
    return []


def next_try(
    trials: Sequence[Trial], budget_pct: float, forecast: Forecast, tried: Collection[Plan], attempt: int
) -> Choice | None:
    """The plan to confirm after every plan of earlier tries failed: safer than they, and not among those `tried`."""
    if not 0 < attempt <= len(LATER_TRIES):
        return None
    fresh = [t for t in trials if math.isfinite(t.metrics.gap_pct) and t.plan not in tried]
    share = LATER_TRIES[attempt - 1]
    safe = [t for t in fresh if forecast.risk_pct(t) <= share * budget_pct]
    if not safe:
        return None
    because = (
        f"cheapest plan whose risk is at most {share:.0%} of the budget: the larger of its expected gap and its KL "
        "gap, and what the confirm window takes for chance"
    )
    return Choice(min(safe, key=_cheapest_first), True, because)


def confidence_of_try(confidence: float, attempt: int) -> float:
    """The confidence of try 0, 1, ... on one confirm window, such that all of them together keep `confidence`."""
    share = LEFT_TO_LATER_TRIES**attempt
    return 1 - (1 - confidence) * share * (1 - LEFT_TO_LATER_TRIES)


def recommended(confirmed: Sequence[Confirmed]) -> Confirmed:
    """The cheapest finalist that may be called certified, else the safest one; `confirmed` is safest first.

    Finalists are tested in that order, which was fixed before the confirm window was read, and testing stops at the
    first that is not certified. Then the chance of certifying any plan that is over budget is that of a single test,
    however many finalists there are (a fixed-sequence procedure: Maurer, Hothorn and Lehmacher, 1995).
    """
    best = confirmed[0]
    for candidate in confirmed:
        if candidate.verdict != "certified":
            break
        best = candidate
    return best


def _percent(chance: float) -> str:
    return "over 99.9%" if chance > 0.999 else f"{chance:.1%}"


def _cheapest_first(trial: Trial) -> tuple[float, float, int]:
    return trial.cost, trial.metrics.gap_pct, trial.number
