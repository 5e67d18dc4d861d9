"""Where the gap of a plan comes from: what each unit does to the logits by itself, summed over examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowprec.core.sums import add_fields
from lowprec.models.quality import softplus

__all__ = ["UnitSums", "unit_sums"]

Float = NDArray[np.float64]


@dataclass(frozen=True)
class UnitSums:
    """Where the change of a plan comes from: sums over the traced examples for each of K units, float64[K] each.

    With s the first-order change of a logit by a unit, S that of all units together, r = p - y and h = p (1 - p):
    `first` sums w r s over labelled examples and `first_squares` its square, `second` sums w h s S / 2 over all
    examples and `second_squares` its square. `second` adds up to the predicted KL divergence of the plan.
    loss, entropy: float64[1], what the reference loses on the same labelled examples, and its entropy on all of them.
    """

    first: Float
    first_squares: Float
    second: Float
    second_squares: Float
    loss: Float
    entropy: Float

    @classmethod
    def zero(cls, num_units: int) -> UnitSums:
        """Those of no example."""
        return cls(*(np.zeros(size) for size in [num_units] * 4 + [1, 1]))

    def __add__(self, other: UnitSums) -> UnitSums:
        return add_fields(self, other)


def unit_sums(changes: NDArray[np.float32], reference: Float, labels: Float, weights: Float) -> UnitSums:
    """The sums of one batch.

    changes: float32[K, B], what each unit does to each logit, to first order; reference: its logits float64[B]; labels:
    float64[B], NaN where not known; weights: float64[B].
    """
    s = changes.astype(np.float64)
    positive = softplus(reference)
    p = np.exp(reference - positive)
    known = ~np.isnan(labels)
    w, y, z = weights[known], labels[known], reference[known]
    first = s[:, known] * (w * (p[known] - y))
    second = s * (0.5 * weights * p * (1 - p) * s.sum(axis=0))
    return UnitSums(
        first=first.sum(axis=1),
        first_squares=np.square(first).sum(axis=1),
        second=second.sum(axis=1),
        second_squares=np.square(second).sum(axis=1),
        loss=np.array([(w * (positive[known] - y * z)).sum()]),
        entropy=np.array([(weights * (positive - p * reference)).sum()]),
    )
