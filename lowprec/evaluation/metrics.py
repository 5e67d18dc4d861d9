"""Sums over examples for model quality and for the gap of a plan, over any split of traffic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lowprec.evaluation.stats.bounds import one_sided_bounds, spread
from lowprec.evaluation.stats.confidence import (
    Blocks,
    Interval,
    RatioMoments,
    Verdict,
    moment_sums,
    ratio_interval,
    verdict,
)
from lowprec.evaluation.stats.second_moment import mixed
from lowprec.models.quality import softplus

__all__ = ["AUC_BINS", "GroupSums", "Looks", "PlanMetrics", "Sums", "group_sums", "sums_of_batch"]

Float = NDArray[np.float64]

# How often a window is evaluated before a verdict: `once` permits one-sided bounds, `repeated` needs a sequence.
Looks = Literal["once", "repeated"]

# Logits beyond +-16 share the outermost bins; a bin is 1/256 of a logit wide.
AUC_BINS = 8192
AUC_LOGIT_RANGE = 16.0

# Group keys are hashed to this many buckets. Groups that meet in one bucket count as one unit of evidence: still valid,
# slightly wider, and memory stays constant whatever the number of groups.
GROUP_BUCKETS = 1 << 16


@dataclass(frozen=True)
class GroupSums:
    """Sums for every group bucket that was seen: `values` is float64[R, num_buckets].

    In `Sums` the rows are x and kl of every plan, then y and h.
    """

    buckets: NDArray[np.int64]
    values: Float

    def __add__(self, other: GroupSums) -> GroupSums:
        buckets, where = np.unique(np.concatenate([self.buckets, other.buckets]), return_inverse=True)
        values = np.zeros((len(self.values), len(buckets)))
        values[:, where[: len(self.buckets)]] += self.values
        values[:, where[len(self.buckets) :]] += other.values
        return GroupSums(buckets, values)


@dataclass(frozen=True)
class Sums:
    """Sums over the labelled examples of some batches, for the reference and P plans on the same examples.

    Model 0 is the reference, models 1 to P are the plans. With w the weight, y the label, l the loss and p the
    prediction of an example: `weight` is the sum of w, `label` of w y, `entropy` of w H(p) of the reference, `loss`
    float64[P + 1] of w l, `prediction` float64[P + 1] of w p, `histogram` float64[P + 1, 2, AUC_BINS] of w by label and
    logit. `moments` float64[P, 2, 10] holds the `moment_sums` of gap and KL gap where rows are the units of evidence.
    Where groups are the units, it is zero and `groups` has the sums of each group.

    Adding is associative up to rounding; for bit-equal results add in the order of batches.
    """

    num_rows: int
    num_unlabelled: int
    weight: float
    label: float
    entropy: float
    loss: Float
    prediction: Float
    histogram: Float
    moments: Float
    groups: GroupSums | None

    def __add__(self, other: Sums) -> Sums:
        if (self.groups is None) != (other.groups is None):
            raise ValueError("sums with groups do not add to sums without")
        return Sums(
            num_rows=self.num_rows + other.num_rows,
            num_unlabelled=self.num_unlabelled + other.num_unlabelled,
            weight=self.weight + other.weight,
            label=self.label + other.label,
            entropy=self.entropy + other.entropy,
            loss=self.loss + other.loss,
            prediction=self.prediction + other.prediction,
            histogram=self.histogram + other.histogram,
            moments=self.moments + other.moments,
            groups=self.groups + other.groups if self.groups and other.groups else None,
        )

    def only(self, plans: Sequence[int]) -> Sums:
        """The sums of some of the plans, counted from 0."""
        kept = np.asarray(plans, dtype=np.int64)
        models = np.concatenate([[0], kept + 1])
        groups = None
        if self.groups is not None:
            rows = np.concatenate([kept, self.num_plans + kept, 2 * self.num_plans + np.arange(2)])
            groups = GroupSums(self.groups.buckets, self.groups.values[rows])
        return replace(
            self,
            loss=self.loss[models],
            prediction=self.prediction[models],
            histogram=self.histogram[models],
            moments=self.moments[kept],
            groups=groups,
        )

    @property
    def num_plans(self) -> int:
        """How many plans these sums are about."""
        return len(self.loss) - 1

    def totals(self) -> Float:
        """The sums of loss change and of KL of every plan, then the reference's loss and entropy: float64[2 P + 2]."""
        kl = self.moments[:, 1, 0] if self.groups is None else self.groups.values[self.num_plans : -2].sum(axis=1)
        return np.concatenate([self.loss[1:] - self.loss[0], kl, self.loss[:1], [self.entropy]])

    def metrics(
        self,
        plan: int,
        *,
        confidence: float,
        is_reference: bool = False,
        blocks: Float | None = None,
        looks: Looks = "once",
        tuned_for: int | None = None,
    ) -> PlanMetrics:
        """The metrics of one plan (counted from 0) with bounds at `confidence`.

        looks: `once` gives one-sided bounds, `repeated` a confidence sequence, which is tightest at `tuned_for` units,
        by default at those at hand. `is_reference` says that the plan is the reference itself: its gap is 0 by
        definition, not by evidence. blocks: float64[num_blocks, 2 P + 2], the `totals` of time blocks that make up
        these sums; where blocks vary more than independent units would, bounds are further apart.
        """
        gap, kl = self.evidence(plan)

        def over_time(column: int, below: int) -> Blocks | None:
            return None if blocks is None else Blocks(blocks[:, column], blocks[:, below])

        def interval(moments: RatioMoments, column: int, below: int) -> Interval:
            if is_reference:
                return Interval(0.0, 0.0)
            over = over_time(column, below)
            if looks == "once":
                return _percent(one_sided_bounds(moments, confidence, blocks=over))
            return _percent(ratio_interval(moments, 1 - confidence, tuned_for=tuned_for, blocks=over))

        entropy = _entropy(self.label / self.weight) if self.weight else math.nan
        auc_ref, error_ref = _auc(self.histogram[0])
        auc_plan, error_plan = _auc(self.histogram[plan + 1])

        def ne(model: int) -> float:
            return float(self.loss[model] / self.weight / entropy) if self.weight and entropy else math.nan

        def calibration(model: int) -> float:
            return float(self.prediction[model] / self.label) if self.label else math.nan

        return PlanMetrics(
            num_examples=self.num_rows,
            num_exact=self.num_rows,
            num_units=gap.num_units,
            gap_pct=100 * gap.ratio,
            gap_interval_pct=interval(gap, plan, -2),
            kl_pct=100 * kl.ratio,
            kl_interval_pct=interval(kl, self.num_plans + plan, -1),
            ne_ref=ne(0),
            ne_plan=ne(plan + 1),
            auc_ref=auc_ref,
            auc_plan=auc_plan,
            auc_error=max(error_ref, error_plan),
            calibration_ref=calibration(0),
            calibration_plan=calibration(plan + 1),
            confidence=confidence,
            effective_units=gap.effective_units,
            standard_error_pct=0.0 if is_reference else 100 * spread(gap).standard_error,
            looks=looks,
        )

    def evidence(self, plan: int) -> tuple[RatioMoments, RatioMoments]:
        """Moments of (loss change, reference loss) and of (KL, reference entropy) over the units of evidence."""
        if self.groups is None:
            gap, kl = (RatioMoments(self.num_rows, *map(float, sums)) for sums in self.moments[plan])
            return gap, kl
        x, kl_of_groups, y, h = self.groups.values[[plan, self.num_plans + plan, -2, -1]]
        return RatioMoments.of(x, y), RatioMoments.of(kl_of_groups, h)


@dataclass(frozen=True)
class PlanMetrics:
    """What is known about one plan. NE and AUC are of both models on the same rows.

    gap_pct is in percent of the reference's loss. kl_pct is the label-free gap, 100 * mean(w KL(p_ref || p_plan)) /
    mean(w H(p_ref)): in percent of the reference's entropy, over the same examples.

    The gap is over `num_examples`, of which the plan was evaluated exactly on `num_exact`, drawn at random; the profile
    predicts the rest, and NE is that of all of them, while AUC and the plan's calibration come from those drawn.
    `auc_error` bounds how far either AUC can be from the exact one (pairs that share a histogram bin).
    `effective_units` says how many equal units of evidence would carry as much of the change as the `num_units` do;
    `standard_error_pct` is that of the gap for independent units: time blocks move bounds, not this. Intervals lie
    between two one-sided bounds, each at `confidence`, where `looks` is `once`, and are confidence sequences where it
    is `repeated`.
    """

    num_examples: int
    num_exact: int
    num_units: int
    gap_pct: float
    gap_interval_pct: Interval
    kl_pct: float
    kl_interval_pct: Interval
    ne_ref: float
    ne_plan: float
    auc_ref: float
    auc_plan: float
    auc_error: float
    calibration_ref: float
    calibration_plan: float
    confidence: float
    effective_units: float = math.nan
    standard_error_pct: float = math.nan
    looks: Looks = "once"

    def verdict(self, budget_pct: float) -> Verdict:
        """Whether the plan is within the budget (percent)."""
        return verdict(self.gap_interval_pct, budget_pct)

    def warnings(self) -> list[str]:
        """What a reader must know before trusting these numbers."""
        found = []
        if not math.isfinite(self.ne_ref):
            found.append("all examples have the same label, so NE, AUC and calibration are not defined")
        elif self.ne_ref >= 1:
            found.append(
                f"the reference model is no better than predicting the label rate (NE {self.ne_ref:.3f}): check its "
                "features, its checkpoint, and that it returns logits and not probabilities"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers under flat names; an infinite end of an interval is None."""
        ends = {
            "gap_lower_pct": self.gap_interval_pct.lower,
            "gap_upper_pct": self.gap_interval_pct.upper,
            "kl_lower_pct": self.kl_interval_pct.lower,
            "kl_upper_pct": self.kl_interval_pct.upper,
        }
        flat = {k: v for k, v in vars(self).items() if not isinstance(v, Interval)} | ends
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in flat.items()}

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any]) -> PlanMetrics:
        """The inverse of `to_dict`."""
        ends = ("gap_lower_pct", "gap_upper_pct", "kl_lower_pct", "kl_upper_pct")
        lower, upper, kl_lower, kl_upper = (
            (-math.inf if "lower" in end else math.inf) if flat[end] is None else float(flat[end]) for end in ends
        )
        rest: dict[str, Any] = {
            k: math.nan if flat[k] is None else flat[k] for k in cls.__annotations__ if "interval" not in k
        }
        return cls(gap_interval_pct=Interval(lower, upper), kl_interval_pct=Interval(kl_lower, kl_upper), **rest)


def sums_of_batch(
    reference: Float, plans: Float, labels: Float, weights: Float | None, groups: NDArray[np.int64] | None
) -> Sums:
    """The sums of one batch.

    reference: logits float64[B]; plans: logits float64[P, B]; labels: float64[B], 0, 1 or NaN (left out and counted);
    weights: float64[B] or None for ones; groups: int64[B] or None.
    """
    labelled = ~np.isnan(labels)
    num_unlabelled = int(len(labels) - labelled.sum())
    if num_unlabelled:
        reference, plans, labels = reference[labelled], plans.compress(labelled, axis=1), labels[labelled]
        weights = None if weights is None else weights[labelled]
        groups = None if groups is None else groups[labelled]
    w = np.ones(len(labels)) if weights is None else weights
    logits = np.concatenate([reference[None], plans])
    positive = softplus(logits)
    loss = w * (positive - labels * logits)
    prediction = np.exp(logits - positive)
    # KL(p_ref || p_plan) of two Bernoulli laws, from logits.
    kl = w * (positive[1:] - positive[0] - prediction[0] * (logits[1:] - logits[0]))
    entropy = w * (positive[0] - prediction[0] * logits[0])
    y, x = loss[0], loss[1:] - loss[0]
    moments = np.zeros((len(plans), 2, 10))
    if groups is None:
        moments = np.stack([moment_sums(x, y), moment_sums(kl, entropy)], axis=1)
    return Sums(
        num_rows=len(labels),
        num_unlabelled=num_unlabelled,
        weight=float(w.sum()),
        label=float((w * labels).sum()),
        entropy=float(entropy.sum()),
        loss=loss.sum(axis=1),
        prediction=(prediction * w).sum(axis=1),
        histogram=_histogram(logits, labels, w),
        moments=moments,
        groups=None if groups is None else group_sums(np.concatenate([x, kl, y[None], entropy[None]]), groups),
    )


def group_sums(rows: Float, groups: NDArray[np.int64]) -> GroupSums:
    """The sums of each row of float64[R, B] over the groups int64[B], by bucket."""
    buckets, where = np.unique(_bucket(groups), return_inverse=True)
    return GroupSums(buckets, np.stack([np.bincount(where, weights=row, minlength=len(buckets)) for row in rows]))


def _bucket(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Buckets that keys in sequence spread over."""
    return (mixed(groups.astype(np.uint64)) % np.uint64(GROUP_BUCKETS)).astype(np.int64)


def _histogram(logits: Float, labels: Float, weights: Float) -> Float:
    scale = AUC_BINS / (2 * AUC_LOGIT_RANGE)
    bins = np.clip(np.floor((logits + AUC_LOGIT_RANGE) * scale), 0, AUC_BINS - 1)
    # A model that overflows gives NaN logits: its AUC is counted at the lowest score, its loss is NaN anyway.
    flat = np.nan_to_num(bins).astype(np.int64) + AUC_BINS * labels.astype(np.int64)
    counts = [np.bincount(row, weights=weights, minlength=2 * AUC_BINS) for row in flat]
    return np.stack(counts).reshape(len(logits), 2, AUC_BINS).astype(np.float64, copy=False)


def _auc(histogram: Float) -> tuple[float, float]:
    """AUC with ties inside a bin counted half, and the most that those ties can move it."""
    negative, positive = histogram
    pairs = negative.sum() * positive.sum()
    if pairs == 0:
        return math.nan, math.nan
    below = np.cumsum(negative) - negative
    tied = (negative * positive).sum()
    return float(((below * positive).sum() + tied / 2) / pairs), float(tied / 2 / pairs)


def _entropy(rate: float) -> float:
    if not 0 < rate < 1:
        return 0.0
    return -rate * math.log(rate) - (1 - rate) * math.log1p(-rate)


def _percent(interval: Interval) -> Interval:
    return Interval(100 * interval.lower, 100 * interval.upper)
