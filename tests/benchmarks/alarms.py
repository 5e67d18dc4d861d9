"""How often the monitor alarms falsely in a year, and how fast it alarms rightly, beside what is usually done.

A mixed plan of the demo model is evaluated exactly on its 450,000 held-out examples, and the change of its logits
scaled by the one factor that puts its gap right at the budget, which is the hardest promise to keep, or at twice the
budget.
Sums over stretches of 2,500 examples in time order are the blocks. A day is 80 of them, drawn with replacement in
runs of neighbours (stationary bootstrap, Politis and Romano, 1994), and a quarter of them are also those of the day
before, which is more correlation from day to day than the blocks themselves show. 2,000 deployments of 365 days without
drift, and 2,000 whose gap jumps at a random day, are given to the monitor's test and to three usual rules.

Prints one JSON object as its last line: `false_alarm_rate` with its `limit`, the share of deployments that ever alarm;
`median_windows` and `detected_within_5`, windows of 200,000 examples from the jump to the alarm, the one of the jump
counted; `usual`: the same for the rules; `block_autocorrelation`: of the blocks' own deviations, at lags of 1, 2, 5 and
80 blocks; `day_effects`: false alarms and detection where days also have an effect of their own, as large as the
sampling error of a day and correlated by 0.5, for which no test was tuned.
"""

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from demo_examples import one_mixed_plan
from numpy.typing import NDArray
from scipy.optimize import brentq
from sizes import sized

from lowprec.evaluation.stats.confidence import RatioMoments
from lowprec.monitor.judging.budget_test import BudgetTest, Evidence

Float = NDArray[np.float64]

BUDGET, RATE, CONFIDENCE = 0.05, 0.05, 0.95
NUM_DEPLOYMENTS, NUM_DAYS = sized((2000, 365), (4, 12))
BLOCK, BLOCKS_A_DAY, RUN_LENGTH, SHARED = 2500, 80, 4, 0.25
NUM_BINS, PSI_LIMIT, NUM_REFERENCE = 10, 0.2, 10


@dataclass(frozen=True)
class Pool:
    """Per block: moments float64[B, 7] as `RatioMoments` has them, at the budget and at twice the budget, and counts of
    the plan's scores in bins of the reference's deciles, float64[B, NUM_BINS] each.
    """

    kept: Float
    doubled: Float
    scores_kept: Float
    scores_doubled: Float


@dataclass(frozen=True)
class Year:
    """A deployment: moments and scores of its days; the gap jumps on day `jump`, never where it is None."""

    moments: Float
    scores: Float
    jump: int | None


def make_pool() -> Pool:
    _, examples, logits = one_mixed_plan(BUDGET)
    z, y = examples.reference.astype(float), examples.labels.astype(float)
    change = logits.astype(float) - z
    loss = np.logaddexp(0, z) - y * z
    edges = np.quantile(z, np.arange(1, NUM_BINS) / NUM_BINS)

    def gap_pct(factor: float) -> float:
        moved = z + factor * change
        return float(100 * ((np.logaddexp(0, moved) - y * moved).sum() / loss.sum() - 1))

    found = []
    for gap in (BUDGET, 2 * BUDGET):
        factor = brentq(lambda f, g=gap: gap_pct(f) - g, 0.3, 6.0, xtol=1e-6)
        moved = z + factor * change
        x = np.logaddexp(0, moved) - y * moved - loss
        terms = np.stack([np.ones_like(x), x, loss, x * x, x * loss, loss * loss, x**4], axis=1)
        bins = np.eye(NUM_BINS)[np.searchsorted(edges, moved)]
        count = len(x) // BLOCK
        found += [of[: count * BLOCK].reshape(count, BLOCK, -1).sum(axis=1) for of in (terms, bins)]
        print(f"gap {gap_pct(factor):.4f} percent, {count} blocks", flush=True)
    kept, scores_kept, doubled, scores_doubled = found
    # The truth is that of the blocks: what is left over at the end is not drawn.
    for moments, gap in ((kept, BUDGET), (doubled, 2 * BUDGET)):
        moments[:, 1] += (gap / 100 - moments[:, 1].sum() / moments[:, 2].sum()) * moments[:, 2]
    return Pool(kept, doubled, scores_kept, scores_doubled)


def autocorrelation(moments: Float) -> dict[str, float]:
    """Of the blocks' sums of excess over the budget, by lag."""
    excess = moments[:, 1] - BUDGET / 100 * moments[:, 2]
    centred = excess - excess.mean()
    lags = (1, 2, 5, BLOCKS_A_DAY)
    return {str(k): round(float((centred[k:] * centred[:-k]).mean() / centred.var()), 3) for k in lags}


def draw(pool: Pool, rng: np.random.Generator, *, jumps: bool, day_effect: float) -> Year:
    """A year of days."""
    num_blocks = len(pool.kept)
    jump = int(rng.integers(0, NUM_DAYS - 5)) if jumps else None
    moments, scores = np.empty((NUM_DAYS, 7)), np.empty((NUM_DAYS, NUM_BINS))
    day = _run(rng, num_blocks, BLOCKS_A_DAY)
    kept = int(SHARED * BLOCKS_A_DAY)
    effect = rng.normal()
    for k in range(NUM_DAYS):
        day = np.concatenate([rng.permutation(day)[:kept], _run(rng, num_blocks, BLOCKS_A_DAY - kept)])
        has_jumped = jump is not None and k >= jump
        moments[k] = (pool.doubled if has_jumped else pool.kept)[day].sum(axis=0)
        scores[k] = (pool.scores_doubled if has_jumped else pool.scores_kept)[day].sum(axis=0)
        effect = 0.5 * effect + math.sqrt(0.75) * rng.normal()
        # In standard errors of the day's own sum.
        moments[k, 1] += day_effect * effect * math.sqrt(moments[k, 3])
    return Year(moments, scores, jump)


def _run(rng: np.random.Generator, num_blocks: int, count: int) -> NDArray[np.int64]:
    """Blocks in runs of neighbours of geometric length."""
    begins = rng.random(count) < 1 / RUN_LENGTH
    begins[0] = True
    starts = rng.integers(0, num_blocks, count)
    since = np.arange(count) - np.maximum.accumulate(np.where(begins, np.arange(count), 0))
    return (starts[np.arange(count) - since] + since) % num_blocks


def monitor(year: Year) -> int | None:
    """The day on which the monitor's test alarms."""
    promise = BudgetTest(budget=BUDGET / 100, false_alarm_rate=RATE, confidence=CONFIDENCE)
    for k, (n, *sums) in enumerate(year.moments):
        if promise.after(Evidence(RatioMoments(int(n), *sums))).began:
            return k
    return None


def three_sigma(year: Year) -> int | None:
    """Above the mean and three deviations of the gap of ten reference days (the days before these are not watched)."""
    gaps = year.moments[:, 1] / year.moments[:, 2]
    limit = gaps[:NUM_REFERENCE].mean() + 3 * gaps[:NUM_REFERENCE].std(ddof=1)
    return _first(np.concatenate([np.zeros(NUM_REFERENCE, bool), gaps[NUM_REFERENCE:] > limit]))


def daily_z(year: Year) -> int | None:
    """A one-sided test of "the gap is at most the budget" at 5 percent, every day."""
    n, x, y, xx, xy, yy, _ = year.moments.T
    b = BUDGET / 100
    d = x - b * y
    return _first(d / np.sqrt(xx - 2 * b * xy + b * b * yy - d * d / n) > 1.645)


def psi(year: Year) -> int | None:
    """Population stability index of the plan's scores against the first day, above 0.2."""
    shares = year.scores / year.scores.sum(axis=1, keepdims=True)
    index = ((shares - shares[0]) * np.log(np.maximum(shares, 1e-9) / np.maximum(shares[0], 1e-9))).sum(axis=1)
    return _first(index > PSI_LIMIT)


def _first(alarms: NDArray[np.bool_]) -> int | None:
    found = np.flatnonzero(alarms)
    return int(found[0]) if len(found) else None


RULES: dict[str, Callable[[Year], int | None]] = {
    "monitor": monitor,
    "three_sigma": three_sigma,
    "daily_z_test": daily_z,
    "psi": psi,
}
_pool: list[Pool] = []


def _one(task: tuple[int, bool, float, tuple[str, ...]]) -> dict[str, tuple[int | None, int | None]]:
    seed, jumps, day_effect, rules = task
    year = draw(
        _pool[0], np.random.default_rng([seed, int(jumps), int(10 * day_effect)]), jumps=jumps, day_effect=day_effect
    )
    return {rule: (RULES[rule](year), year.jump) for rule in rules}


def simulate(
    workers: "multiprocessing.pool.Pool", count: int, *, day_effect: float, rules: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """For each rule the share of deployments without drift that ever alarm, and how fast jumps are found.

    A deployment that alarms before its gap jumps is no detection, and counts as one that was not found.
    """
    found: dict[str, dict[str, float]] = {rule: {} for rule in rules}
    for jumps in (False, True):
        years = workers.map(_one, [(k, jumps, day_effect, rules) for k in range(count)], chunksize=8)
        for rule in rules:
            days = [year[rule] for year in years]
            if not jumps:
                found[rule]["false_alarm_rate"] = float(np.mean([alarm is not None for alarm, _ in days]))
                continue
            late = [math.inf if a is None or a < j else a - j + 1 for a, j in days]  # type: ignore[operator]
            after = [v for v in late if math.isfinite(v)]
            found[rule]["median_windows"] = float(np.median(after)) if after else math.inf
            found[rule]["detected_within_5"] = float(np.mean([v <= 5 for v in late]))
        print(day_effect, jumps, {rule: v for rule, v in found.items()}, flush=True)
    return found


def main() -> None:
    torch.set_num_threads(1)
    began = time.perf_counter()
    _pool.append(make_pool())
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as workers:
        plain = simulate(workers, NUM_DEPLOYMENTS, day_effect=0.0, rules=tuple(RULES))
        harder = simulate(workers, NUM_DEPLOYMENTS // 4, day_effect=1.0, rules=("monitor",))
    limit = RATE + 3 * math.sqrt(RATE * (1 - RATE) / NUM_DEPLOYMENTS)
    own = plain.pop("monitor")
    assert plain["daily_z_test"]["false_alarm_rate"] > limit, (
        "the simulation cannot tell a valid rule from one that is not"
    )
    assert own["false_alarm_rate"] <= limit, f"{own['false_alarm_rate']:.1%} of deployments without drift alarm"
    assert own["detected_within_5"] >= 0.95, f"{own['detected_within_5']:.1%} of jumps are found within five windows"
    usual = {rule: {k: v if math.isfinite(v) else None for k, v in numbers.items()} for rule, numbers in plain.items()}
    print(
        json.dumps(
            {
                **own,
                "limit": round(limit, 4),
                "usual": usual,
                "block_autocorrelation": autocorrelation(_pool[0].kept),
                "day_effects": harder["monitor"],
                "deployments": NUM_DEPLOYMENTS,
                "days": NUM_DAYS,
                "window_examples": BLOCK * BLOCKS_A_DAY,
                "budget_pct": BUDGET,
                "seconds": round(time.perf_counter() - began),
            }
        )
    )


if __name__ == "__main__":
    main()
