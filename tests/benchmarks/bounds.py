"""Alternatives to the rules of one-sided bounds: how often each certifies a plan exactly at its budget.

The scenarios are those of tests/support/at_the_budget.py and windows in which rare harmful changes come with common
harmless noise. Every rule is applied to the same windows, at 95 percent confidence. Three choices are compared:

- the threshold of the t-statistic: the normal quantile, Student's, with Hall's correction for skewness in both
  directions, and with the correction for harmful skewness only, which `one_sided_bounds` uses;
- the fewest effective units;
- the variance of 20 time blocks: used above a quantile of its distribution for independent units, always, or if it is
  the larger one; also with autocorrelation between the blocks.

Prints one JSON object as its last line: for each choice the rate of the worst scenario, and the rates by scenario.
"""

import json
import math
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sizes import sized

# What benchmarks and tests have in common.
sys.path.append(str(Path(__file__).parents[1] / "support"))
from at_the_budget import SCENARIOS, Draw, rare_beside_noise

Float = NDArray[np.float64]

RUNS = sized(4000, 50)
CONFIDENCE = 0.95
FEWEST_UNITS = (0, 5, 10, 20, 30)
NUM_BLOCKS = 20
# (factor of variance of a block's mean, autocorrelation between blocks)
CORRELATIONS = (*((factor, 0.0) for factor in (1.0, 1.1, 1.3, 1.6, 2.0, 4.0)), (2.0, 0.3), (2.0, 0.6))
MOST_BLOCK_WINDOWS = sized(100_000, 500)


def hall(quantile: float, skewness: float) -> float:
    """The threshold of the t-statistic below zero, in standard errors; skewness: of the mean."""
    if abs(skewness) < 1e-6:
        return quantile
    return 3 / skewness * (1 - float(np.cbrt(1 - skewness * (quantile + skewness / 6))))


def thresholds(d: Float) -> tuple[float, dict[str, float]]:
    """The t-statistic of a window, and the threshold of each rule; d: loss change minus budget, float64[num_units]."""
    n, centred = len(d), d - d.mean()
    variance = float((centred**2).mean())
    if variance == 0:
        return 0.0, {}
    kurtosis = float((centred**4).mean()) / variance**2
    degrees = min(2 * n / max(kurtosis - 1, 1e-9), n - 1)
    skewness = float((centred**3).mean()) / variance**1.5 / math.sqrt(n)
    normal, student = stats.norm.ppf(CONFIDENCE), float(stats.t.ppf(CONFIDENCE, degrees))
    rules = {
        "normal": normal,
        "student": student,
        "hall_both_ways": hall(student, skewness),
        "hall_if_harmful": hall(student, max(skewness, 0.0)),
    }
    return float(d.mean()) / math.sqrt(variance / n), rules


def rates(draw: Draw, seed: int) -> dict[str, dict[int, float]]:
    """For each rule and each fewest number of effective units, how often the plan is certified."""
    rng = np.random.default_rng(seed)
    found: dict[str, dict[int, float]] = defaultdict(lambda: dict.fromkeys(FEWEST_UNITS, 0.0))
    for _ in range(RUNS):
        x, y, budget, _ = draw(rng)
        fourth = float((x**4).sum())
        effective = float((x**2).sum()) ** 2 / fourth if fourth else 0.0
        statistic, rules = thresholds(x - budget * y)
        for rule, threshold in rules.items():
            for fewest in FEWEST_UNITS:
                found[rule][fewest] += (effective >= fewest and statistic < -threshold) / RUNS
    return {rule: {k: round(v, 4) for k, v in by_units.items()} for rule, by_units in found.items()}


def block_rates(factor: float, autocorrelation: float, rng: np.random.Generator) -> dict[str, float]:
    """How often each rule on the variance of blocks certifies; means of blocks have a variance of 1 on their own."""
    common = np.empty((MOST_BLOCK_WINDOWS, NUM_BLOCKS))
    state = rng.normal(size=MOST_BLOCK_WINDOWS)
    for k in range(NUM_BLOCKS):
        common[:, k] = state
        innovation = math.sqrt(1 - autocorrelation**2) * rng.normal(size=MOST_BLOCK_WINDOWS)
        state = autocorrelation * state + innovation
    blocks = rng.normal(size=common.shape) + math.sqrt(factor - 1) * common
    mean, of_units = blocks.mean(axis=1), 1 / NUM_BLOCKS
    of_blocks = blocks.var(axis=1, ddof=1) / NUM_BLOCKS
    normal, student = stats.norm.ppf(CONFIDENCE), stats.t.ppf(CONFIDENCE, NUM_BLOCKS - 1)
    by_units, by_blocks = math.sqrt(of_units) * normal, np.sqrt(of_blocks) * student
    margins = {"always": by_blocks, "larger": np.maximum(by_units, by_blocks)}
    for quantile in (0.7, 0.95):
        critical = stats.chi2.ppf(quantile, NUM_BLOCKS - 1) / (NUM_BLOCKS - 1)
        margins[f"above_{quantile}"] = np.where(of_blocks / of_units > critical, by_blocks, by_units)
    return {rule: round(float((mean < -margin).mean()), 4) for rule, margin in margins.items()}


def main() -> None:
    began = time.perf_counter()
    scenarios = {name: draw for name, draw in SCENARIOS.items() if not name.startswith("time_blocks")}
    scenarios |= rare_beside_noise()
    by_scenario: dict[str, Any] = {}
    for k, (name, draw) in enumerate(scenarios.items()):
        by_scenario[name] = rates(draw, k)
        print(name, by_scenario[name], flush=True)
    worst = {
        rule: {fewest: max(found[rule][fewest] for found in by_scenario.values()) for fewest in FEWEST_UNITS}
        for rule in next(iter(by_scenario.values()))
    }
    rng = np.random.default_rng(0)
    blocks = {f"{factor}_{rho}": block_rates(factor, rho, rng) for factor, rho in CORRELATIONS}
    within = [found for name, found in blocks.items() if name.endswith("_0.0")]
    print(
        json.dumps(
            {
                "worst_by_rule_and_fewest_units": worst,
                "worst_by_rule_on_blocks": {rule: max(found[rule] for found in within) for rule in within[0]},
                "blocks_by_factor_and_autocorrelation": blocks,
                "by_scenario": by_scenario,
                "runs": RUNS,
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
