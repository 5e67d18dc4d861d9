"""How many examples the control variate saves: random mixed plans on the demo's search window of 250,000 examples.

Every plan is evaluated exactly on every slice of the window, once with its first-order changes as control variate and
once without (the same race over no columns). `examples_ratio` is the squared ratio of `residual_radius` without and
with it, at the same number of slices: how many times the examples the same width of the gap's interval takes. Nothing
of this is a model: the same is measured by drawing slices at random, again and again, and looking at how the two
estimates spread around the gap over the whole window, which both must have as their mean.

Prints one JSON object as its last line: `examples_ratio` (median over plans with KL gaps around 0.05 percent) with its
range, the same by level of the KL gap, and of plans of the front, which are all that a search races. That is with
`row_range: minmax`; nested is the same with the default row range and dim 64, where int2 has gaps as large.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from demo_examples import Examples, Replay, exact_logits, mixed_plans, read_examples
from demo_model import DEFAULT_ROW_RANGE, large_demo_config
from numpy.typing import NDArray
from sizes import sized

from lowprec.config import Config
from lowprec.evaluation.profile.profile import Profile
from lowprec.evaluation.profile.window_profile import MeasuredProfile
from lowprec.evaluation.race.estimate import estimates, residual_radius
from lowprec.evaluation.race.race_sums import RaceSums, RaceTask
from lowprec.evaluation.rows import RowAccount
from lowprec.evaluation.stats.bounds import normal_quantile
from lowprec.plan import Plan
from lowprec.search import SearchJob, open_job
from lowprec.search.rule import Forecast
from lowprec.search.surrogate.surrogate import build_surrogate

Float = NDArray[np.float64]

TARGET_LEVEL = 0.05
# Plans at each level of the KL gap, percent; plans of the front between a third and three times the target.
NUM_PLANS = sized({0.005: 10, 0.02: 10, TARGET_LEVEL: 30, 0.2: 10}, {TARGET_LEVEL: 2})
NUM_OF_FRONT = sized(10, 2)
# As in a search: batches are cut into four slices of 1,024 examples.
NUM_PARTS = 4
NUM_DRAWS, NUM_DRAWN = sized((2000, 24), (5, 2))
ALPHA = 0.05


def plans_of_front(job: SearchJob, profile: Profile, *, level: float, count: int) -> list[Plan]:
    """Plans of the front of promised gaps, spread over those with a KL gap between a third and three times `level`."""
    measured = MeasuredProfile(profile, use={}, rows=RowAccount(profile.num_rows, 0, 0, {}))
    costs = job.search_costs({})
    forecast = Forecast(normal_quantile(1 - ALPHA), 1.0)
    surrogate = build_surrogate(measured, job.space, costs, budgets=[level], forecast=forecast)
    plans = [point.plan for point in surrogate.front.points]
    _, kl = profile.gaps_pct(profile.selected(plans))
    near = np.flatnonzero((kl >= level / 3) & (kl <= 3 * level))
    return [plans[k] for k in near[np.linspace(0, len(near) - 1, count).astype(int)]]


def raced(examples: Examples, replay: Any, plans: Sequence[Plan], *, predicted: bool) -> list[RaceSums]:
    """What a race sums up on every slice of the window; without predictions the residual is the change itself."""
    columns = examples.columns if predicted else ()
    slices = []
    for index, first in enumerate(range(0, len(examples), 4096)):
        batch = examples.batch(np.arange(first, min(first + 4096, len(examples))), index)
        for part in range(NUM_PARTS):
            task = RaceTask(tuple(plans), columns, (index,), ((part,),), (NUM_PARTS,), keep="")
            sums = task.sums(replay, batch)
            # The AUC is not looked at: one bin is kept of thousands, for every plan and slice.
            bins = sums.exact.histogram.sum(axis=2, keepdims=True)
            slices.append(replace(sums, exact=replace(sums.exact, histogram=bins)))
    return slices


def total(slices: Sequence[RaceSums]) -> RaceSums:
    """Their sum."""
    found = slices[0]
    for sums in slices[1:]:
        found = found + sums
    return found


def ratios_of_radius(plain: RaceSums, controlled: RaceSums) -> Float:
    """Squared ratio of the radius of either, for every plan, as if the window went on and on."""
    without, with_it = (
        np.array([residual_radius(s.gap, s, k, num_slices=10**9, alpha=ALPHA) for k in range(len(s.gap.e))])
        for s in (plain, controlled)
    )
    return np.square(without / with_it)


def ratios_of_draws(
    profile: Profile, plans: Sequence[Plan], plain: Sequence[RaceSums], controlled: Sequence[RaceSums]
) -> tuple[Float, Float]:
    """Variance of the plain estimate over that of the controlled one, over random draws of slices without replacement.

    Also how far the mean of either is from the gap over the whole window, in standard deviations of it, float64[2, P].
    """
    rng = np.random.default_rng(1)
    z = profile.selected(plans)
    change, loss = profile.block_sums(z)
    y = np.array([s.gap.y for s in controlled])
    x, e = (np.array([s.gap.e for s in slices]) for slices in (plain, controlled))
    draws = np.array([rng.permutation(len(y))[:NUM_DRAWN] for _ in range(NUM_DRAWS)])
    ys = y[draws].sum(axis=1)[:, None]
    found = np.array([x[draws].sum(axis=1) / ys, change.sum(axis=1) / loss.sum() + e[draws].sum(axis=1) / ys])
    for k in range(3):  # the second is the estimate of a race, and the first what its sample says
        sums = total([controlled[i] for i in draws[k]])
        raced_on = estimates(sums, profile, plans, num_slices=len(y), confidence=1 - ALPHA)
        assert np.allclose([r.metrics.gap_pct for r in raced_on], 100 * found[1, k], rtol=1e-9, atol=1e-9)
        sampled = [sums.exact.metrics(i, confidence=1 - ALPHA).gap_pct for i in range(len(plans))]
        assert np.allclose(sampled, 100 * found[0, k], rtol=1e-9, atol=1e-9)
    truth = x.sum(axis=0) / y.sum()
    spread = found.std(axis=1, ddof=1)
    off = (found.mean(axis=1) - truth) / spread
    return np.square(spread[0] / spread[1]), off


def measure(config: Config) -> dict[str, Any]:
    """Everything about one model and way of choosing row ranges."""
    job = open_job(config)
    examples = read_examples(job, ["search"])
    profile = examples.profile(np.arange(len(examples)))
    rng = np.random.default_rng(0)
    families = {
        f"{level:g}": mixed_plans(job, profile, kl_pct=level, count=count, rng=rng)
        for level, count in NUM_PLANS.items()
    }
    families["front"] = plans_of_front(job, profile, level=TARGET_LEVEL, count=NUM_OF_FRONT)
    plans = list(dict.fromkeys(plan for family in families.values() for plan in family))
    print(f"{len(plans)} plans, evaluated on {len(examples)} examples", flush=True)
    replay = Replay(examples, exact_logits(job, plans, ["search"]))
    plain, controlled = (raced(examples, replay, plans, predicted=predicted) for predicted in (False, True))
    by_radius = ratios_of_radius(total(plain), total(controlled))
    by_draws, off = ratios_of_draws(profile, plans, plain, controlled)
    # Both are ratios, so a bias of a few hundredths of a deviation is theirs; four standard errors are the draws'.
    limit = 0.05 + 4 / np.sqrt(NUM_DRAWS)
    assert np.abs(off).max() < limit, f"a mean over draws is {np.abs(off).max():.3f} standard deviations off"
    exact = total(controlled).exact
    gaps = 100 * exact.totals()[: len(plans)] / exact.loss[0]

    report: dict[str, Any] = {}
    for name, family in families.items():
        at = [plans.index(plan) for plan in family]
        report[name] = {
            "examples_ratio": round(float(np.median(by_radius[at])), 1),
            "range": [round(float(f(by_radius[at])), 1) for f in (np.min, np.max)],
            "by_draws": round(float(np.median(by_draws[at])), 1),
            "gap_pct": [round(float(f(gaps[at])), 4) for f in (np.min, np.max)],
            "num_plans": len(at),
        }
        print(name, report[name], flush=True)
    at = [plans.index(plan) for plan in families[f"{TARGET_LEVEL:g}"]]
    headline = report[f"{TARGET_LEVEL:g}"]
    return {
        "examples_ratio": headline["examples_ratio"],
        "examples_ratio_range": headline["range"],
        "examples_ratio_by_draws": headline["by_draws"],
        "share_of_plans_at_20_or_more": round(float((by_radius[at] >= 20).mean()), 3),
        "by_kl_gap_pct": report,
        "largest_bias_in_deviations": dict(
            zip(("without", "with"), np.abs(off).max(axis=1).round(3).tolist(), strict=True)
        ),
        "num_draws": NUM_DRAWS,
        "slices_drawn": NUM_DRAWN,
        "num_slices": len(plain),
        "num_examples": len(examples),
    }


def main() -> None:
    torch.set_num_threads(1)
    began = time.perf_counter()
    found = measure(large_demo_config())
    print("default row range:", flush=True)
    default = measure(large_demo_config(*DEFAULT_ROW_RANGE))
    seconds = round(time.perf_counter() - began, 1)
    print(json.dumps({**found, "default_row_range": default, "seconds": seconds}))


if __name__ == "__main__":
    main()
