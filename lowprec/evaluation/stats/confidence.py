"""Evidence that may be looked at after every batch: asymptotic confidence sequences.

Source: Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas, "Time-uniform central limit theory and asymptotic confidence
sequences", Theorem 2.2 and its choice of rho.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

__all__ = [
    "MIN_EFFECTIVE_UNITS",
    "MIN_UNITS",
    "Blocks",
    "Interval",
    "RatioMoments",
    "Verdict",
    "design_effect",
    "moment_sums",
    "radius",
    "ratio_interval",
    "verdict",
]

Verdict = Literal["certified", "rejected", "inconclusive"]

# Below this many units of evidence, or fewer that carry most of the change, the normal approximation is not worth an
# interval: every answer is inconclusive. A change that touches few examples shows none of its variance before it shows
# itself: without the second rule more than 30 percent of plans right at the budget were certified where one example in
# a window is changed on average (tests/evaluation/stats/test_confidence.py simulates both).
MIN_UNITS = 100
MIN_EFFECTIVE_UNITS = 30

# Fewer time blocks say too little about how much they vary.
MIN_BLOCKS = 10


@dataclass(frozen=True)
class Interval:
    """A closed interval; infinite ends say that there is no evidence on that side."""

    lower: float
    upper: float


@dataclass(frozen=True)
class RatioMoments:
    """Sums over `num_units` independent units of (x, y) and their products: all that a ratio of means needs.

    Confidence sequences do without the third powers.
    """

    num_units: int
    x: float
    y: float
    xx: float
    xy: float
    yy: float
    xxxx: float
    xxx: float = 0.0
    xxy: float = 0.0
    xyy: float = 0.0
    yyy: float = 0.0

    @classmethod
    def of(cls, x: NDArray[np.float64], y: NDArray[np.float64]) -> RatioMoments:
        """Of units with these x and y, float64[num_units] each."""
        return cls(len(y), *map(float, moment_sums(x, y)))

    @property
    def effective_units(self) -> float:
        """How many units carry the change: sum(x^2)^2 / sum(x^4), all of them where all change alike."""
        return self.xx**2 / self.xxxx if self.xxxx else 0.0

    @property
    def ratio(self) -> float:
        """Sum x / sum y; NaN when there is nothing to divide by."""
        return self.x / self.y if self.y else math.nan


def moment_sums(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sums of `RatioMoments`, without the number of units: float64[..., 10] of x float64[..., B], y float64[B]."""
    xx, xy, yy = x * x, x * y, y * y
    of_x = (x, xx, xy, xx * xx, xx * x, xx * y, xy * y)
    sums_x, sums_xx, sums_xy, sums_xxxx, *thirds = (v.sum(axis=-1) for v in of_x)
    sums_y, sums_yy, sums_yyy = (np.broadcast_to(v.sum(), x.shape[:-1]) for v in (y, yy, yy * y))
    return np.stack([sums_x, sums_y, sums_xx, sums_xy, sums_yy, sums_xxxx, *thirds, sums_yyy], axis=-1)


@dataclass(frozen=True)
class Blocks:
    """Sums of x and of y over time blocks of a window, float64[num_blocks] each: evidence of correlation in time."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]


def radius(num_units: float, alpha: float, *, tuned_for: float) -> float:
    """Half the width of the two-sided (1 - alpha) sequence after `num_units`, in standard deviations of one unit.

    `tuned_for` is the number of units at which the sequence is tightest; it must not depend on the outcomes.
    """
    rho_squared = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)) / tuned_for
    spread = num_units * rho_squared + 1
    return math.sqrt(2 * spread / (num_units**2 * rho_squared) * math.log(math.sqrt(spread) / alpha))


def design_effect(moments: RatioMoments, blocks: Blocks) -> float:
    """By how much time blocks vary more than independent units would, as a factor of variance; at least 1.

    Under MIN_BLOCKS blocks it is 1, and so it is where the blocks vary no more than chance would have them do in 19 of
    20 windows: with 20 blocks the factor itself is only known to within a third.
    """
    # A window of few batches leaves blocks empty: those are none.
    seen = blocks.y > 0
    num_blocks = int(seen.sum())
    if num_blocks < MIN_BLOCKS:
        return 1.0
    ratio = moments.ratio
    of_units = moments.xx - 2 * ratio * moments.xy + ratio**2 * moments.yy
    deviations = (blocks.x - ratio * blocks.y)[seen]
    of_blocks = float(np.square(deviations - deviations.mean()).sum()) * num_blocks / (num_blocks - 1)
    factor = of_blocks / of_units if of_units > 0 else 1.0
    return factor if factor > special.chdtri(num_blocks - 1, 0.05) / (num_blocks - 1) else 1.0


def ratio_interval(
    moments: RatioMoments,
    alpha: float,
    *,
    tuned_for: int | None = None,
    blocks: Blocks | None = None,
    inflation: float = 1.0,
) -> Interval:
    """The (1 - alpha) confidence sequence of E[x] / E[y], y positive on average.

    It holds every b for which the sequence of E[x - b y] holds 0, so that "upper end < b" and "x - b y is below zero
    with confidence" are the same statement. Without `tuned_for` it is tightest at the number of units at hand, which is
    right for one look at a whole window; who looks more often gives the number that was planned. Sums over time
    `blocks` widen it by their design effect, and `inflation` is a factor of variance that somebody else knows of.
    """
    n = moments.num_units
    if n < MIN_UNITS or moments.effective_units < MIN_EFFECTIVE_UNITS:
        return Interval(-math.inf, math.inf)
    c_squared = radius(n, alpha, tuned_for=tuned_for or n) ** 2 * inflation
    if blocks is not None:
        c_squared *= design_effect(moments, blocks)
    mean_x, mean_y = moments.x / n, moments.y / n
    var_x = max(moments.xx / n - mean_x**2, 0.0)
    var_y = max(moments.yy / n - mean_y**2, 0.0)
    cov = moments.xy / n - mean_x * mean_y
    # |mean_x - b mean_y| <= c sd(x - b y), squared: a b^2 - 2 h b + k <= 0.
    a = mean_y**2 - c_squared * var_y
    h = mean_x * mean_y - c_squared * cov
    k = mean_x**2 - c_squared * var_x
    if a <= 0:
        return Interval(-math.inf, math.inf)
    root = math.sqrt(max(h * h - a * k, 0.0))
    return Interval((h - root) / a, (h + root) / a)


def verdict(interval: Interval, budget: float) -> Verdict:
    """What an interval says about "the value is at most `budget`" (same unit)."""
    if interval.upper <= budget:
        return "certified"
    if interval.lower > budget:
        return "rejected"
    return "inconclusive"
