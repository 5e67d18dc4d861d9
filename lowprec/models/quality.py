"""Quality of predictions: normalized entropy, AUC and calibration, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Quality", "auc", "calibration", "cross_entropy", "normalized_entropy", "quality", "softplus"]

Floats = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """The quality of one model on one window. `ne` and `auc` are NaN where only one label occurs."""

    ne: float
    auc: float
    calibration: float
    num_examples: int


def quality(logits: Floats, labels: Floats, weights: Floats | None = None) -> Quality:
    """All of this file's metrics at once; arguments as in `cross_entropy`."""
    return Quality(
        ne=normalized_entropy(logits, labels, weights),
        auc=auc(logits, labels, weights),
        calibration=calibration(logits, labels, weights),
        num_examples=len(labels),
    )


def softplus(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(1 + exp(z)) of every logit, of any shape; stable for any finite one."""
    positive: NDArray[np.float64] = np.maximum(logits, 0) + np.log1p(np.exp(-np.abs(logits)))
    return positive


def cross_entropy(logits: Floats, labels: Floats) -> NDArray[np.float64]:
    """The loss of each example in nats, float64[n]; stable for any finite logit.

    logits: float[n], log odds; labels: float[n], 0 or 1.
    """
    z = np.asarray(logits, dtype=np.float64)
    return softplus(z) - z * labels


def normalized_entropy(logits: Floats, labels: Floats, weights: Floats | None = None) -> float:
    """Mean loss over the entropy of the label rate: 1 is as good as always predicting the rate, lower is better.

    NaN where only one label occurs, because that entropy is 0.
    """
    rate = _mean(np.asarray(labels, dtype=np.float64), weights)
    if not 0.0 < rate < 1.0:
        return float("nan")
    entropy = -(rate * np.log(rate) + (1.0 - rate) * np.log1p(-rate))
    return _mean(cross_entropy(logits, labels), weights) / float(entropy)


def auc(logits: Floats, labels: Floats, weights: Floats | None = None) -> float:
    """The chance that a positive example scores above a negative one, ties counted half; NaN with one label only."""
    if len(labels) == 0:
        return float("nan")
    w = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=np.float64)
    order = np.argsort(logits, kind="stable")
    scores = np.asarray(logits)[order]
    first_of_tie = np.flatnonzero(np.concatenate(([True], scores[1:] != scores[:-1])))
    y = np.asarray(labels, dtype=np.float64)[order]
    positives = np.add.reduceat(w[order] * y, first_of_tie)
    negatives = np.add.reduceat(w[order] * (1.0 - y), first_of_tie)
    pairs = positives.sum() * negatives.sum()
    if pairs == 0.0:
        return float("nan")
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + 0.5 * negatives)).sum() / pairs)


def calibration(logits: Floats, labels: Floats, weights: Floats | None = None) -> float:
    """Sum of predictions over sum of labels: 1 is calibrated on average; infinite where no label is positive."""
    z = np.asarray(logits, dtype=np.float64)
    decay = np.exp(-np.abs(z))
    predictions = np.where(z >= 0.0, 1.0, decay) / (1.0 + decay)
    predicted, observed = _mean(predictions, weights), _mean(np.asarray(labels, dtype=np.float64), weights)
    return predicted / observed if observed > 0.0 else float("inf")


def _mean(values: NDArray[np.float64], weights: Floats | None) -> float:
    if len(values) == 0:
        return float("nan")
    if weights is None:
        return float(values.mean())
    w = np.asarray(weights, dtype=np.float64)
    return float((w * values).sum() / w.sum())
