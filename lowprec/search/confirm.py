"""Confirmation: the best plans of a search on a later window, and one recommendation for each budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowprec.errors import ModelError
from lowprec.plan import Plan
from lowprec.search.choice import Choice, Confirmed, confidence_of_try, finalists, next_try, recommended
from lowprec.search.trial import Trial

__all__ = ["Recommendation", "confirm"]

# Evaluates plans on the whole confirm window at a confidence, as one try; gives their trials there, in order.
EvaluateThere = Callable[[Sequence[Trial], float, int], list[Trial]]


@dataclass(frozen=True)
class Recommendation:
    """The plan for one budget, and all that were confirmed for it: finalists safest first, then later tries."""

    budget_pct: float
    best: Confirmed
    tried: tuple[Confirmed, ...]


def confirm(
    trials: Sequence[Trial],
    budgets: Sequence[float],
    *,
    found: Sequence[Trial],
    confidence: float,
    evaluate: EvaluateThere,
    note: Callable[[str], None],
) -> list[Recommendation]:
    """One recommendation for each budget; raises `ModelError` where no trial has a finite gap.

    The finalists of all budgets are evaluated together. Where none of a budget's is certified, safer plans are tried
    one by one, each at a stricter confidence, so that all tries on this window together keep `confidence`. `found` are
    the confirmed trials of this run from before a resumption: they keep the try that they were part of.
    """
    choices = {budget: finalists(trials, budget) for budget in budgets}
    if not all(choices.values()):
        raise ModelError("search: no plan gives finite logits; look for huge weights in the checkpoint")
    for budget, chosen in choices.items():
        if not chosen[0].meets_budget:
            note(f"no plan meets the budget of {budget} percent")
    known = {trial.plan: trial for trial in found}
    attempts = 1 + max((trial.wave for trial in found), default=-1)
    new = {c.trial.plan: c.trial for chosen in choices.values() for c in chosen if c.trial.plan not in known}
    if new:
        if attempts:
            note(
                f"{len(known)} plans of this run were confirmed on the same window before: new ones are held to "
                f"{100 * confidence_of_try(confidence, attempts):.5g} percent confidence"
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
            tested = {c.choice.trial.plan for c in tried[budget]} | {p for p, t in known.items() if t.wave < later}
            if choice := next_try(trials, budget, tested, later):
                fresh[budget] = choice
        if not fresh:
            break
        unknown = {c.trial.plan: c.trial for c in fresh.values() if c.trial.plan not in known}
        if unknown:
            note(
                "no plan was certified on the confirm window: trying "
                f"{'a safer one' if len(unknown) == 1 else f'{len(unknown)} safer ones'} at "
                f"{100 * confidence_of_try(confidence, attempts):.5g} percent confidence"
            )
            known |= _evaluated(list(unknown.values()), confidence, attempts, evaluate)
            attempts += 1
        for budget, choice in fresh.items():
            tried[budget].append(_confirmed(choice, known[choice.trial.plan], budget))
            if tried[budget][-1].verdict == "certified":
                best[budget] = tried[budget][-1]
        later += 1
    return [Recommendation(budget, best[budget], tuple(tried[budget])) for budget in budgets]


def _evaluated(new: Sequence[Trial], confidence: float, attempt: int, evaluate: EvaluateThere) -> dict[Plan, Trial]:
    return {trial.plan: trial for trial in evaluate(new, confidence_of_try(confidence, attempt), attempt)}


def _confirmed(choice: Choice, trial: Trial, budget: float) -> Confirmed:
    return Confirmed(choice, trial.metrics, trial.metrics.verdict(budget), trial.rows, trial.wave)
