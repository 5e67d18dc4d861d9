"""What a race says about a plan's gap on the whole window, and what that says about traffic like it.

With F and Y the sums of predicted loss change and of reference loss over the window, and e and y those of residual and
loss over the slices seen, the gap is estimated as F / Y + e / y. (The KL gap is estimated likewise, with entropies in
place of losses.) Two things can be wrong with it, and each has its own share of the error rate:

- the slices seen may not be typical of the window. Slices are drawn at random without replacement, so they are the
  units, whatever examples inside them have in common. Sums over m of M such units are to their mean as a Brownian
  bridge is to zero, and a bridge at m is a Brownian motion at m M / (M - m): the confidence sequence for that many
  units holds at every m, and closes at m = M.
- the window may not be typical of traffic. That is the error of evaluating every row; it cannot be raced away.

The two are independent, so their radii add in quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scipy import special

from lowprec.evaluation.metrics import PlanMetrics, Sums
from lowprec.evaluation.profile.profile import Profile
from lowprec.evaluation.race.race_sums import RaceSums, Residuals
from lowprec.evaluation.stats.bounds import spread
from lowprec.evaluation.stats.confidence import (
    MIN_UNITS,
    Blocks,
    Interval,
    RatioMoments,
    design_effect,
    radius,
    ratio_interval,
)
from lowprec.plan import Plan, Precision

__all__ = ["MIN_SLICES", "PlanEstimate", "estimates", "residual_radius"]

# Share of the error rate that the slices not seen may use; the rest is for the window itself.
RESIDUAL_SHARE = 0.1
# Fewer slices say too little about how much they vary: nothing is concluded from them.
MIN_SLICES = 8


@dataclass(frozen=True)
class PlanEstimate:
    """What is known of a plan during a race; gaps in percent.

    `on_window` and `kl_on_window` are intervals of gap and KL gap on this very window, which compare plans raced on it;
    the intervals of `metrics` are of traffic like it.
    """

    metrics: PlanMetrics
    on_window: Interval
    kl_on_window: Interval


def estimates(
    sums: RaceSums, profile: Profile, plans: Sequence[Plan], *, num_slices: int, confidence: float
) -> list[PlanEstimate]:
    """The estimate of every plan of a race after some of the window's `num_slices`."""
    z = profile.selected(plans)
    change, loss = profile.block_sums(z)
    evidence = profile.moments(z)
    predicted_kl = profile.second.quadratic(z) / 2
    found = []
    for k, plan in enumerate(plans):
        is_reference = set(plan.values()) == {Precision.FP32}
        if is_reference or sums.num_slices == num_slices:
            exact = sums.exact.metrics(k, confidence=confidence, is_reference=is_reference, looks="repeated")
            if not is_reference:
                exact = _widened(exact, sums.exact, k, Blocks(change[k], loss), confidence)
            found.append(PlanEstimate(exact, _point(exact.gap_pct), _point(exact.kl_pct)))
            continue
        found.append(
            _estimate(
                sums,
                k,
                profile,
                evidence[k],
                predicted_kl=float(predicted_kl[k]),
                blocks=Blocks(change[k], loss),
                num_slices=num_slices,
                confidence=confidence,
            )
        )
    return found


def residual_radius(residuals: Residuals, sums: RaceSums, plan: int, *, num_slices: int, alpha: float) -> float:
    """Half the width of the (1 - alpha) confidence sequence of e / y over the window.

    The standard error is that of slice totals, with Student's correction for their number, or that of independent
    examples where it is higher: few slices may happen to agree. Infinite before MIN_SLICES.
    """
    m = sums.num_slices
    if m == num_slices:
        return 0.0
    if m < MIN_SLICES or residuals.y <= 0:
        return math.inf
    r = residuals
    ratio = float(r.e[plan]) / r.y
    of_slices = r.ee_slices[plan] - 2 * ratio * r.ey_slices[plan] + ratio**2 * r.yy_slices
    of_rows = r.ee_rows[plan] - 2 * ratio * r.ey_rows[plan] + ratio**2 * r.yy_rows
    # Standard deviations of one slice's share of the ratio, times the square root of m.
    by_slice = math.sqrt(max(of_slices, 0.0) * m / (m - 1)) * _student(m - 1, alpha)
    by_row = math.sqrt(max(of_rows, 0.0))
    deviation = max(by_slice, by_row) / r.y * math.sqrt(m)
    tuned_for = _effective(max(MIN_SLICES, num_slices // 8), num_slices)
    return deviation * radius(_effective(m, num_slices), alpha, tuned_for=tuned_for)


def _estimate(
    sums: RaceSums,
    k: int,
    profile: Profile,
    evidence: RatioMoments,
    *,
    predicted_kl: float,
    blocks: Blocks,
    num_slices: int,
    confidence: float,
) -> PlanEstimate:
    alpha = 1 - confidence
    seen = sums.exact.metrics(k, confidence=confidence, looks="repeated")
    sampled_gap, sampled_kl = sums.exact.evidence(k)
    # Where no slice seen has a label, nothing is added to what is predicted, and nothing is concluded.
    window_loss, share = profile.loss, sums.gap.y / profile.loss or math.inf
    entropy, kl_share = profile.entropy, sums.kl.y / profile.entropy or math.inf
    of_window = (1 - RESIDUAL_SHARE) * alpha
    rest = [
        residual_radius(residuals, sums, k, num_slices=num_slices, alpha=RESIDUAL_SHARE * alpha)
        for residuals in (sums.gap, sums.kl)
    ]
    # The first order is nearly all of the spread; the sample says what the rest adds.
    larger = max(1.0, float(sums.changed[k] / sums.predicted[k])) if sums.predicted[k] > 0 else 1.0
    gap = RatioMoments(
        num_units=profile.num_rows if sampled_gap.num_units >= MIN_UNITS else sampled_gap.num_units,
        x=evidence.x + float(sums.gap.e[k]) / share,
        y=window_loss,
        xx=evidence.xx * larger,
        xy=evidence.xy,
        yy=evidence.yy,
        # As few units carry the change as in the sample.
        xxxx=_fourth(evidence.xx * larger, sampled_gap),
    )
    kl_xx = sampled_kl.xx / kl_share
    kl = RatioMoments(
        num_units=gap.num_units,
        x=predicted_kl + float(sums.kl.e[k]) / kl_share,
        y=entropy,
        xx=kl_xx,
        xy=sampled_kl.xy / kl_share,
        yy=sampled_kl.yy / kl_share,
        xxxx=_fourth(kl_xx, sampled_kl),
    )
    gap_alone = ratio_interval(gap, of_window, blocks=blocks)
    on_window, kl_on_window = (
        Interval(100 * (of.ratio - radius_of_rest), 100 * (of.ratio + radius_of_rest))
        for of, radius_of_rest in zip((gap, kl), rest, strict=True)
    )
    gap_pct = 100 * gap.ratio
    total = sum(block.weight for block in profile.blocks)
    label = sum(block.label for block in profile.blocks)
    calibration = sum(block.prediction for block in profile.blocks) / label if label else math.nan
    ne_ref = _ne(window_loss, label, total)
    metrics = PlanMetrics(
        num_examples=profile.num_rows,
        num_exact=sums.exact.num_rows,
        num_units=sampled_gap.num_units if sums.exact.groups is not None else profile.num_rows,
        gap_pct=gap_pct,
        gap_interval_pct=_widened_by(gap_alone, gap.ratio, rest[0]),
        kl_pct=100 * kl.ratio,
        kl_interval_pct=_widened_by(ratio_interval(kl, of_window), kl.ratio, rest[1]),
        ne_ref=ne_ref,
        ne_plan=ne_ref * (1 + gap_pct / 100),
        auc_ref=seen.auc_ref,
        auc_plan=seen.auc_plan,
        auc_error=seen.auc_error,
        calibration_ref=calibration,
        # Both are of the sample, and the ratio of the two is what a sample tells well.
        calibration_plan=calibration * seen.calibration_plan / seen.calibration_ref,
        confidence=confidence,
        effective_units=gap.effective_units,
        standard_error_pct=100 * spread(gap).standard_error,
        looks="repeated",
    )
    return PlanEstimate(metrics, on_window, kl_on_window)


def _widened(metrics: PlanMetrics, sums: Sums, k: int, blocks: Blocks, confidence: float) -> PlanMetrics:
    """Metrics of a whole window with the correlation inside its time blocks in their interval."""
    moments, _ = sums.evidence(k)
    if design_effect(moments, blocks) == 1.0:
        return metrics
    interval = ratio_interval(moments, 1 - confidence, blocks=blocks)
    return replace(metrics, gap_interval_pct=Interval(100 * interval.lower, 100 * interval.upper))


def _fourth(xx: float, sampled: RatioMoments) -> float:
    effective = sampled.effective_units
    return xx**2 / effective if effective else 0.0


def _effective(m: int, num_slices: int) -> float:
    """How many independent units say as much as m of `num_slices` drawn without replacement."""
    return m * num_slices / (num_slices - m)


def _widened_by(interval: Interval, ratio: float, radius_of_rest: float) -> Interval:
    """An interval around a ratio for an independent second error too, in percent: the two add in quadrature.

    Which slices were drawn says nothing about how the window differs from traffic, so the variances of both errors add.
    Either radius is so many standard deviations of its error, and the smaller of these numbers holds for the sum.
    """
    below, above = (math.hypot(end - ratio, radius_of_rest) for end in (interval.lower, interval.upper))
    return Interval(100 * (ratio - below), 100 * (ratio + above))


def _point(value: float) -> Interval:
    return Interval(value, value)


def _ne(loss: float, label: float, weight: float) -> float:
    rate = label / weight if weight else math.nan
    if not 0 < rate < 1:
        return math.nan
    return loss / weight / (-rate * math.log(rate) - (1 - rate) * math.log1p(-rate))


def _student(degrees: int, alpha: float) -> float:
    """Student's quantile over the normal one, two-sided at alpha."""
    return float(special.stdtrit(degrees, 1 - alpha / 2) / special.ndtri(1 - alpha / 2))
