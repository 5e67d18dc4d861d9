"""A race: plans evaluated exactly on slices of a window in random order, with the profile as control variate.

A slice is a stretch of a batch. On every slice the loss change of a plan is measured exactly and predicted from the
first-order logit changes. The prediction is known over the whole window from the profile, so only the difference of the
two, which varies far less than the change itself (make bench NAME=control_variate), is estimated from the slices seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from lowprec.core.sums import add_fields
from lowprec.evaluation.exact.exact_evaluator import ExactEvaluator
from lowprec.evaluation.metrics import Sums, sums_of_batch
from lowprec.evaluation.profile.profile import Column, logit_changes
from lowprec.models.quality import softplus
from lowprec.plan import Forms, Plan
from lowprec.traffic.batch import Batch

__all__ = ["RaceSums", "RaceTask", "Residuals"]

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Residuals:
    """Sums of e = exact - predicted and of what it is a share of, y, over slices of their totals and over examples.

    e: float64[P], with squares and products `ee_slices`, `ey_slices`, `ee_rows`, `ey_rows`; y: its sum, with the
    squares `yy_slices` and `yy_rows`.
    """

    e: Float
    ee_slices: Float
    ey_slices: Float
    ee_rows: Float
    ey_rows: Float
    y: float
    yy_slices: float
    yy_rows: float

    @classmethod
    def of_slice(cls, e: Float, y: Float) -> Residuals:
        """Of one slice; e: float64[P, B], y: float64[B]."""
        total, below = e.sum(axis=1), float(y.sum())
        rows = np.square(e).sum(axis=1), (e * y).sum(axis=1)
        return cls(total, total**2, total * below, *rows, below, below**2, float(np.square(y).sum()))

    def only(self, plans: Sequence[int]) -> Residuals:
        """Those of some of the plans."""
        of_plans = ("e", "ee_slices", "ey_slices", "ee_rows", "ey_rows")
        return replace(self, **{name: getattr(self, name)[list(plans)] for name in of_plans})

    def __add__(self, other: Residuals) -> Residuals:
        return add_fields(self, other)


@dataclass(frozen=True)
class RaceSums:
    """Sums over the slices that P plans have raced on.

    exact: of everything, on their rows; gap: residuals of the loss change, beside the reference's loss; kl: of the KL
    divergence, beside the reference's entropy; changed, predicted: float64[P], sums over rows of the squared exact
    change and of the squared first-order change.
    """

    num_slices: int
    exact: Sums
    gap: Residuals
    kl: Residuals
    changed: Float
    predicted: Float

    def only(self, plans: Sequence[int]) -> RaceSums:
        """The sums of some of the plans, counted from 0."""
        return replace(
            self,
            exact=self.exact.only(plans),
            gap=self.gap.only(plans),
            kl=self.kl.only(plans),
            changed=self.changed[list(plans)],
            predicted=self.predicted[list(plans)],
        )

    def __add__(self, other: RaceSums) -> RaceSums:
        return add_fields(self, other)


@dataclass(frozen=True)
class RaceTask:
    """Plans on some slices of a window: of batch `batches[i]`, cut into `num_parts[i]`, the parts `parts[i]`.

    `keep` names the window, so that a worker knows what it has seen.
    """

    plans: tuple[Plan, ...]
    columns: tuple[Column, ...]
    batches: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]
    num_parts: tuple[int, ...]
    keep: str
    forms: Forms = field(default_factory=dict)

    def sums(self, evaluator: ExactEvaluator, batch: Batch) -> RaceSums:
        """What the slices of one batch add."""
        total: RaceSums | None = None
        here = self.batches.index(batch.index)
        num_parts = self.num_parts[here]
        for part in self.parts[here]:
            sums = self._slice(evaluator, batch.part(part, num_parts), (batch.index, part, num_parts))
            total = sums if total is None else total + sums
        assert total is not None, "a task names no batch without parts"
        return total

    def _slice(self, evaluator: ExactEvaluator, batch: Batch, place: tuple[int, int, int]) -> RaceSums:
        logits = evaluator.logits(batch, self.plans)
        s = evaluator.kept.get(
            (self.keep, place, self.columns, frozenset(self.forms.items())),
            lambda: logit_changes(evaluator, batch, self.columns)[1],
            _num_bytes,
        )
        exact = sums_of_batch(
            logits.reference.astype(np.float64),
            logits.plans.astype(np.float64),
            batch.labels.astype(np.float64),
            batch.weights,
            batch.groups,
        )
        rows = np.flatnonzero(~np.isnan(batch.labels))
        y = batch.labels[rows].astype(np.float64)
        w = np.ones(len(y)) if batch.weights is None else batch.weights[rows]
        z, changed = logits.reference[rows].astype(np.float64), logits.plans.take(rows, axis=1).astype(np.float64)
        # Plan by plan, and not as one matrix product: its last bits would depend on the company.
        chosen = [[k for k, (unit, p) in enumerate(self.columns) if plan[unit] is p] for plan in self.plans]
        moved = np.stack([s[found][:, rows].sum(axis=0) for found in chosen]).astype(np.float64)
        positive = softplus(z)
        p = np.exp(z - positive)
        loss, entropy = w * (positive - y * z), w * (positive - p * z)
        rise = softplus(changed) - positive
        change = w * (rise - y * (changed - z))
        divergence = w * (rise - p * (changed - z))
        linear, curved = w * (p - y) * moved, 0.5 * w * p * (1 - p) * moved**2
        return RaceSums(
            num_slices=1,
            exact=exact,
            gap=Residuals.of_slice(change - linear - curved, loss),
            kl=Residuals.of_slice(divergence - curved, entropy),
            changed=np.square(change).sum(axis=1),
            predicted=np.square(linear).sum(axis=1),
        )


def _num_bytes(array: NDArray[np.float32]) -> int:
    return array.nbytes
