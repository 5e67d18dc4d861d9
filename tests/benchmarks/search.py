"""`lowprec search` against searches written by hand, on the demo model with its large search window.

(a) 500 exact trials proposed by TPE, and by NSGA-II; (b) greedy revert-to-float by sensitivity; (c) integer programming
on additive gradient scores; see by_hand.py. All choose by exact gaps on the search window. What they found is judged by
exact gaps on the later window that none of them saw: the plans that each method would offer there (its front on the
search window) span a hypervolume (bytes as a share of fp32, gaps up to that of all-int2).

Prints one JSON object as its last line: `hypervolume_ratio` (ours / the best of the others, on the later window),
`passes` (CPU time of all of `lowprec search`, its confirmation included, / one fp32 pass over the search window, both
on one thread). Nested: the same on the search window itself, where 500 trials can choose what its labels favour, by KL
gap and by logarithm of bytes; and what each method cost. NUM_TRIALS=50 in the environment makes it quick. That is with
`row_range: minmax`; nested is the same with the default row range and dim 64.
"""

import json
import os
import shutil
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from by_hand import Found, HandModel, check_agreement, fp32_pass_seconds, greedy_revert, integer_program, optuna_study
from demo_model import DEFAULT_ROW_RANGE, large_demo_config
from hypervolume import _check, front, hypervolume
from passes import cpu_seconds, fp32_pass
from sizes import sized

import lowprec
from lowprec.config import Config
from lowprec.plan import Plan, Precision
from lowprec.search import SearchOutcome, open_job, run_search

NUM_TRIALS = int(os.environ.get("NUM_TRIALS", sized("500", "6")))
ROOT = "runs/large-demo/results"


def plans_of(outcome: SearchOutcome) -> tuple[list[Plan], np.ndarray]:
    """The plans that the search evaluated, and the gaps that it found (percent)."""
    rows = lowprec.query(
        f"SELECT plan_json, gap_pct FROM trials WHERE run_id = '{outcome.run_id}' AND evaluation = 'exact'", ROOT
    )
    plans = [Plan({n: Precision(p) for n, p in json.loads(text).items()}) for text in rows["plan_json"]]
    return plans, rows["gap_pct"].to_numpy()


class Judge:
    """Exact gaps and KL gaps of offered plans on a window; every plan once."""

    def __init__(self, model: HandModel) -> None:
        """Judge on the window of `model`."""
        self.model = model
        self._known: dict[Plan, tuple[float, float]] = {}

    def gaps(self, plans: Sequence[Plan]) -> tuple[np.ndarray, np.ndarray]:
        """Gap and KL gap of each plan, in percent."""
        for plan in plans:
            if plan not in self._known:
                self._known[plan] = self.model.gap_pct(plan), self.model.kl_pct(plan)
        gaps, divergences = (np.array([self._known[plan][k] for plan in plans]) for k in (0, 1))
        return gaps, divergences


def measure(config: Config) -> dict[str, Any]:
    """Everything about one model and way of choosing row ranges."""
    job = open_job(config)

    shutil.rmtree(ROOT, ignore_errors=True)
    fp32_pass(job)
    outcomes, seconds, passes = [], [], []
    for _ in range(2):
        one = statistics.mean(cpu_seconds(lambda: fp32_pass(job)) for _ in range(2))
        seconds.append(cpu_seconds(lambda: outcomes.append(run_search(config))))
        passes.append(seconds[-1] / statistics.mean([one, cpu_seconds(lambda: fp32_pass(job))]))
        print(f"lowprec search: {seconds[-1]:.1f} CPU s, {passes[-1]:.2f} passes", flush=True)
    ours, our_gaps = plans_of(outcomes[0])
    best = outcomes[0].recommendations[0].best

    pass_seconds = fp32_pass_seconds(job)
    model = HandModel(job, pass_seconds=pass_seconds)
    check_agreement(model)
    others: dict[str, Found] = {}
    for name, search in {
        "greedy_gap": lambda: greedy_revert(model, measure="gap"),
        "greedy_kl": lambda: greedy_revert(model, measure="kl"),
        "integer_absolute": lambda: integer_program(model, score="absolute"),
        "integer_squared": lambda: integer_program(model, score="squared"),
        "optuna_nsga2": lambda: optuna_study(model, sampler="nsga2", num_trials=NUM_TRIALS),
        "optuna_tpe": lambda: optuna_study(model, sampler="tpe", num_trials=NUM_TRIALS),
    }.items():
        others[name] = search()
        print(f"{name}: {len(others[name].plans)} plans, {others[name].passes:.0f} passes", flush=True)

    here, later = Judge(model), Judge(HandModel(job, pass_seconds=pass_seconds, window="confirm"))
    corner = Plan.uniform(job.units, Precision.INT2)
    areas: dict[str, dict[str, float]] = {}
    every = {"ours": (ours, our_gaps), **{n: (list(f.plans), f.gaps) for n, f in others.items()}}
    for name, (plans, gaps_found) in every.items():
        sizes = np.array([job.space.size_bytes(plan) for plan in plans], dtype=float)
        chosen = front(sizes, gaps_found)  # by what the method itself knows of the search window
        offered = [plans[k] for k in chosen]
        areas[name] = {}
        for where, judge in (("later", later), ("search_window", here)):
            worst = judge.gaps([corner])
            for kind, gaps in zip(("gap", "kl"), judge.gaps(offered), strict=True):
                reference = (float(job.space.fp32_bytes), float(worst[0 if kind == "gap" else 1][0]))
                for scale, log_sizes in (("", False), ("_log", True)):
                    areas[name][f"{where}_{kind}{scale}"] = hypervolume(
                        sizes[chosen], gaps, reference=reference, log_sizes=log_sizes
                    )
        print(name, {k: round(v, 5) for k, v in areas[name].items()}, flush=True)

    def ratio(key: str) -> float:
        return round(areas["ours"][key] / max(areas[name][key] for name in others), 4)

    return {
        "hypervolume_ratio": ratio("later_gap"),
        "passes": round(statistics.median(passes), 2),
        "hypervolume_ratios": {key: ratio(key) for key in areas["ours"]},
        "hypervolumes": {n: {k: round(v, 5) for k, v in a.items()} for n, a in areas.items()},
        "passes_range": [round(min(passes), 2), round(max(passes), 2)],
        "passes_of_others": {name: round(found.passes, 1) for name, found in others.items()},
        "exact_evaluations": {"ours": len(ours), **{name: len(f.plans) for name, f in others.items()}},
        "recommended": {
            "verdict": best.verdict,
            "bytes_ratio": round(best.choice.trial.size_bytes / job.space.fp32_bytes, 4),
            "promised_pct": best.choice.trial.promised_pct,
            "confirmed_pct": best.metrics.gap_pct,
        },
        "seconds": round(statistics.median(seconds), 1),
        "num_examples": job.window("search").num_rows,
        "threads": 1,
    }


def main() -> None:
    _check()
    torch.set_num_threads(1)
    settings = f"results.root={ROOT}", "search.budget=0.05"
    found = measure(large_demo_config(*settings))
    print("default row range:", flush=True)
    print(json.dumps({**found, "default_row_range": measure(large_demo_config(*settings, *DEFAULT_ROW_RANGE))}))


if __name__ == "__main__":
    main()
