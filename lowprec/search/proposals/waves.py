"""Which plans are evaluated next. Nothing decides but the config, the profile and the trials of the waves before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowprec.config import SearchConfig
from lowprec.plan import Plan
from lowprec.search.proposals.descent import descent
from lowprec.search.proposals.study import Known, propose
from lowprec.search.record.trial import Trial
from lowprec.search.space.space import SearchSpace, at_least_as_exact
from lowprec.search.surrogate.surrogate import Surrogate, build_surrogate

__all__ = ["next_wave"]


def next_wave(
    surrogate: Surrogate,
    space: SearchSpace,
    settings: SearchConfig,
    before: Sequence[Trial],
    wave: int,
    start: Plan | None,
) -> tuple[str, list[Plan]]:
    """The kind of a wave and its plans.

    First uniform plans, or, from a plan to start with, that plan and what makes some of its units more exact. Then the
    front of the quadratic model, and then in turn cheaper plans that may meet the rule and, where there are none, what
    the sampler proposes around the front: in the end every plan of a small space. The limit on trials decides nothing
    here, because a run may be resumed with another one.
    """
    costs, size = surrogate.costs, settings.wave_size
    if wave == 0:
        kind = "uniform" if start is None else "start"
        first = space.uniform_plans() if start is None else _around(surrogate, space, settings, start)
        if first := [plan for plan in first if costs.keeps_limits(plan)]:
            return kind, first
    known = [Known(t.plan, t.cost, surrogate.forecast.risk_pct(t)) for t in before]
    is_first = all(trial.kind in ("uniform", "start") for trial in before)
    seed = int(np.random.SeedSequence([settings.seed, wave]).generate_state(1)[0])
    if not is_first and (plans := descent(surrogate, before, max(1, size // 2))):
        return "descent", plans
    # The front gets a wave of double size; those that follow are what the sampler proposes around it.
    count = 2 * size if is_first else size
    plans = propose(
        space,
        known,
        enqueued=surrogate.candidates(count) if is_first else (),
        front=surrogate.anchor_points(),
        distance_to_front=surrogate.distance_to_front,
        is_allowed=costs.keeps_limits,
        count=count,
        budget_pct=settings.all_budgets[-1],
        seed=seed,
    )
    return "front" if is_first else "optuna", plans


def _around(surrogate: Surrogate, space: SearchSpace, settings: SearchConfig, start: Plan) -> list[Plan]:
    """A plan, and the front of those that are at least as exact everywhere."""
    near = build_surrogate(
        surrogate.measured,
        at_least_as_exact(space, start),
        surrogate.costs,
        budgets=settings.all_budgets,
        forecast=surrogate.forecast,
    )
    return list(dict.fromkeys([start, *near.candidates(settings.wave_size - 1)]))[: settings.wave_size]
