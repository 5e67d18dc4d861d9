"""Optuna proposes plans. The study is rebuilt from the trials for every wave, so it has no state of its own to lose."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution

from lowprec.plan import Plan, Precision
from lowprec.search.space import SearchSpace
from lowprec.search.trial import Trial, pareto_front

__all__ = ["propose"]

# Proposals that were evaluated before are dropped; after this many in a row the wave is filled with other plans.
MAX_REPEATS = 8
# Spaces up to this size are listed when plans run out, so that none is missed.
MAX_ENUMERATED = 20_000


def propose(space: SearchSpace, trials: Sequence[Trial], *, count: int, budget_pct: float, seed: int) -> list[Plan]:
    """Up to `count` plans not evaluated yet, minimising (bytes, gap) under gap <= budget; fewer when none are left.

    The same trials, in the same order, and the same seed give the same plans, in this process or another.
    """
    distributions: dict[str, BaseDistribution] = {
        d.name: CategoricalDistribution([str(p) for p in d.choices]) for d in space.free
    }
    known = {trial.plan for trial in trials}
    if not distributions:
        return []
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = _study(space, trials, distributions, budget_pct, seed)
        proposals: list[Plan] = []
        repeats = 0
        while len(proposals) < count and repeats < MAX_REPEATS:
            asked = study.ask(fixed_distributions=distributions)
            plan = space.plan({name: Precision(text) for name, text in asked.params.items()})
            if plan in known:
                repeats += 1
            else:
                known.add(plan)
                proposals.append(plan)
                repeats = 0
    finally:
        optuna.logging.set_verbosity(verbosity)
    return proposals + _others(space, trials, known, count - len(proposals), seed)


def _study(
    space: SearchSpace,
    trials: Sequence[Trial],
    distributions: dict[str, BaseDistribution],
    budget_pct: float,
    seed: int,
) -> optuna.Study:
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0, constant_liar=True)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for trial in trials:
        gap = trial.metrics.gap_pct
        if math.isfinite(gap):
            study.add_trial(
                optuna.trial.create_trial(
                    params={name: str(p) for name, p in space.choices(trial.plan).items() if name in distributions},
                    distributions=distributions,
                    values=[math.log(trial.size_bytes), gap],
                    constraints={"budget": gap - budget_pct},
                )
            )
    return study


def _others(space: SearchSpace, trials: Sequence[Trial], known: set[Plan], count: int, seed: int) -> list[Plan]:
    """Plans not known yet: any of a small space, else those one decision away from the front or from other trials."""
    if count <= 0:
        return []
    rng = random.Random(seed)
    if space.num_plans <= MAX_ENUMERATED:
        names = [d.name for d in space.decisions]
        every = itertools.product(*(d.choices for d in space.decisions))
        fresh = [p for p in (space.plan(dict(zip(names, choices, strict=True))) for choices in every) if p not in known]
        return rng.sample(fresh, min(count, len(fresh)))
    found: dict[Plan, None] = {}
    front = [trial.plan for trial in pareto_front(trials)]
    for plans in (front, [trial.plan for trial in trials], [space.most_exact]):
        moves = [plan.replace(dict.fromkeys(d.units, p)) for plan in plans for d in space.free for p in d.choices]
        fresh = [plan for plan in dict.fromkeys(moves) if plan not in known and plan not in found]
        found.update(dict.fromkeys(rng.sample(fresh, min(count - len(found), len(fresh)))))
    return list(found)
