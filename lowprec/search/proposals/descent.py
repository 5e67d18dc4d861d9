"""The last step of a search: cheaper plans than the best one so far that may still meet the rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from lowprec.plan import Plan
from lowprec.search.record.trial import Trial
from lowprec.search.surrogate.proxy import Float
from lowprec.search.surrogate.surrogate import Surrogate

__all__ = ["descent"]

# Trials whose risk is nearest to the budget, by which predicted risks are corrected.
NUM_NEAREST = 12
# Predicted risks are never taken to be surer than this (a standard deviation of their logarithm).
MIN_SPREAD = 0.003
# A plan is not worth an evaluation where it is expected to save less than this share of the cost.
MIN_SAVING = 2e-4


@dataclass(frozen=True)
class _Correction:
    """Measured risks over predicted ones around a budget: the mean of their logarithm and its standard deviation."""

    shift: float
    spread: float


def descent(surrogate: Surrogate, trials: Sequence[Trial], count: int) -> list[Plan]:
    """Up to `count` plans that were not evaluated yet, for each budget those that are expected to save most.

    The expected saving of a plan is what it costs less than the cheapest trial that meets the rule, times the
    probability that it meets the rule too: its predicted risk, corrected by the trials around the budget, has a
    log-normal error. Every plan of a small space is looked at, of a large one the front and the neighbours of the best.
    """
    tried = {trial.plan for trial in trials}
    risks = np.array([surrogate.forecast.risk_pct(trial) for trial in trials])
    predicted = surrogate.risk.risks([trial.plan for trial in trials])
    chosen: dict[Plan, None] = {}
    each = -(-count // len(surrogate.budgets))
    for budget in surrogate.budgets:
        correction = _correction(risks, predicted, budget)
        meets = [trial for trial, risk in zip(trials, risks, strict=True) if risk <= budget]
        best = min(meets, key=lambda trial: (trial.cost, trial.number), default=None)
        cost, risk, plan_of = surrogate.alternatives(best.plan if best else None)
        limit = best.cost if best else float(surrogate.front.points[-1].cost)
        saving = (limit - cost) / max(limit, 1e-300) * _chance(risk, budget, correction)
        taken = 0
        for k in np.argsort(-saving, kind="stable")[: each + len(tried) + len(chosen)]:
            if saving[k] < MIN_SAVING or taken == each:
                break
            plan = plan_of(int(k))
            if plan not in tried and plan not in chosen:
                chosen[plan] = None
                taken += 1
    return list(chosen)[:count]


def _correction(risks: Float, predicted: Float, budget: float) -> _Correction:
    """From the trials whose measured risk is nearest to the budget, on a log scale."""
    known = np.flatnonzero(np.isfinite(risks) & (risks > 0) & (predicted > 0))
    distance = np.abs(np.log(risks[known] / budget))
    nearest = known[np.argsort(distance, kind="stable")[:NUM_NEAREST]]
    if not len(nearest):
        return _Correction(0.0, 0.1)
    ratio = np.log(risks[nearest] / predicted[nearest])
    spread = float(ratio.std(ddof=1)) if len(ratio) > 1 else 0.1
    return _Correction(float(np.median(ratio)), max(spread, MIN_SPREAD))


def _chance(risk: Float, budget: float, correction: _Correction) -> Float:
    """The probability that plans of these predicted risks meet the budget."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (math.log(budget) - np.log(np.maximum(risk, 0.0)) - correction.shift) / correction.spread
    return np.asarray(special.ndtr(z))
