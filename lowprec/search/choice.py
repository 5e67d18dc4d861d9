"""Which plans to confirm, and which one to recommend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowprec.evaluation.confidence import Verdict
from lowprec.evaluation.evaluate import RowAccount
from lowprec.evaluation.metrics import PlanMetrics
from lowprec.search.trial import Trial

__all__ = ["Choice", "Confirmed", "finalists", "recommended"]

# Shares of the budget that a finalist's risk may use up: the first is the boldest, the others leave room for bad luck.
LADDER = (1.0, 0.7, 0.45)


@dataclass(frozen=True)
class Choice:
    """A trial to confirm: whether it meets the budget on the search window, and how it was picked."""

    trial: Trial
    meets_budget: bool
    because: str


@dataclass(frozen=True)
class Confirmed:
    """A choice, evaluated in full on the confirm window."""

    choice: Choice
    metrics: PlanMetrics
    verdict: Verdict
    rows: RowAccount


def finalists(trials: Sequence[Trial], budget_pct: float) -> list[Choice]:
    """The plans worth confirming, safest first; empty without trials that have a finite gap.

    Each is the cheapest plan whose risk is within a share of the budget. The risk of a plan is the upper end of its
    interval, or of one as wide around its KL gap where that is higher: choosing by the estimate would pick the plans
    that noise favours. Without such a plan it is the cheapest whose estimate is within budget, else the most accurate.
    """
    trials = [t for t in trials if math.isfinite(t.metrics.gap_pct)]
    chosen: dict[int, Choice] = {}
    for share in LADDER:
        safe = [t for t in trials if _risk_pct(t.metrics) <= share * budget_pct]
        if safe:
            trial = min(safe, key=_cheapest_first)
            because = f"cheapest plan whose gap on the search window is at worst {share:.0%} of the budget"
            chosen.setdefault(trial.number, Choice(trial, True, because))
    if chosen:
        return sorted(chosen.values(), key=lambda c: _cheapest_first(c.trial), reverse=True)
    likely = [t for t in trials if t.metrics.gap_pct <= budget_pct]
    if likely:
        because = "cheapest plan whose estimated gap is within budget; no interval is narrow enough to be sure"
        return [Choice(min(likely, key=_cheapest_first), True, because)]
    if trials:
        best = min(trials, key=lambda t: (t.metrics.gap_pct, t.size_bytes))
        return [Choice(best, False, "no plan meets the budget; this is the most accurate one so far")]
    return []


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


def _cheapest_first(trial: Trial) -> tuple[int, float, int]:
    return trial.size_bytes, trial.metrics.gap_pct, trial.number


def _risk_pct(metrics: PlanMetrics) -> float:
    interval = metrics.gap_interval_pct
    return max(interval.upper, metrics.kl_pct + (interval.upper - interval.lower) / 2)
