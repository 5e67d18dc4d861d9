"""The Pareto front over cost and predicted risk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lowprec.search.surrogate.bound import cost_bounds
from lowprec.search.surrogate.front_solver import MAX_EXHAUSTIVE, EveryPlan, front_of, swept
from lowprec.search.surrogate.local_search import Picks, PlanFront
from lowprec.search.surrogate.proxy import Float, ProxyFront, ProxyModel
from lowprec.search.surrogate.risk_model import RiskModel

__all__ = ["solve_rule"]

# The larger of gap and KL gap is approached from both sides and from the middle: shares of the first order.
MIXTURES = (0.0, 0.5, 1.0)
# Plans of a large space whose risk is computed, for each quadratic form.
MAX_SCORED = 1024


def solve_rule(gap: ProxyModel, model: RiskModel, slopes: Sequence[float]) -> ProxyFront:
    """The front over (cost, risk) of the plans that keep the limits; the `gap_pct` of its points is the risk.

    Every plan of a small space is scored. For a large space the fronts of several quadratic forms are pooled and
    scored: with a share of the first order between 0 (the KL gap alone) and 1 (the gap), and with the half width of
    intervals growing by each of `slopes` with the KL gap, as it does around each budget.
    """
    if gap.space.num_plans <= MAX_EXHAUSTIVE:
        every = EveryPlan.of(gap)
        if every is None:
            return ProxyFront((), is_exact=True)
        best = every.front(model.risks_of_all(every))
        return front_of(gap, best, best.cost, is_exact=True)
    mixtures = MIXTURES if gap.first.any() else (1.0,)
    parts = [
        replace(gap, first=share * gap.first, second=gap.second * (1 + slope)) for share in mixtures for slope in slopes
    ]
    fronts = [(part, front) for part in parts if (front := swept(part)) is not None]
    if not fronts:
        return ProxyFront((), is_exact=False)
    picks = np.unique(np.concatenate([_thinned(front) for _, front in fronts]), axis=0)
    risk = model.risks([gap.plan(row) for row in picks.tolist()])
    pooled = PlanFront.of(gap, gap.costs(picks.astype(np.int64)), risk, picks)
    return front_of(gap, pooled, _bounds(fronts, pooled), is_exact=False)


def _thinned(front: PlanFront) -> Picks:
    """At most `MAX_SCORED` plans of a front, evenly spread in their order."""
    kept = np.unique(np.linspace(0, len(front.cost) - 1, MAX_SCORED).astype(int))
    return np.asarray(front.picks[kept])


def _bounds(fronts: Sequence[tuple[ProxyModel, PlanFront]], pooled: PlanFront) -> Float:
    """Costs below which no plan is as good as each point by all of the quadratic forms, float64[P]."""
    picks = pooled.picks.astype(np.int64)
    worst = np.max([part.gaps(picks) for part, _ in fronts], axis=0)
    best = np.zeros(len(pooled.cost))
    for part, front in fronts:
        bounds = np.minimum(cost_bounds(part, front), front.cost)
        # Gaps of a front fall as its costs rise: the last point that is no better than `worst` bounds what is.
        last = np.searchsorted(-front.gap, -worst, side="right") - 1
        best = np.maximum(best, np.where(last >= 0, bounds[np.maximum(last, 0)], 0.0))
    return best
