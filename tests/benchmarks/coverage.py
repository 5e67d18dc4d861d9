"""How often a search certifies what it should not, and how many examples it takes to certify what it should.

Simulated searches where the truth is known. Mixed plans of the demo model are evaluated exactly on its 450,000 held-out
examples, which are the truth: the change of every logit is scaled by the one factor that puts the plan's gap on them
where it is wanted, right at the budget or at a multiple of it. A simulated window is drawn with replacement from slices
of 1,000 of these examples, and everything after that is what `lowprec search` does: the profile of the window, a race
of all plans on slices in random order, finalists, and confirmation on a second window with its later tries.

2,000 searches have no plan below the budget, so whatever is certified is false: by the race, by an estimate that is
looked at after every slice rather than lap by lap, and by `confirm`. Others have all plans at half the budget and say
how many examples a certificate takes, beside a plain confidence sequence on exact losses, looked at after every batch.

Prints one JSON object as its last line: `false_certified_rate` (the highest of the three) with its limit, each of the
rates, and power.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from demo_examples import Examples, Replay, exact_logits, mixed_plans, read_examples
from demo_model import large_demo_config
from numpy.typing import NDArray
from scipy.optimize import brentq

from lowprec.evaluation.confidence import RatioMoments, ratio_interval, verdict
from lowprec.evaluation.estimate import MIN_SLICES, estimates
from lowprec.evaluation.evaluate import evaluate_plans
from lowprec.evaluation.measure import measure_profile
from lowprec.evaluation.profile import Profile, ProfilePart, ProfileTask
from lowprec.evaluation.race import RaceSums, RaceTask
from lowprec.evaluation.rows import RowAccount
from lowprec.evaluation.worker import Chunk
from lowprec.plan import Plan
from lowprec.search import open_job
from lowprec.search.confirm import confirm
from lowprec.search.racing import laps, race
from lowprec.search.trial import Trial

Float = NDArray[np.float64]
Index = NDArray[np.int64]

BUDGET, CONFIDENCE = 0.05, 0.95
NUM_SEARCHES, NUM_POWER = 2000, 200
# True gaps of the plans of a search, over the budget; cheaper ones are worse.
MULTIPLES = (1.0, 1.0, 1.0, 1.5, 2.5)
# And where power is asked for.
HALF = 0.5
SLICE, SEARCH_SLICES, CONFIRM_SLICES = 1000, 250, 200
# Times that the pool is cut into slices, each time in another order.
NUM_CUTS = 3
# A batch of traffic in slices, and how many of them a plain sequence may take.
BATCH_SLICES, PLAIN_BATCHES = 4, 250


@dataclass(frozen=True)
class Slice:
    """What the examples of one slice of the pool add to a profile and to a race of all plans."""

    profile: ProfilePart
    race: RaceSums


@dataclass(frozen=True)
class Pool:
    """Slices to draw windows from, and the plans with their true gaps in percent."""

    examples: Examples
    plans: tuple[Plan, ...]
    slices: tuple[Slice, ...]
    gaps: tuple[float, ...]

    @property
    def costs(self) -> list[float]:
        """The first plan is the dearest."""
        return [float(len(self.plans) - k) for k in range(len(self.plans))]

    def window(self, num_slices: int, rng: np.random.Generator) -> "Drawn":
        """A window of slices drawn with replacement."""
        return Drawn(self, rng.integers(0, len(self.slices), num_slices))


class Drawn:
    """A window and the workers that sum it up: every slice drawn is a batch."""

    def __init__(self, pool: Pool, drawn: Index) -> None:
        self._pool, self._drawn = pool, drawn
        self.num_batches, self.num_rows = len(drawn), SLICE * len(drawn)

    def run(self, _: object, tasks: Sequence[Any]) -> Iterator[Chunk[Any]]:
        """What each task would give."""
        for task in tasks:
            slices = [self._pool.slices[self._drawn[k]] for k in task.batches]
            if isinstance(task, ProfileTask):
                parts: list[Any] = [s.profile for s in slices]
            else:
                at = [self._pool.plans.index(plan) for plan in task.plans]
                whole = [s.race for s in slices] if isinstance(task, RaceTask) else [s.race.exact for s in slices]
                parts = whole if at == list(range(len(self._pool.plans))) else [sums.only(at) for sums in whole]
            yield Chunk(total(parts), SLICE * len(slices))

    def close(self) -> None:
        """Nothing is held."""

    def profile(self) -> Profile:
        """The profile of the window."""
        columns = self._pool.examples.columns
        return measure_profile(self, self, columns, by_group=False, batches_per_task=64).profile

    def lap(self, plans: Sequence[Plan], slices: Sequence[int]) -> RaceSums:
        """Plans on some of the window's slices."""
        task = RaceTask(tuple(plans), self._pool.examples.columns, tuple(slices), (), (), keep="")
        return next(self.run(None, [task])).sums


def total(parts: Sequence[Any]) -> Any:
    """Their sum, in order."""
    found = parts[0]
    for part in parts[1:]:
        found = found + part
    return found


def make_pool(examples: Examples, logits: Mapping[Plan, NDArray[np.float32]], gaps: Sequence[float]) -> Pool:
    """The pool in which the plans, each a unit of its own, have these true gaps in percent."""
    by_plan, alone = examples.by_plan(list(logits))
    scaled_changes, scaled_logits = by_plan.changes.copy(), {}
    for k, (plan, own, gap) in enumerate(zip(alone, logits.values(), gaps, strict=True)):
        change = own.astype(float) - examples.reference
        factor = brentq(lambda f, c=change, g=gap: gap_pct(examples, f * c) - g, 0.3, 4.0, xtol=1e-6)
        scaled_changes[k] *= factor
        scaled_logits[plan] = (examples.reference + factor * change).astype(np.float32)
        found = gap_pct(examples, scaled_logits[plan].astype(float) - examples.reference)
        assert abs(found - gap) < 1e-5, f"the gap is {found} percent, not {gap}"
    by_plan = replace(by_plan, changes=scaled_changes)
    replay, slices = Replay(by_plan, scaled_logits), []
    rng = np.random.default_rng(2)
    for _ in range(NUM_CUTS):
        for rows in np.split(rng.permutation(len(examples)), len(examples) // SLICE):
            batch = by_plan.batch(rows)
            profile = ProfileTask(by_plan.columns, 20, (0,)).sums(replay, batch)
            sums = RaceTask(tuple(alone), by_plan.columns, (0,), ((0,),), (1,), "").sums(replay, batch)
            # AUC is not looked at: one bin is kept of thousands.
            bins = sums.exact.histogram.sum(axis=2, keepdims=True)
            slices.append(Slice(profile, replace(sums, exact=replace(sums.exact, histogram=bins))))
    return Pool(by_plan, tuple(alone), tuple(slices), tuple(gaps))


def gap_pct(examples: Examples, change: Float) -> float:
    """The gap over all examples of a change of their logits."""
    z, y = examples.reference.astype(float), examples.labels
    loss, changed = (np.logaddexp(0, v) - y * v for v in (z, z + change))
    return float(100 * (changed.sum() / loss.sum() - 1))


@dataclass(frozen=True)
class Searched:
    """One simulated search: for each plan whether it was ever certified and, if so, after how many slices."""

    raced: list[bool]
    raced_slices: list[int]
    peeked_slices: list[float]
    confirmed: Plan | None


def search(pool: Pool, rng: np.random.Generator, num_slices: int = SEARCH_SLICES) -> Searched:
    """A search over the plans of the pool, on a window of so many slices."""
    window, later = pool.window(num_slices, rng), pool.window(CONFIRM_SLICES * num_slices // SEARCH_SLICES, rng)
    profile = window.profile()
    order = [int(k) for k in rng.permutation(num_slices)]
    finishes = race(pool.plans, pool.costs, window.lap, profile, order, budgets=[BUDGET], confidence=CONFIDENCE)
    nothing = RowAccount(0, 0, 0, {})
    trials = [
        Trial(str(k), k, 0, "front", f.plan, int(f.cost), None, f.cost, None, f.estimate.metrics, f.on_window, nothing)
        for k, f in enumerate(finishes)
    ]

    def confirmed(chosen: Sequence[Trial], confidence: float, attempt: int) -> list[Trial]:
        plans = [trial.plan for trial in chosen]
        found = evaluate_plans(later, later, plans, confidence=confidence, batches_per_task=BATCH_SLICES)
        return [replace(t, metrics=m, wave=attempt) for t, m in zip(chosen, found.metrics, strict=True)]

    (best,) = confirm(trials, [BUDGET], found=[], confidence=CONFIDENCE, evaluate=confirmed, note=lambda _: None)
    return Searched(
        raced=[f.estimate.metrics.verdict(BUDGET) == "certified" for f in finishes],
        raced_slices=[f.num_slices for f in finishes],
        peeked_slices=peeked(pool, window, profile, order),
        confirmed=best.best.choice.trial.plan if best.best.verdict == "certified" else None,
    )


def peeked(pool: Pool, window: Drawn, profile: Profile, order: Sequence[int]) -> list[float]:
    """After how many slices each plan is certified if one looks after every single one; infinite where it never is."""
    found = [math.inf] * len(pool.plans)
    running = list(range(len(pool.plans)))
    sums: RaceSums | None = None
    for seen in range(1, laps(len(order))[-1] + 1):
        new = window.lap([pool.plans[k] for k in running], order[seen - 1 : seen])
        sums = new if sums is None else sums + new
        if seen < MIN_SLICES:
            continue
        plans = [pool.plans[k] for k in running]
        looked = estimates(sums, profile, plans, num_slices=len(order), confidence=CONFIDENCE)
        verdicts = [estimate.metrics.verdict(BUDGET) for estimate in looked]
        for k, said in zip(running, verdicts, strict=True):
            if said == "certified":
                found[k] = seen
        kept = [i for i, said in enumerate(verdicts) if said == "inconclusive"]
        if not kept:
            break
        if len(kept) < len(running):
            sums, running = sums.only(kept), [running[i] for i in kept]
    return found


def plain_sequence(moments: Float, rng: np.random.Generator) -> list[float]:
    """Examples after which a confidence sequence on exact losses alone certifies each plan; infinite where none do.

    moments: float64[num_slices, P, 10], of `Sums.moments`, for every slice of a pool. It looks after every batch.
    """
    found = []
    for running in np.cumsum(_batches(moments, rng), axis=0).swapaxes(0, 1):
        for look, (x, xx, xy, xxxx, *_, y, yy) in enumerate(running.tolist(), start=1):
            n = look * BATCH_SLICES * SLICE
            sums = RatioMoments(n, x, y, xx, xy, yy, xxxx)
            interval = ratio_interval(sums, 1 - CONFIDENCE, tuned_for=SEARCH_SLICES * SLICE)
            if verdict(interval, BUDGET / 100) == "certified":
                found.append(float(n))
                break
        else:
            found.append(math.inf)
    return found


def naive_rule(moments: Float, rng: np.random.Generator) -> bool:
    """Whether one side of a 95 percent normal interval, looked at after every batch, certifies the first plan."""
    x, xx, xy, _, *_, y, yy = np.cumsum(_batches(moments, rng), axis=0)[: SEARCH_SLICES // BATCH_SLICES, 0].T
    n, b = (np.arange(len(x)) + 1) * BATCH_SLICES * SLICE, BUDGET / 100
    excess = (x - b * y) / n
    variance = (xx - 2 * b * xy + b * b * yy) / n - excess**2
    return bool((excess + 1.645 * np.sqrt(variance / n) < 0).any())


def _batches(moments: Float, rng: np.random.Generator) -> Float:
    drawn = rng.integers(0, len(moments), (PLAIN_BATCHES, BATCH_SLICES))
    return np.asarray(moments[drawn].sum(axis=1))


def false_rates(pool: Pool, rng: np.random.Generator) -> dict[str, Any]:
    """Rates of false certificates, where every certificate is one."""
    assert min(pool.gaps) >= BUDGET
    moments = np.array([s.race.exact.moments for s in pool.slices])
    searches, naive = [], 0
    for k in range(NUM_SEARCHES):
        searches.append(search(pool, rng))
        naive += naive_rule(moments, rng)
        if (k + 1) % 250 == 0:
            print(f"{k + 1} searches, {sum(s.confirmed is not None for s in searches)} confirmed falsely", flush=True)
    raced = np.array([s.raced for s in searches])
    looked = np.isfinite([s.peeked_slices for s in searches])
    return {
        "race_by_plan": raced.mean(axis=0).tolist(),
        "race_after_every_slice_by_plan": looked.mean(axis=0).tolist(),
        "race_any_plan_of_a_search": float(looked.any(axis=1).mean()),
        "confirm": float(np.mean([s.confirmed is not None for s in searches])),
        "gap_over_budget_by_plan": [round(gap / BUDGET, 3) for gap in pool.gaps],
        "naive_rule": naive / NUM_SEARCHES,
    }


def power(pool: Pool, rng: np.random.Generator) -> dict[str, Any]:
    """What it takes to certify plans that are all at half the budget."""
    moments = np.array([s.race.exact.moments for s in pool.slices])
    plain = np.array([plain_sequence(moments, rng) for _ in range(NUM_POWER)])
    found: dict[str, Any] = {"plain": _power(plain, [SEARCH_SLICES, 2 * SEARCH_SLICES])}
    for num_slices in (SEARCH_SLICES, 2 * SEARCH_SLICES):
        searches = [search(pool, rng, num_slices) for _ in range(NUM_POWER)]
        looked = SLICE * np.array([s.peeked_slices for s in searches])
        found[f"window_of_{num_slices * SLICE}"] = {
            **_power(looked, []),
            "share_of_plans_certified_by_the_race": round(float(np.mean([s.raced for s in searches])), 3),
            "share_of_searches_confirmed": round(float(np.mean([s.confirmed is not None for s in searches])), 3),
        }
        print(num_slices * SLICE, found[f"window_of_{num_slices * SLICE}"], flush=True)
    return found


def _power(examples: Float, at_slices: Sequence[int]) -> dict[str, Any]:
    """Median examples until a certificate, over all plans (None where most have none) and over those that have one."""
    median, certified = float(np.median(examples)), np.isfinite(examples)
    return {
        "examples": median if math.isfinite(median) else None,
        "examples_where_certified": float(np.median(examples[certified])) if certified.any() else None,
        "share_certified": round(float(certified.mean()), 3),
        **{f"share_by_{n * SLICE}": round(float((examples <= n * SLICE).mean()), 3) for n in at_slices},
    }


def main() -> None:
    torch.set_num_threads(1)
    began = time.perf_counter()
    job = open_job(large_demo_config())
    examples = read_examples(job)
    profile = examples.profile(np.arange(len(examples)))
    plans = mixed_plans(job, profile, kl_pct=BUDGET, count=len(MULTIPLES), rng=np.random.default_rng(0))
    logits = exact_logits(job, plans)
    rng = np.random.default_rng(1)
    print(f"{len(examples)} examples, {len(plans)} plans", flush=True)
    rates = false_rates(make_pool(examples, logits, [m * BUDGET for m in MULTIPLES]), rng)
    reported = power(make_pool(examples, logits, [HALF * BUDGET] * len(plans)), rng)
    rate = max(*rates["race_by_plan"], *rates["race_after_every_slice_by_plan"], rates["confirm"])
    allowed = 1 - CONFIDENCE
    limit = allowed + 3 * math.sqrt(allowed * (1 - allowed) / NUM_SEARCHES)
    assert rates["naive_rule"] > limit, "the simulation cannot tell a rule that is not valid from one that is"
    assert rate <= limit, f"plans that are not within budget are certified in {rate:.1%} of searches: {rates}"
    print(
        json.dumps(
            {
                "false_certified_rate": rate,
                "limit": round(limit, 4),
                "false_certified": rates,
                "examples_to_certify_half_the_budget": reported,
                "num_searches": NUM_SEARCHES,
                "budget_pct": BUDGET,
                "window_examples": SEARCH_SLICES * SLICE,
                "confirm_examples": CONFIRM_SLICES * SLICE,
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
