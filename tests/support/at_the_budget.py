"""Windows of simulated losses in which a plan is right at its budget, so that certifying it is wrong.

Shared by the tests of bounds and by the benchmark of coverage. A draw gives x (loss changes) and y (losses of the
reference) of the units of evidence, float64[num_units] each, the budget as a fraction, and time blocks or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from lowprec.evaluation.stats.bounds import one_sided_bounds
from lowprec.evaluation.stats.confidence import Blocks, RatioMoments

Float = NDArray[np.float64]
Drawn = tuple[Float, Float, float, Blocks | None]
Draw = Callable[[np.random.Generator], Drawn]

# The standard deviation of a changed logit.
MOVED = 0.05


def _predictions(rng: np.random.Generator, n: int) -> Float:
    """Click probabilities, few of them large."""
    return np.clip(rng.beta(0.5, 4.5, n), 1e-3, 1 - 1e-3)


def _entropy(p: Float) -> Float:
    return np.asarray(-(p * np.log(p) + (1 - p) * np.log1p(-p)))


def _budget_of_examples() -> float:
    """Of a calibrated reference: the expected loss change over the expected loss."""
    p = _predictions(np.random.default_rng(9), 2_000_000)
    return float((0.5 * p * (1 - p) * MOVED**2).mean() / _entropy(p).mean())


BUDGET_OF_EXAMPLES = _budget_of_examples()


def _examples(rng: np.random.Generator, n: int) -> tuple[Float, Float]:
    """Loss changes and losses of independent examples, up to third order in the change of the logit."""
    p = _predictions(rng, n)
    y = rng.random(n) < p
    s = rng.normal(0, MOVED, n)
    return (p - y) * s + 0.5 * p * (1 - p) * s * s, np.where(y, -np.log(p), -np.log1p(-p))


def independent(rng: np.random.Generator, *, n: int = 3000) -> Drawn:
    """Independent examples, all of them changed."""
    return *_examples(rng, n), BUDGET_OF_EXAMPLES, None


def few_changed(rng: np.random.Generator, *, expected: float, n: int = 2000) -> Drawn:
    """On average so many examples are changed, and each for the worse: a window by chance has too few of them."""
    x = np.where(rng.random(n) < expected / n, rng.exponential(1.0, n), 0.0)
    return x, rng.exponential(0.5, n), 2 * expected / n, None


def few_changed_either_way(rng: np.random.Generator, *, expected: float, n: int = 2000) -> Drawn:
    """Few changes, three of five for the worse."""
    hit = rng.random(n) < expected / n
    x = np.where(hit, rng.exponential(1.0, n) * np.where(rng.random(n) < 0.6, 1, -1), 0.0)
    return x, rng.exponential(0.5, n), 0.4 * expected / n, None


def heavy_weights(rng: np.random.Generator, *, n: int = 5000) -> Drawn:
    """Weights of a Pareto law with an exponent of 2.2."""
    x, y = _examples(rng, n)
    w = rng.pareto(2.2, n) + 1
    return w * x, w * y, BUDGET_OF_EXAMPLES, None


def unequal_groups(rng: np.random.Generator, *, sigma: float, n: int = 300) -> Drawn:
    """Groups that share their change; sigma: the standard deviation of the logarithm of their size."""
    p = 0.1
    entropy = -(p * math.log(p) + (1 - p) * math.log1p(-p))
    size = np.ceil(rng.lognormal(1.5, sigma, n))
    clicks = rng.binomial(size.astype(int), p)
    s = rng.normal(0, MOVED, n)
    x = (p * size - clicks) * s + size * 0.5 * p * (1 - p) * s * s
    y = -clicks * math.log(p) - (size - clicks) * math.log1p(-p)
    return x, y, 0.5 * p * (1 - p) * MOVED**2 / entropy, None


def time_blocks(rng: np.random.Generator, *, factor: float, num_blocks: int = 20, size: int = 100) -> Drawn:
    """Examples of a block have something in common: its mean varies by a factor of variance more than alone."""
    common = np.repeat(rng.normal(0, math.sqrt((factor - 1) / size), num_blocks), size)
    x = 1.0 + rng.normal(size=num_blocks * size) + common
    blocks = Blocks(x.reshape(num_blocks, size).sum(axis=1), np.full(num_blocks, float(size)))
    return x, np.ones(num_blocks * size), 1.0, blocks


def _rare_beside_noise(rng: np.random.Generator, *, expected: float, share: float, n: int = 1000) -> Drawn:
    """Rare harmful changes, and noise that carries a share of the variance and harms nothing on average."""
    rate = expected / n
    noise = math.sqrt(2 * rate * share / (1 - share))
    x = (rng.random(n) < rate) * rng.exponential(1.0, n) + rng.normal(0, noise, n)
    return x, rng.exponential(0.5, n), 2 * rate, None


def rare_beside_noise() -> dict[str, Draw]:
    """Scenarios that no bound holds exactly: with few harmful changes, many windows contain hardly any."""
    return {
        f"rare_{expected}_beside_noise_{share}": partial(_rare_beside_noise, expected=expected, share=share)
        for expected in (10, 30, 100)
        for share in (0.2, 0.5, 0.8)
    }


SCENARIOS: Mapping[str, Draw] = {
    "independent": independent,
    "independent_600": partial(independent, n=600),
    **{f"few_changed_{k}": partial(few_changed, expected=k) for k in (5, 20, 50, 200)},
    **{f"few_changed_either_way_{k}": partial(few_changed_either_way, expected=k) for k in (20, 50, 200)},
    "heavy_weights": heavy_weights,
    **{f"unequal_groups_{sigma}": partial(unequal_groups, sigma=sigma) for sigma in (0.5, 1.5)},
    **{f"time_blocks_{factor}": partial(time_blocks, factor=factor) for factor in (1.0, 1.3, 2.0, 4.0)},
}


def false_rate(draw: Draw, runs: int, *, seed: int, confidence: float = 0.95) -> float:
    """How often the plan is certified by one look."""
    rng, certified = np.random.default_rng(seed), 0
    for _ in range(runs):
        x, y, budget, blocks = draw(rng)
        certified += one_sided_bounds(RatioMoments.of(x, y), confidence, blocks=blocks).upper <= budget
    return certified / runs
