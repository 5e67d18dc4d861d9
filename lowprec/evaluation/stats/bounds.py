"""One-sided bounds of a fixed sample, for windows that are evaluated once.

For a unit of evidence let d = x - b y. The hypothesis "E[x] / E[y] >= b" is rejected if the mean of d is far enough
below zero, in standard errors. The threshold is Student's quantile with effective degrees of freedom. It is larger if
skewness makes low means likely. The correction is Hall's transformation of the t-statistic (P. Hall, "On the removal of
skewness by transformation", 1992), solved for the statistic. Skewness never makes a bound narrower, because the
estimate of skewness from few units is not reliable (tests/evaluation/stats/test_bounds.py simulates this).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import special
from scipy.optimize import brentq

from lowprec.evaluation.stats.confidence import MIN_BLOCKS, Blocks, Interval, RatioMoments

__all__ = ["MIN_EFFECTIVE_UNITS", "Spread", "normal_quantile", "one_sided_bounds", "spread"]

# With fewer effective units the variance is not reliable. In the worst simulated scenario 6.0 percent of plans at the
# budget are certified with at least 10 effective units, 5.6 percent with 20 and 5.3 percent with 30, at 95 percent
# confidence (make bench NAME=bounds).
MIN_EFFECTIVE_UNITS = 20

# The variance of time blocks is used if it exceeds this quantile of its distribution for independent units. Then at
# most 5.1 percent of plans at the budget are certified for any correlation within blocks, in the same benchmark. With
# the 95 percent quantile, which sequences use, it is 6.5 percent.
BLOCKS_COUNT_ABOVE = 0.7

# A bound further away than this many standard errors is reported as infinite.
MAX_DEVIATIONS = 1e4


@dataclass(frozen=True)
class Spread:
    """The standard error of a ratio, and the degrees of freedom of its estimate."""

    standard_error: float
    degrees: float


def normal_quantile(confidence: float) -> float:
    """The quantile of the standard normal distribution: the margin of a bound in a large sample, in standard errors."""
    return float(special.ndtri(confidence))


def spread(moments: RatioMoments, blocks: Blocks | None = None) -> Spread:
    """The standard error of the ratio sum x / sum y, NaN without units.

    The variance of n units with kurtosis k has about 2 n / (k - 1) degrees of freedom. If sums over time `blocks` vary
    significantly more than independent units, the variance of the blocks is used.
    """
    ratio = moments.ratio
    if not math.isfinite(ratio):
        return Spread(math.nan, 0.0)
    variance = max(moments.xx - 2 * ratio * moments.xy + ratio**2 * moments.yy, 0.0)
    factor, degrees = _blocked(moments, blocks)
    return Spread(math.sqrt(variance * factor) / abs(moments.y), degrees)


def one_sided_bounds(moments: RatioMoments, confidence: float, *, blocks: Blocks | None = None) -> Interval:
    """The interval between two one-sided bounds of E[x] / E[y], each at `confidence`.

    The upper bound is below b if and only if the test rejects "E[x - b y] >= 0". The mean of y must be positive. Both
    bounds are infinite with fewer than `MIN_EFFECTIVE_UNITS` effective units.

    Args:
        moments: Sums over the units of evidence.
        confidence: Of each bound, between 0.5 and 1.
        blocks: Sums over time blocks, to account for correlation in time.
    """
    if moments.effective_units < MIN_EFFECTIVE_UNITS:
        return Interval(-math.inf, math.inf)
    factor, degrees = _blocked(moments, blocks)
    quantile = float(special.stdtrit(degrees, confidence))
    mirrored = replace(moments, x=-moments.x, xy=-moments.xy, xxx=-moments.xxx, xyy=-moments.xyy)
    return Interval(-_upper(mirrored, quantile, factor), _upper(moments, quantile, factor))


def _blocked(moments: RatioMoments, blocks: Blocks | None) -> tuple[float, float]:
    """The factor by which time blocks raise the variance, and the degrees of freedom of the variance."""
    n, effective = moments.num_units, moments.effective_units
    of_units = 2 * n * effective / (n - effective) if 0 < effective < n else math.inf
    of_units = max(min(of_units, n - 1.0), 1.0)
    if blocks is None:
        return 1.0, of_units
    seen = blocks.y > 0
    num_blocks = int(seen.sum())
    if num_blocks < MIN_BLOCKS:
        return 1.0, of_units
    ratio = moments.ratio
    variance = moments.xx - 2 * ratio * moments.xy + ratio**2 * moments.yy
    deviations = (blocks.x - ratio * blocks.y)[seen]
    of_blocks = float(np.square(deviations - deviations.mean()).sum()) * num_blocks / (num_blocks - 1)
    factor = of_blocks / variance if variance > 0 else 1.0
    if factor <= special.chdtri(num_blocks - 1, 1 - BLOCKS_COUNT_ABOVE) / (num_blocks - 1):
        return 1.0, of_units
    return factor, 1 / (1 / (num_blocks - 1) + 1 / of_units)


def _upper(m: RatioMoments, quantile: float, factor: float) -> float:
    """The smallest b above the ratio for which "E[x] / E[y] >= b" is rejected; infinite if there is none."""
    n, ratio = m.num_units, m.ratio
    mean_x, mean_y = m.x / n, m.y / n
    # Central moments of (x, y), from which those of x - b y follow for any b.
    xx, xy, yy = m.xx / n - mean_x**2, m.xy / n - mean_x * mean_y, m.yy / n - mean_y**2
    xxx = m.xxx / n - 3 * mean_x * m.xx / n + 2 * mean_x**3
    yyy = m.yyy / n - 3 * mean_y * m.yy / n + 2 * mean_y**3
    xxy = m.xxy / n - 2 * mean_x * m.xy / n - mean_y * m.xx / n + 2 * mean_x**2 * mean_y
    xyy = m.xyy / n - 2 * mean_y * m.xy / n - mean_x * m.yy / n + 2 * mean_x * mean_y**2

    def above(b: float) -> float:
        """The distance of the t-statistic of x - b y from its rejection threshold."""
        variance = xx - 2 * b * xy + b * b * yy
        if variance <= 0:
            return mean_x - b * mean_y
        third = xxx - 3 * b * xxy + 3 * b * b * xyy - b**3 * yyy
        skewness = math.sqrt(factor / n) * max(third, 0.0) / variance**1.5
        statistic = (mean_x - b * mean_y) / math.sqrt(variance * factor / n)
        return statistic + _deviations(quantile, skewness)

    step = spread(m).standard_error * math.sqrt(factor)
    if not step > 0:
        return ratio
    for times in (2 * quantile, 10.0, 100.0, MAX_DEVIATIONS):
        if above(ratio + times * step) < 0:
            return float(brentq(above, ratio, ratio + times * step, xtol=1e-9 * step, rtol=1e-14))
    return math.inf


def _deviations(quantile: float, skewness: float) -> float:
    """The rejection threshold in standard errors, given the skewness of the mean (that of a unit over sqrt(n))."""
    if skewness < 1e-6:
        return quantile
    root = float(np.cbrt(1 - skewness * (quantile + skewness / 6)))
    return 3 / skewness * (1 - root)
