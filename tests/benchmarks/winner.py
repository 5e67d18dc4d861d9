"""Is the plan that a search picks from 20,000 examples as good on the others? Noise-aware ranking against two others.

The demo's 450,000 held-out examples are split at random, over and over: 20,000 to profile and to search on, the rest to
judge. A ranking takes, of the front of its quadratic model, the plan with the smallest promised gap among those of at
most a sixth of the bytes. `ours` ranks by the first-order sums of `shrunk_first_order`, `raw` by the measured ones,
`second_order` by none. Gaps are percent; held-out ones are exact, by the kernels that serve, and where that would take
too long by the quadratic model of the held-out examples, which is compared with them on the same plans. The traffic is
made up, so they are also known as expected over labels: with each label replaced by the probability it was drawn with.

Prints one JSON object as its last line: `held_out_ratio` (mean held-out gap of ours / of raw), `promise_error`
(|mean promised - mean held out| / mean held out, of ours), for each ranking means and standard deviations over splits.

Nested is the same for two other models: `rough`, trained with larger steps, whose plans at a sixth of the bytes have
larger gaps and are less linear, and `demo_as_trained`, with the demo's own settings, whose reference is badly
calibrated, and `default_row_range` with dim 64 at a tenth of the bytes.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from demo_examples import Examples, exact_logits, read_examples, true_probabilities
from demo_model import DEFAULT_ROW_RANGE, large_demo_config
from numpy.typing import NDArray
from sizes import sized

from lowprec.config import Config
from lowprec.evaluation.metrics import sums_of_batch
from lowprec.evaluation.profile.profile import Profile
from lowprec.evaluation.profile.window_profile import MeasuredProfile
from lowprec.evaluation.rows import RowAccount
from lowprec.evaluation.stats.bounds import normal_quantile
from lowprec.plan import Plan
from lowprec.search import SearchJob, open_job
from lowprec.search.rule import Forecast
from lowprec.search.surrogate.front_solver import solve_front
from lowprec.search.surrogate.proxy import ProxyPoint, build_proxy
from lowprec.search.surrogate.shrinkage import shrunk_first_order
from lowprec.search.surrogate.surrogate import build_surrogate

Float = NDArray[np.float64]

NUM_SPLITS, NUM_SEARCHED = sized((40, 20_000), (2, 2_000))
# Splits whose held-out gaps are exact: of the demo model, and of the others.
NUM_EXACT, NUM_EXACT_OF_OTHERS = sized((30, 10), (2, 1))
SHARE_OF_BYTES = 1 / 6
# With the default row range and dim 64: between int4 and int2 everywhere, with gaps as large.
SHARE_OF_DIM_64 = 1 / 10

ROUGH = ("train.embedding_learning_rate=0.1", "model.checkpoint=runs/large-demo/rough.safetensors")
AS_TRAINED = (
    "train.embedding_learning_rate=0.02",
    "train.decay=none",
    "model.checkpoint=runs/large-demo/as-trained.safetensors",
)


def measure(config: Config, *, num_exact: int, share: float = SHARE_OF_BYTES) -> dict[str, Any]:
    """Everything about one model."""
    job = open_job(config)
    examples = read_examples(job)
    rng = np.random.default_rng(0)
    splits = [rng.permutation(len(examples)) for _ in range(NUM_SPLITS)]
    picked: dict[str, list[ProxyPoint]] = {"ours": [], "raw": [], "second_order": []}
    kept = []
    for k, order in enumerate(splits):
        profile = examples.profile(order[:NUM_SEARCHED])
        num_columns = len(profile.columns)
        shrunk = shrunk_first_order(profile)
        kept.append([shrunk.shift_kept, shrunk.scale_kept, shrunk.rest_kept])
        by_ranking = {"ours": shrunk.sums, "raw": profile.first[:num_columns], "second_order": np.zeros(num_columns)}
        for name, first in by_ranking.items():
            picked[name].append(pick(job, profile, first, share))
        if k == 0:
            check_surrogate(job, profile, picked["ours"][0], share)
        if (k + 1) % 10 == 0:
            print(f"{k + 1} splits searched", flush=True)

    promised = {name: np.array([point.gap_pct for point in points]) for name, points in picked.items()}
    plans = {name: [point.plan for point in points] for name, points in picked.items()}
    logits = exact_logits(job, [plan for chosen in plans.values() for plan in chosen[:num_exact]])
    held_out = {name: judged(examples, splits, chosen, logits) for name, chosen in plans.items()}
    drawn_with = replace(examples, labels=true_probabilities(job).astype(np.float32))
    expected = {name: judged(drawn_with, splits, chosen, logits) for name, chosen in plans.items()}
    for name in picked:
        means = promised[name].mean(), held_out[name].gaps.mean(), expected[name].gaps.mean()
        print("{:>12}: promised {:.4f}, held out {:.4f}, expected {:.4f} percent".format(name, *means), flush=True)

    def promise_error(truth: Mapping[str, Judged]) -> float:
        found = truth["ours"].gaps.mean()
        return round(float(abs(promised["ours"].mean() - found) / abs(found)), 3)

    def ratio(truth: Mapping[str, Judged], name: str) -> float:
        return round(float(truth[name].gaps.mean() / truth["raw"].gaps.mean()), 3)

    reference = torch.from_numpy(examples.reference).double()
    return {
        "held_out_ratio": ratio(held_out, "ours"),
        "promise_error": promise_error(held_out),
        "promise_error_expected": promise_error(expected),
        # One standard deviation of the held-out gap from its labels and examples, which no number of splits averages
        # away: all of them are judged on nearly the same examples.
        "held_out_noise": round(float(held_out["ours"].noise.mean() / abs(held_out["ours"].gaps.mean())), 3),
        "second_order_ratio": ratio(held_out, "second_order"),
        "expected_ratio": ratio(expected, "ours"),
        "share_of_splits_ours_at_most_raw": round(float((held_out["ours"].gaps <= held_out["raw"].gaps).mean()), 3),
        "rankings": {
            name: {
                "promised_pct": summary(promised[name]),
                "held_out_pct": summary(held_out[name].gaps),
                "expected_pct": summary(expected[name].gaps),
                "quadratic_less_exact_pct": summary(held_out[name].quadratic_less_exact),
                "distinct_plans": len(set(plans[name])),
            }
            for name in picked
        },
        "kept": dict(zip(("shift", "scale", "rest"), np.mean(kept, axis=0).round(3).tolist(), strict=True)),
        "calibration_ref": round(float(reference.sigmoid().sum() / examples.labels.sum()), 4),
        "splits": {"num": NUM_SPLITS, "judged_exactly": num_exact},
        "bytes_at_most": f"fp32 * {share:.3f}",
        "examples": {"searched": NUM_SEARCHED, "held_out": len(examples) - NUM_SEARCHED},
    }


def pick(job: SearchJob, profile: Profile, first: Float, share: float) -> ProxyPoint:
    """The point of the front with the least promised gap among those that are small enough."""
    num_columns, percent = len(profile.columns), 100 / profile.loss
    second = profile.second.dense()[:num_columns, :num_columns] * percent
    model = build_proxy(
        job.space, profile.columns, first * percent, second, cost=lambda u, p: float(job.space.size_of(u, p))
    )
    return least_gap(job, solve_front(model).points, share)


def least_gap(job: SearchJob, points: Sequence[ProxyPoint], share: float) -> ProxyPoint:
    """The most accurate plan with at most that share of the bytes."""
    found = min((p for p in points if p.cost <= share * job.space.fp32_bytes), key=lambda point: point.gap_pct)
    assert job.space.size_bytes(found.plan) == found.cost
    return found


def check_surrogate(job: SearchJob, profile: Profile, ours: ProxyPoint, share: float) -> None:
    """Assert that `ours` is what the surrogate of `lowprec search` has on its front, with the gap that it promises."""
    measured = MeasuredProfile(profile, use={}, rows=RowAccount(profile.num_rows, 0, 0, {}))
    forecast = Forecast(normal_quantile(0.95), 1.0)
    surrogate = build_surrogate(measured, job.space, job.search_costs({}), budgets=[0.05], forecast=forecast)
    assert least_gap(job, surrogate.front.points, share).plan == ours.plan
    assert np.isclose(surrogate.promised_pct([ours.plan])[0], ours.gap_pct)


@dataclass(frozen=True)
class Judged:
    """Held-out gaps of a ranking's picks, float64[NUM_SPLITS], exact where the plan's logits are known.

    noise: their standard deviation as estimates; quadratic_less_exact: of the splits where both are known.
    """

    gaps: Float
    noise: Float
    quadratic_less_exact: Float


def judged(
    examples: Examples,
    splits: Sequence[NDArray[np.int64]],
    plans: Sequence[Plan],
    logits: Mapping[Plan, NDArray[np.float32]],
) -> Judged:
    """The gaps of one plan a split on the examples that it was not picked from."""
    distinct = list(dict.fromkeys(plans))
    by_plan, alone = examples.by_plan(distinct)
    gaps, noise, off = [], [], []
    for order, plan in zip(splits, plans, strict=True):
        rows, k = order[NUM_SEARCHED:], distinct.index(plan)
        only = replace(by_plan, columns=by_plan.columns[k : k + 1], changes=by_plan.changes[k : k + 1])
        profile = only.profile(rows)
        z = profile.selected([alone[k]])
        (quadratic,) = profile.gaps_pct(z)[0]
        (moments,) = profile.moments(z)
        variance = moments.xx - 2 * moments.ratio * moments.xy + moments.ratio**2 * moments.yy
        noise.append(100 * np.sqrt(variance) / moments.y)
        gaps.append(quadratic)
        if plan in logits:
            reference, labels = examples.reference[rows].astype(float), examples.labels[rows].astype(float)
            sums = sums_of_batch(reference, logits[plan][None, rows].astype(float), labels, None, None)
            gaps[-1] = 100 * sums.totals()[0] / sums.loss[0]
            off.append(quadratic - gaps[-1])
    return Judged(np.array(gaps), np.array(noise), np.array(off))


def summary(gaps: Float) -> dict[str, float]:
    """Mean, standard deviation over splits and the ends."""
    found = {"mean": gaps.mean(), "sd": gaps.std(ddof=1), "min": gaps.min(), "max": gaps.max()}
    return {name: round(float(value), 5) for name, value in found.items()}


def main() -> None:
    torch.set_num_threads(1)
    began = time.perf_counter()
    demo = measure(large_demo_config(), num_exact=NUM_EXACT)
    print("trained with larger steps:", flush=True)
    rough = measure(large_demo_config(*ROUGH), num_exact=NUM_EXACT_OF_OTHERS)
    print("with the demo's own training settings:", flush=True)
    as_trained = measure(large_demo_config(*AS_TRAINED), num_exact=NUM_EXACT_OF_OTHERS)
    print("default row range:", flush=True)
    default = measure(large_demo_config(*DEFAULT_ROW_RANGE), num_exact=NUM_EXACT_OF_OTHERS, share=SHARE_OF_DIM_64)
    assert NUM_SPLITS >= 30
    rest = {"seconds": round(time.perf_counter() - began, 1)}
    nested = {"rough": rough, "demo_as_trained": as_trained, "default_row_range": default}
    print(json.dumps({**demo, **rest, **nested}))


if __name__ == "__main__":
    main()
