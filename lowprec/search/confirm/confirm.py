"""Confirmation: the best plans of a search on a later window, and one recommendation for each budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from lowprec.core.errors import ModelError
from lowprec.evaluation.stats.confidence import Verdict
from lowprec.plan import Plan
from lowprec.search.confirm.alpha_spending import confidence_of_attempt
from lowprec.search.confirm.choice import Choice, Confirmed, finalists, next_try, recommended
from lowprec.search.record.trial import Trial
from lowprec.search.rule import Forecast

__all__ = ["Recommendation", "Tries", "confirm"]

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


class Tries:
    """The tries of a run on its confirm window, which share one error rate: each has a stricter confidence."""

    def __init__(
        self, evaluate: EvaluateThere, *, confidence: float, found: Sequence[Trial] = (), num_spent: int = 0
    ) -> None:
        """Take up the tries so far.

        confidence: of all tries together. found: confirmed trials of this run from before a resumption, which keep the
        try that they were part of. num_spent: tries of other runs on this window, which have spent their parts.
        """
        self._evaluate, self._confidence, self._num_spent = evaluate, confidence, num_spent
        self._known = {trial.plan: trial for trial in found}
        self.next = max(num_spent, 1 + max((trial.wave for trial in found), default=-1))
        # The try that the finalists are, or were before a resumption.
        self.first = min((trial.wave for trial in found), default=self.next)

    def confidence(self, attempt: int) -> float:
        """Of the bounds of one try."""
        return confidence_of_attempt(self._confidence, attempt)

    def new(self, choices: Iterable[Choice]) -> list[Trial]:
        """The trials among choices whose plans were not evaluated on this window."""
        return list({c.trial.plan: c.trial for c in choices if c.trial.plan not in self._known}.values())

    def add(self, trials: Sequence[Trial]) -> None:
        """Evaluate plans together, as the next try."""
        if trials:
            evaluated = self._evaluate(trials, self.confidence(self.next), self.next)
            self._known |= {trial.plan: trial for trial in evaluated}
            self.next += 1

    def confirmed(self, choice: Choice, budget_pct: float) -> Confirmed:
        """A choice whose plan was evaluated, against a budget."""
        trial = self._known[choice.trial.plan]
        return Confirmed(choice, trial.metrics, trial.metrics.verdict(budget_pct), trial.rows, trial.wave)

    def before(self, attempt: int) -> set[Plan]:
        """The plans of tries before this one: their intervals are not as strict."""
        return {plan for plan, trial in self._known.items() if trial.wave < attempt}

    @property
    def spent(self) -> str:
        """Why the next try is not at the first confidence, in a sentence; empty where it is."""
        if not self.next:
            return ""
        if self._num_spent:
            times = f"time{'s' * (self._num_spent != 1)}"
            why = f"the confirm window of this checkpoint was used {self._num_spent} {times} before"
        else:
            why = f"{len(self._known)} plans of this run were confirmed on the same window before"
        return (
            f"{why}: new plans need {100 * self.confidence(self.next):.6g} percent confidence, so that all attempts "
            f"together keep {100 * self._confidence:g} percent; a newer confirm window starts afresh"
        )


def confirm(
    trials: Sequence[Trial],
    budgets: Sequence[float],
    forecast: Forecast,
    tries: Tries,
    *,
    note: Callable[[str], None],
    reference_cost: float = math.inf,
) -> list[Recommendation]:
    """One recommendation for each budget; raises `ModelError` where no trial has a finite gap.

    The finalists of all budgets are evaluated together. Where none of a budget's is certified, safer plans are tried
    one by one, each at a stricter confidence, so that all tries on this window together keep one confidence.
    """
    forecast = forecast.at(tries.confidence(tries.first))
    choices = {budget: finalists(trials, budget, forecast, reference_cost) for budget in budgets}
    if not all(choices.values()):
        raise ModelError("search: no plan gives finite logits; look for huge weights in the checkpoint")
    for budget, chosen in choices.items():
        if not chosen[0].meets_budget:
            note(f"no plan meets the budget of {budget} percent")
    new = tries.new(c for chosen in choices.values() for c in chosen)
    if new and tries.spent:
        note(tries.spent)
    tries.add(new)
    tried = {budget: [tries.confirmed(c, budget) for c in chosen] for budget, chosen in choices.items()}
    best = {budget: recommended(confirmed) for budget, confirmed in tried.items()}
    for later in count(1):
        failed = [budget for budget in budgets if best[budget].verdict != "certified"]
        # Nor what was confirmed for another budget in an earlier try: its interval is not as strict as this one's.
        earlier = tries.before(tries.first + later)
        tested = {budget: earlier | {c.choice.trial.plan for c in tried[budget]} for budget in failed}
        safer = {budget: next_try(trials, budget, forecast, tested[budget], later) for budget in failed}
        fresh = {budget: choice for budget, choice in safer.items() if choice is not None}
        if not fresh:
            break
        if new := tries.new(fresh.values()):
            note(
                "no plan was certified on the confirm window: trying "
                f"{'a safer one' if len(new) == 1 else f'{len(new)} safer ones'} at "
                f"{100 * tries.confidence(tries.next):.5g} percent confidence"
            )
        tries.add(new)
        for budget, choice in fresh.items():
            tried[budget].append(tries.confirmed(choice, budget))
            if tried[budget][-1].verdict == "certified":
                best[budget] = tried[budget][-1]
    return [_recommendation(budget, best[budget], tried[budget], reference_cost, note) for budget in budgets]


def _recommendation(
    budget: float, best: Confirmed, tried: Sequence[Confirmed], reference_cost: float, note: Callable[[str], None]
) -> Recommendation:
    saves = best.choice.trial.cost < reference_cost
    if not saves:
        note(
            f"the recommended plan for a budget of {budget:g} % saves nothing, so the search is inconclusive; "
            "search and confirm on more traffic, or raise the budget"
        )
    return Recommendation(budget, best, tuple(tried), saves)
