"""Bounds for a window that is looked at once: one-sided, of a fixed sample, each at the stated confidence.

With d = x - b y of a unit of evidence, "the ratio E[x] / E[y] is at least b" is rejected where the mean of d is so many
standard errors below zero. How many is Student's quantile, with as many degrees of freedom as the estimated variance
has, and wider where skewness makes a mean that is too low likely: Hall's transformation of the t-statistic (P. Hall,
"On the removal of skewness by transformation", 1992), solved for the statistic. Skewness that would make a bound
narrower is left out, because it is itself estimated from few units (tests/evaluation/test_bounds.py simulates this).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import special
from scipy.optimize import brentq

from lowprec.evaluation.confidence import MIN_BLOCKS, Blocks, Interval, RatioMoments

__all__ = ["MIN_EFFECTIVE_UNITS", "Spread", "normal_quantile", "one_look", "spread"]

# With fewer units that carry the change a window has not shown its variance. By simulation at the budget: with changes
# that are rare and all harmful, or rare beside a common harmless noise, 10 effective units let up to 6.4 percent of
# plans pass at 95 percent confidence, 20 let 5.7 percent pass, 30 gain nothing more.
MIN_EFFECTIVE_UNITS = 20

# Time blocks count where they vary more than chance would have them do in this share of windows. By simulation with 20
# blocks this keeps the rate of false certificates within 5.1 percent, whatever the correlation inside of blocks;
# testing at 95 percent, as sequences do, lets 6.8 percent pass.
BLOCKS_COUNT_ABOVE = 0.7

# A bound that is more standard errors away than this is none.
MAX_DEVIATIONS = 1e4


@dataclass(frozen=True)
class Spread:
    """How far chance moves a ratio: its standard error, and the degrees of freedom with which that is known."""

    standard_error: float
    degrees: float


def normal_quantile(confidence: float) -> float:
    """How many standard errors a one-sided bound is away in a large sample."""
    return float(special.ndtri(confidence))


def spread(moments: RatioMoments, blocks: Blocks | None = None) -> Spread:
    """The spread of the ratio of a window that is looked at once; NaN without units.

    The variance of n units with kurtosis k has about 2 n / (k - 1) degrees of freedom. Sums over time `blocks` replace
    it where they vary more than units would by chance, with the degrees of freedom of their number.
    """
    ratio = moments.ratio
    if not math.isfinite(ratio):
        return Spread(math.nan, 0.0)
    variance = max(moments.xx - 2 * ratio * moments.xy + ratio**2 * moments.yy, 0.0)
    factor, degrees = _blocked(moments, blocks)
    return Spread(math.sqrt(variance * factor) / abs(moments.y), degrees)


def one_look(moments: RatioMoments, confidence: float, *, blocks: Blocks | None = None) -> Interval:
    """The interval between two one-sided bounds of E[x] / E[y], each at `confidence`; y is positive on average.

    "The upper bound is below b" and "x - b y is below zero with that confidence" are the same statement. Infinite with
    fewer than `MIN_EFFECTIVE_UNITS`.
    """
    if moments.effective_units < MIN_EFFECTIVE_UNITS:
        return Interval(-math.inf, math.inf)
    factor, degrees = _blocked(moments, blocks)
    quantile = float(special.stdtrit(degrees, confidence))
    mirrored = replace(moments, x=-moments.x, xy=-moments.xy, xxx=-moments.xxx, xyy=-moments.xyy)
    return Interval(-_upper(mirrored, quantile, factor), _upper(moments, quantile, factor))


def _blocked(moments: RatioMoments, blocks: Blocks | None) -> tuple[float, float]:
    """By what factor time blocks raise the variance, and the degrees of freedom of the variance."""
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
    """The smallest b above the ratio at which "E[x] / E[y] is at least b" is rejected; infinite where there is none."""
    n, ratio = m.num_units, m.ratio
    mean_x, mean_y = m.x / n, m.y / n
    # Central moments of (x, y), so that those of x - b y are cheap for every b.
    xx, xy, yy = m.xx / n - mean_x**2, m.xy / n - mean_x * mean_y, m.yy / n - mean_y**2
    xxx = m.xxx / n - 3 * mean_x * m.xx / n + 2 * mean_x**3
    yyy = m.yyy / n - 3 * mean_y * m.yy / n + 2 * mean_y**3
    xxy = m.xxy / n - 2 * mean_x * m.xy / n - mean_y * m.xx / n + 2 * mean_x**2 * mean_y
    xyy = m.xyy / n - 2 * mean_y * m.xy / n - mean_x * m.yy / n + 2 * mean_x * mean_y**2

    def above(b: float) -> float:
        """How far the statistic of x - b y is above what rejects, in standard errors."""
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
    """How many standard errors below zero a mean must be, given its own skewness (that of one unit over sqrt(n))."""
    if skewness < 1e-6:
        return quantile
    root = float(np.cbrt(1 - skewness * (quantile + skewness / 6)))
    return 3 / skewness * (1 - root)
