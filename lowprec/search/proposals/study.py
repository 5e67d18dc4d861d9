"""Optuna proposes plans. Its study is rebuilt from what is known for every wave: it has no state of its own to lose."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution

from lowprec.plan import Plan, Precision
from lowprec.search.space.space import SearchSpace

__all__ = ["Known", "propose"]

# Proposals that were evaluated before are dropped; after this many in a row the wave is filled with other plans.
MAX_REPEATS = 8
# So many plans are asked for each one that is evaluated: the proxy says which of them come closest to its front.
ASKED_FOR_EACH = 2
# Spaces up to this size are listed when plans run out, so that none is missed.
MAX_ENUMERATED = 20_000


@dataclass(frozen=True)
class Known:
    """A plan whose cost and risk (percent, see `rule`) are known, or predicted by the profile."""

    plan: Plan
    cost: float
    risk_pct: float


def propose(
    space: SearchSpace,
    known: Sequence[Known],
    *,
    enqueued: Sequence[Plan] = (),
    front: Sequence[Known] = (),
    distance_to_front: Callable[[Sequence[Plan]], NDArray[np.float64]] | None = None,
    is_allowed: Callable[[Plan], bool] = lambda _: True,
    count: int,
    budget_pct: float,
    seed: int,
) -> list[Plan]:
    """Up to `count` plans not known yet, minimising (cost, risk) under risk <= budget; fewer when none are left.

    `enqueued` plans come first. The study begins with the plans that are `known` and with the points of the predicted
    `front`, so the sampler proposes around both. Of its proposals those with the least `distance_to_front` (float64,
    one a plan) are taken. Plans that are not `is_allowed` are left out. The same arguments give the same plans, in this
    process or another.
    """
    distributions: dict[str, BaseDistribution] = {
        d.name: CategoricalDistribution([str(p) for p in d.choices]) for d in space.free
    }
    seen = {item.plan for item in known}
    if not distributions:
        return [plan for plan in dict.fromkeys(enqueued) if plan not in seen and is_allowed(plan)][:count]
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = _study(space, [*known, *(p for p in front if p.plan not in seen)], distributions, budget_pct, seed)
        queue = [plan for plan in dict.fromkeys(enqueued) if plan not in seen and is_allowed(plan)][:count]
        for plan in queue:
            study.enqueue_trial(_params(space, plan, distributions))
        first = _asked(study, space, distributions, set(seen), len(queue))
        wanted = count - len(first)
        proposals = _asked(
            study, space, distributions, seen | set(first), wanted * (ASKED_FOR_EACH if distance_to_front else 1)
        )
    finally:
        optuna.logging.set_verbosity(verbosity)
    proposals = [plan for plan in proposals if is_allowed(plan)]
    if distance_to_front is not None and len(proposals) > wanted:
        order = np.argsort(distance_to_front(proposals), kind="stable")[:wanted]
        proposals = [proposals[k] for k in sorted(order)]
    found = first + proposals
    return found + _others(space, known, seen | set(found), is_allowed, count - len(found), seed)


def _asked(
    study: optuna.Study,
    space: SearchSpace,
    distributions: dict[str, BaseDistribution],
    seen: set[Plan],
    count: int,
) -> list[Plan]:
    found: list[Plan] = []
    repeats = 0
    while len(found) < count and repeats < MAX_REPEATS:
        asked = study.ask(fixed_distributions=distributions)
        plan = space.plan({name: Precision(text) for name, text in asked.params.items()})
        if plan in seen:
            repeats += 1
        else:
            seen.add(plan)
            found.append(plan)
            repeats = 0
    return found


def _study(
    space: SearchSpace,
    known: Sequence[Known],
    distributions: dict[str, BaseDistribution],
    budget_pct: float,
    seed: int,
) -> optuna.Study:
    known = [item for item in known if math.isfinite(item.risk_pct)]
    # What is known is the first generation; children cross two of its best and mutate. TPE asks tables one by one,
    # which takes far longer, and its proposals lie further from the front.
    sampler = optuna.samplers.NSGAIISampler(population_size=max(2, len(known)), seed=seed)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for item in known:
        study.add_trial(
            optuna.trial.create_trial(
                params=_params(space, item.plan, distributions),
                distributions=distributions,
                values=[math.log(max(item.cost, 1e-9)), item.risk_pct],
                constraints={"budget": item.risk_pct - budget_pct},
                system_attrs={sampler._get_generation_key(): 0},
            )
        )
    return study


def _params(space: SearchSpace, plan: Plan, distributions: dict[str, BaseDistribution]) -> dict[str, str]:
    return {name: str(p) for name, p in space.choices(plan).items() if name in distributions}


def _others(
    space: SearchSpace,
    known: Sequence[Known],
    seen: set[Plan],
    is_allowed: Callable[[Plan], bool],
    count: int,
    seed: int,
) -> list[Plan]:
    """Plans not known yet: any of a small space, else those one decision away from the best known or from others."""
    if count <= 0:
        return []
    rng = random.Random(seed)
    if space.num_plans <= MAX_ENUMERATED:
        fresh = [plan for plan in space.every_plan() if plan not in seen and is_allowed(plan)]
        return rng.sample(fresh, min(count, len(fresh)))
    found: dict[Plan, None] = {}
    by_cost = sorted(
        (item for item in known if math.isfinite(item.risk_pct)), key=lambda item: (item.cost, item.risk_pct)
    )
    best = itertools.accumulate((item.risk_pct for item in by_cost), min)
    front = [item.plan for item, least in zip(by_cost, best, strict=True) if item.risk_pct == least]
    for plans in (front, [item.plan for item in known], [space.most_exact]):
        moves = [plan.replace(dict.fromkeys(d.units, p)) for plan in plans for d in space.free for p in d.choices]
        fresh = [p for p in dict.fromkeys(moves) if p not in seen and p not in found and is_allowed(p)]
        found.update(dict.fromkeys(rng.sample(fresh, min(count - len(found), len(fresh)))))
    return list(found)
