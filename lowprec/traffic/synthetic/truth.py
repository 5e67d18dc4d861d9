"""The truth behind synthetic traffic: which ids are popular, and what moves a click."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from lowprec.traffic.batch import Bags
from lowprec.traffic.synthetic.spec import LabelShift, NewIds, SyntheticSpec

__all__ = ["FeatureTruth", "Truth"]

SECONDS_PER_DAY = 86_400
# Ranks from here on have effects that fade out: a rare id that mattered much could not be learned from few rows.
_HEAD = 300


class FeatureTruth:
    """Popularity and effects of the ids of one feature.

    `effects`: float64[rows] and `vectors`: float64[rows, rank], by id. Under the popularity before any drift a bag's
    sums of them have mean 0 and variance 1 (for vectors: 1 a component).
    """

    def __init__(self, spec: SyntheticSpec, index: int) -> None:
        name = spec.features[index]
        size = spec.num_embeddings[name]
        rng = np.random.default_rng([spec.seed, 1, index])
        self.is_multi_hot = name in spec.multi_hot
        self.id_of_rank = rng.permutation(size)
        self.id_of_rank_by_drift: dict[int, NDArray[np.int64]] = {}
        self.cumulative_by_drift: dict[int, NDArray[np.float64]] = {}
        self.first_rank_by_drift: dict[int, int] = {}
        num_seen = size
        for at, drift in enumerate(spec.drifts):
            if isinstance(drift, LabelShift) or name not in drift.features:
                continue
            if isinstance(drift, NewIds):
                count = max(1, int(size * drift.fraction))
                num_seen -= count
                self.first_rank_by_drift[at] = num_seen
                self.cumulative_by_drift[at] = _zipf_cumulative(count, spec.zipf_exponent)
            else:
                self.id_of_rank_by_drift[at] = np.random.default_rng([spec.seed, 2, index, at]).permutation(size)
        self.num_seen = num_seen
        self.cumulative = _zipf_cumulative(num_seen, spec.zipf_exponent)
        fading = 1 / np.sqrt(1 + np.arange(size) / _HEAD)
        by_rank = rng.standard_normal((size, 1 + spec.interaction_rank)) * fading[:, None]
        probability = np.diff(self.cumulative, prepend=0.0)
        mean = probability @ by_rank[:num_seen]
        by_rank -= mean
        ids_per_bag = spec.mean_length if self.is_multi_hot else 1.0
        by_rank /= np.sqrt(ids_per_bag * (probability @ by_rank[:num_seen] ** 2))
        by_id = np.empty_like(by_rank)
        by_id[self.id_of_rank] = by_rank
        self.effects = np.ascontiguousarray(by_id[:, 0])
        self.vectors = np.ascontiguousarray(by_id[:, 1:])


class Truth:
    """Everything that decides a click, reproducible from the spec alone."""

    def __init__(self, spec: SyntheticSpec) -> None:
        self.spec = spec
        self.features = tuple(FeatureTruth(spec, i) for i in range(spec.num_sparse))
        rng = np.random.default_rng([spec.seed, 3])
        pairs: list[tuple[int, int]] = []
        while spec.num_sparse > 1 and len(pairs) < spec.num_interactions:
            order = rng.permutation(spec.num_sparse)
            pairs += list(zip(order[0::2].tolist(), order[1::2].tolist(), strict=False))
        self.pairs: tuple[tuple[int, int], ...] = tuple(pairs[: spec.num_interactions])
        dense_share = spec.dense_share if spec.num_dense else 0.0
        pair_share = spec.interaction_share if self.pairs else 0.0
        dense = rng.standard_normal(spec.num_dense)
        ids = rng.uniform(0.5, 1.5, spec.num_sparse)
        self.dense_weights = dense * math.sqrt(dense_share) * spec.signal / max(float(np.linalg.norm(dense)), 1e-12)
        id_scale = math.sqrt(1 - dense_share - pair_share) * spec.signal
        self.id_weights: NDArray[np.float64] = ids * id_scale / float(np.linalg.norm(ids))
        # A product of two vectors of unit components has variance `rank`.
        self.pair_weight = spec.signal * math.sqrt(pair_share / max(len(self.pairs), 1) / spec.interaction_rank)
        self.user_effects = rng.standard_normal(spec.num_users) * spec.user_signal
        spread = math.hypot(spec.signal, spec.user_signal if spec.num_users else 0.0)
        self.bias = _bias(spec.click_rate, spread)

    def logits(
        self,
        times: NDArray[np.int64],
        dense: NDArray[np.float32],
        sparse: Mapping[str, Bags],
        users: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float64]:
        """The true logit of each row, drift included: what column `true_logit` holds."""
        spec = self.spec
        logits = self.bias + dense.astype(np.float64) @ self.dense_weights
        in_pair = {index for pair in self.pairs for index in pair}
        vectors: dict[int, NDArray[np.float64]] = {}
        for index, (name, feature) in enumerate(zip(spec.features, self.features, strict=True)):
            bags = sparse[name]
            logits += self.id_weights[index] * _pooled(feature.effects, bags)
            if index in in_pair:
                vectors[index] = _pooled(feature.vectors, bags)
        for first, second in self.pairs:
            logits += self.pair_weight * np.einsum("nr,nr->n", vectors[first], vectors[second])
        if users is not None and spec.num_users:
            logits += self.user_effects[users]
        for drift in spec.drifts:
            if isinstance(drift, LabelShift):
                logits[times >= self.drift_start(drift.day)] += drift.offset
        return logits

    def drift_start(self, day: float) -> int:
        """The first second of a drift."""
        return self.spec.start + math.ceil(day * SECONDS_PER_DAY)


def _zipf_cumulative(size: int, exponent: float) -> NDArray[np.float64]:
    cumulative = np.cumsum(np.arange(1, size + 1, dtype=np.float64) ** -exponent)
    normalized: NDArray[np.float64] = cumulative / cumulative[-1]
    return normalized


def _pooled(by_id: NDArray[np.float64], bags: Bags) -> NDArray[np.float64]:
    """The sum over each bag; by_id is [rows] or [rows, rank]."""
    looked_up = by_id[bags.values]
    num_rows = len(bags.offsets) - 1
    if len(bags.values) == num_rows and (np.diff(bags.offsets) == 1).all():
        return looked_up
    lengths = np.diff(bags.offsets)
    pooled = np.zeros((num_rows, *by_id.shape[1:]))
    filled = lengths > 0
    # Empty bags are left out: reduceat has no sum of nothing.
    pooled[filled] = np.add.reduceat(looked_up, bags.offsets[:-1][filled]) if filled.any() else 0.0
    return pooled


def _bias(click_rate: float, spread: float) -> float:
    """The logit around which normal logits of this spread give this label rate, by bisection."""
    points, weights = np.polynomial.hermite_e.hermegauss(61)
    weights = weights / weights.sum()
    low, high = -30.0, 30.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        rate = float(weights @ (1 / (1 + np.exp(-(middle + spread * points)))))
        low, high = (middle, high) if rate < click_rate else (low, middle)
    return (low + high) / 2
