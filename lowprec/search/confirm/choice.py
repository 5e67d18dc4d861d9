"""Which plans to confirm, and which one to recommend."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lowprec.evaluation.metrics import PlanMetrics
from lowprec.evaluation.rows import RowAccount
from lowprec.evaluation.stats.confidence import Verdict
from lowprec.plan import Plan
from lowprec.search.record.trial import Trial
from lowprec.search.rule import Forecast

__all__ = ["Choice", "Confirmed", "finalists", "next_try", "recommended"]

# Probabilities of certification that finalists reach at least: the first is the boldest, the last almost certain.
LADDER = (0.5, 0.8, 0.95, 0.995)
# If all finalists fail on the confirm window: shares of the budget that the risk of the next plan may use, by attempt.
LATER_TRIES = (0.25, 0.1)


@dataclass(frozen=True)
class Choice:
    """A trial to confirm: whether it meets the budget on the search window, and how it was picked.

    probability: the expected probability of certification; None where it is unknown.
    """

    trial: Trial
    meets_budget: bool
    because: str
    probability: float | None = None


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

    For each probability of `LADDER`, the cheapest plan that reaches it (see `rule`). If no plan does, the cheapest plan
    whose estimated gap is within budget, else the most accurate plan. If all finalists cost as much as the reference,
    the cheapest plan whose gap and KL gap are within budget is added: the confirm window may provide more evidence than
    expected.
    """
    trials = [t for t in trials if math.isfinite(t.metrics.gap_pct)]
    chosen: dict[int, Choice] = {}
    for wanted in LADDER:
        likely = [t for t in trials if forecast.probability(t, budget_pct) >= wanted]
        if likely:
            cheapest = min(likely, key=_cheapest_first)
            found = forecast.probability(cheapest, budget_pct)
            because = (
                f"cheapest plan with a probability of certification of at least {wanted:.1%} on the confirm window "
                f"(estimated: {_percent(found)})"
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
        "gap, plus the margin of the confirm window's bound"
    )
    return Choice(min(safe, key=_cheapest_first), True, because)


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


def _percent(probability: float) -> str:
    return "over 99.9%" if probability > 0.999 else f"{probability:.1%}"


def _cheapest_first(trial: Trial) -> tuple[float, float, int]:
    return trial.cost, trial.metrics.gap_pct, trial.number
