"""First-order sums with label noise shrunk away.

On finite traffic the first-order sums a = sum of w r s are mostly noise, and a search that minimises them picks the
plans that noise favours. What is real in them comes from the reference model being wrong: where it is calibrated given
its inputs, the expectation of r, and so of a, is zero. Two ways of being wrong are told apart:

- its logits are shifted or scaled as a whole. These are two numbers, well known from a few thousand examples, and they
  imply a: with r = h (shift + scale z_ref) it is the same combination of two columns of Q. Each is dropped
  where it is within three standard errors of zero, else shrunk by its expected noise.
- anything else. The rest of a is kept by the share that a chi-squared statistic says is more than noise: a share too
  small by three standard deviations of the statistic, because a search exploits whatever noise is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowprec.evaluation.profile.profile import NUM_CALIBRATION_DIRECTIONS, Profile

__all__ = ["FirstOrder", "shrunk_first_order"]

Float = NDArray[np.float64]

NUM_DEVIATIONS = 3.0


@dataclass(frozen=True)
class FirstOrder:
    """Shrunk first-order sums, float64[K] over the profile's columns, and what share of each part was kept.

    `shift` and `scale` are the estimated errors of the reference's logits, already multiplied by what was kept.
    """

    sums: Float
    shift: float
    scale: float
    shift_kept: float
    scale_kept: float
    rest_kept: float


def shrunk_first_order(profile: Profile) -> FirstOrder:
    """The first-order sums that a search should rank by."""
    num_columns = len(profile.columns)
    measured = profile.first[:num_columns]
    if not num_columns or profile.num_rows == 0:
        return FirstOrder(measured, 0.0, 0.0, 0.0, 0.0, 0.0)
    shift, scale = num_columns, num_columns + 1
    q = profile.second.columns(num_columns)  # [D, 2]: of shift and of scale
    noise = profile.evidence.columns(num_columns)[:, :NUM_CALIBRATION_DIRECTIONS]
    a = profile.first
    # The scale is taken orthogonal to the shift, so that each has an estimate of its own.
    lean = float(q[shift, 1] / q[shift, 0]) if q[shift, 0] > 0 else 0.0
    implied_by_shift = q[:num_columns, 0]
    implied_by_scale = q[:num_columns, 1] - lean * q[:num_columns, 0]
    by_shift, shift_kept = _estimate(float(a[shift]), float(q[shift, 0]), float(noise[shift, 0]))
    by_scale, scale_kept = _estimate(
        float(a[scale] - lean * a[shift]),
        float(q[scale, 1] - lean * q[shift, 1]),
        float(noise[scale, 1] - 2 * lean * noise[shift, 1] + lean**2 * noise[shift, 0]),
    )
    rest = measured - by_shift * implied_by_shift - by_scale * implied_by_scale
    rest_kept = _kept_of_rest(rest, profile)
    return FirstOrder(
        sums=(shift_kept * by_shift * implied_by_shift + scale_kept * by_scale * implied_by_scale + rest_kept * rest),
        shift=shift_kept * by_shift - scale_kept * by_scale * lean,
        scale=scale_kept * by_scale,
        shift_kept=shift_kept,
        scale_kept=scale_kept,
        rest_kept=rest_kept,
    )


def _estimate(a: float, curvature: float, noise: float) -> tuple[float, float]:
    """An estimate a / curvature with variance noise / curvature^2, and the share of it that is not noise."""
    if curvature <= 0 or noise <= 0:
        return 0.0, 0.0
    t_squared = a**2 / noise
    return a / curvature, 1 - 1 / t_squared if t_squared > NUM_DEVIATIONS**2 else 0.0


def _kept_of_rest(rest: Float, profile: Profile) -> float:
    """1 - (expectation + 3 deviations under noise alone) / (sum of squared t-values), not below 0."""
    variances = profile.evidence.diagonal[: len(rest)]
    known = variances > 0
    if not known.any():
        return 0.0
    t = rest[known] / np.sqrt(variances[known])
    statistic = float(t @ t)
    expected = float(known.sum())
    spread = math.sqrt(2 * profile.evidence.squared_correlations(known))
    return max(0.0, 1 - (expected + NUM_DEVIATIONS * spread) / statistic) if statistic else 0.0
