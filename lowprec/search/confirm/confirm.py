"""Confirmation: the best plans of a search on a later window, and one recommendation for each budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowprec.core.errors import ModelError
from lowprec.evaluation.stats.confidence import Verdict
from lowprec.plan import Plan
from lowprec.search.confirm.alpha_spending import confidence_of_attempt
from lowprec.search.confirm.choice import Choice, Confirmed, finalists, next_try, recommended
from lowprec.search.record.trial import Trial
from lowprec.search.rule import Forecast

__all__ = ["Recommendation", "confirm"]

# Evaluates plans on the whole confirm window at a confidence, as one try; gives their trials there, in order.
EvaluateThere = Callable[[Sequence[Trial], float, int], list[Trial]]


@dataclass(frozen=True)
class Recommendation:
    """The plan for one budget, and all that were confirmed for it: finalists safest first, then later tries.

    saves: whether the plan costs less than the reference.
    """

    budget_pct: float
    best: Confirmed
    tried: tuple[Confirmed, ...]
    saves: bool = True

    @property
    def verdict(self) -> Verdict:
        """That of the plan; a plan that saves nothing is no success, whatever its gap."""
        return self.best.verdict if self.saves else "inconclusive"


def confirm(
    trials: Sequence[Trial],
    budgets: Sequence[float],
    *,
    forecast: Forecast,
    found: Sequence[Trial],
    confidence: float,
    evaluate: EvaluateThere,
    note: Callable[[str], None],
    reference_cost: float = math.inf,
    num_spent: int = 0,
) -> list[Recommendation]:
    """One recommendation for each budget; raises `ModelError` where no trial has a finite gap.

    The finalists of all budgets are evaluated together. Where none of a budget's is certified, safer plans are tried
    one by one, each at a stricter confidence, so that all tries on this window together keep `confidence`. `found` are
    the confirmed trials of this run from before a resumption: they keep the try that they were part of. num_spent:
    tries of other runs on this window, which have spent their parts of the error rate.
    """
    attempts = max(num_spent, 1 + max((trial.wave for trial in found), default=-1))
    # The try that the finalists are, or were before a resumption.
    first = min((trial.wave for trial in found), default=attempts)
    forecast = forecast.at(confidence_of_attempt(confidence, first))
    choices = {budget: finalists(trials, budget, forecast, reference_cost) for budget in budgets}
    if not all(choices.values()):
        raise ModelError("search: no plan gives finite logits; look for huge weights in the checkpoint")
    for budget, chosen in choices.items():
        if not chosen[0].meets_budget:
            note(f"no plan meets the budget of {budget} percent")
    known = {trial.plan: trial for trial in found}
    new = {c.trial.plan: c.trial for chosen in choices.values() for c in chosen if c.trial.plan not in known}
    if new:
        if attempts:
            note(
                f"{_spent(len(known), num_spent)}: new plans need "
                f"{100 * confidence_of_attempt(confidence, attempts):.6g} percent confidence, so that all attempts "
                f"together keep {100 * confidence:g} percent; a newer confirm window starts afresh"
            )
        known |= _evaluated(list(new.values()), confidence, attempts, evaluate)
        attempts += 1
    tried = {
        budget: [_confirmed(choice, known[choice.trial.plan], budget) for choice in chosen]
        for budget, chosen in choices.items()
    }
    best = {budget: recommended(confirmed) for budget, confirmed in tried.items()}
    later = 1
    while failed := [budget for budget in budgets if best[budget].verdict != "certified"]:
        fresh: dict[float, Choice] = {}
        for budget in failed:
            # Nor what was confirmed for another budget in an earlier try: its interval is not as strict as this one's.
            tested = {c.choice.trial.plan for c in tried[budget]} | {
                p for p, t in known.items() if t.wave < first + later
            }
            if choice := next_try(trials, budget, forecast, tested, later):
                fresh[budget] = choice
        if not fresh:
            break
        unknown = {c.trial.plan: c.trial for c in fresh.values() if c.trial.plan not in known}
        if unknown:
            note(
                "no plan was certified on the confirm window: trying "
                f"{'a safer one' if len(unknown) == 1 else f'{len(unknown)} safer ones'} at "
                f"{100 * confidence_of_attempt(confidence, attempts):.5g} percent confidence"
            )
            known |= _evaluated(list(unknown.values()), confidence, attempts, evaluate)
            attempts += 1
        for budget, choice in fresh.items():
            tried[budget].append(_confirmed(choice, known[choice.trial.plan], budget))
            if tried[budget][-1].verdict == "certified":
                best[budget] = tried[budget][-1]
        later += 1
    found_for = []
    for budget in budgets:
        saves = best[budget].choice.trial.cost < reference_cost
        if not saves:
            note(
                f"the recommended plan for a budget of {budget:g} % saves nothing, so the search is inconclusive; "
                "search and confirm on more traffic, or raise the budget"
            )
        found_for.append(Recommendation(budget, best[budget], tuple(tried[budget]), saves))
    return found_for


def _spent(num_known: int, num_spent: int) -> str:
    """Which tries have spent a part of the error rate already."""
    if num_spent:
        return f"the confirm window of this checkpoint was used {num_spent} time{'s' * (num_spent != 1)} before"
    return f"{num_known} plans of this run were confirmed on the same window before"


def _evaluated(new: Sequence[Trial], confidence: float, attempt: int, evaluate: EvaluateThere) -> dict[Plan, Trial]:
    return {trial.plan: trial for trial in evaluate(new, confidence_of_attempt(confidence, attempt), attempt)}


def _confirmed(choice: Choice, trial: Trial, budget: float) -> Confirmed:
    return Confirmed(choice, trial.metrics, trial.metrics.verdict(budget), trial.rows, trial.wave)
