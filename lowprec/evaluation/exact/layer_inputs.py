"""What layers are given, as histograms that merge, and which int8 form changes predictions least."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from lowprec.core.errors import ModelError
from lowprec.core.sums import add_fields
from lowprec.evaluation.exact.exact_evaluator import ExactEvaluator
from lowprec.plan import Forms, Precision
from lowprec.plan.layer_form import LayerForm
from lowprec.traffic.batch import Batch

__all__ = ["FormSums", "FormTask", "InputHistogram", "LayerInputs", "LayerInputsTask"]

# Bins on each side of zero. A range that grows by a power of two merges neighbours in pairs.
BINS = 4096
_LEAST_EXPONENT = -60


@dataclass(frozen=True)
class InputHistogram:
    """How often a layer's inputs have which values: `counts` int64[2 BINS] over [-2^exponent, 2^exponent).

    lower, upper: the least and the greatest value. Merging is exact and associative.
    """

    exponent: int
    counts: NDArray[np.int64]
    lower: float
    upper: float

    @classmethod
    def of(cls, values: NDArray[np.float32]) -> InputHistogram:
        """Of finite values, in any shape; not empty."""
        lower, upper = float(values.min()), float(values.max())
        # The first power of two beyond them: frexp gives m 2^e with m below 1.
        largest = max(-lower, upper)
        exponent = max(math.frexp(largest)[1] if largest > 0 else _LEAST_EXPONENT, _LEAST_EXPONENT)
        bins = np.floor(values.ravel().astype(np.float64) * (BINS / 2.0**exponent)).astype(np.int64) + BINS
        return cls(exponent, np.bincount(np.clip(bins, 0, 2 * BINS - 1), minlength=2 * BINS), lower, upper)

    def __add__(self, other: InputHistogram) -> InputHistogram:
        exponent = max(self.exponent, other.exponent)
        counts = self._at(exponent) + other._at(exponent)
        return InputHistogram(exponent, counts, min(self.lower, other.lower), max(self.upper, other.upper))

    @property
    def edges(self) -> NDArray[np.float64]:
        """The edges of the bins with values, float64[n + 1]; the outermost are the least and the greatest value."""
        first, last = self._filled
        edges = (np.arange(first, last + 2) - BINS) * (2.0**self.exponent / BINS)
        edges[0], edges[-1] = self.lower, self.upper
        return np.asarray(edges, np.float64)

    @property
    def filled_counts(self) -> NDArray[np.int64]:
        """The counts between `edges`, int64[n]."""
        first, last = self._filled
        return self.counts[first : last + 1]

    @property
    def _filled(self) -> tuple[int, int]:
        filled = np.flatnonzero(self.counts)
        return int(filled[0]), int(filled[-1])

    def _at(self, exponent: int) -> NDArray[np.int64]:
        counts = self.counts
        for _ in range(min(exponent - self.exponent, BINS.bit_length())):
            merged = counts.reshape(-1, 2).sum(axis=1)
            counts = np.zeros_like(counts)
            counts[BINS // 2 : BINS // 2 + BINS] = merged
        return counts


@dataclass(frozen=True)
class LayerInputs:
    """The histogram of each layer's inputs, by unit name; those of layers that were not called are missing."""

    of: Mapping[str, InputHistogram]

    def __add__(self, other: LayerInputs) -> LayerInputs:
        found = dict(self.of)
        for layer, histogram in other.of.items():
            found[layer] = found[layer] + histogram if layer in found else histogram
        return LayerInputs(found)


@dataclass(frozen=True)
class LayerInputsTask:
    """The inputs of layers in the reference, over some batches."""

    layers: tuple[str, ...]
    batches: tuple[int, ...]
    keep: None = None
    forms: Forms = field(default_factory=dict)

    def sums(self, evaluator: ExactEvaluator, batch: Batch) -> LayerInputs:
        """What one batch adds. Raises `ModelError` for an input that is not finite."""
        found = LayerInputs({})
        for call in evaluator.watched(batch, self.layers).layer_calls if batch.num_rows else ():
            if not torch.isfinite(call.input).all():
                raise ModelError(
                    f'batch {batch.index}: an input of "{call.layer}" is not finite in the fp32 model; int8 cannot '
                    "hold it: fix the layer to fp32 in space.units"
                )
            found = found + LayerInputs({call.layer: InputHistogram.of(call.input.numpy())})
        return found


@dataclass(frozen=True)
class FormSums:
    """Sums over examples of w h s^2 for each form, float64[n]: twice the KL divergence it causes, to second order."""

    squares: NDArray[np.float64]

    def __add__(self, other: FormSums) -> FormSums:
        return add_fields(self, other)


@dataclass(frozen=True)
class FormTask:
    """Candidate forms of layers, each alone, over some batches."""

    candidates: tuple[tuple[str, Precision, LayerForm], ...]
    batches: tuple[int, ...]
    keep: None = None
    forms: Forms = field(default_factory=dict)

    def sums(self, evaluator: ExactEvaluator, batch: Batch) -> FormSums:
        """What one batch adds: labels have no part in it."""
        squares = np.zeros(len(self.candidates))
        if batch.num_rows == 0:
            return FormSums(squares)
        reference, gradients = evaluator.differentiated(batch, {layer: {p} for layer, p, _ in self.candidates})
        z = reference.logits.numpy().astype(np.float64)
        curvature = np.exp(-np.abs(z)) / np.square(1 + np.exp(-np.abs(z)))
        if batch.weights is not None:
            curvature = curvature * batch.weights
        for k, (layer, precision, form) in enumerate(self.candidates):
            with evaluator.using({(layer, precision): form}):
                changes = evaluator.layer_changes(reference, gradients, {layer: [precision]})
                s = np.sum([change.astype(np.float64) for _, _, change in changes], axis=0)
            squares[k] = float((curvature * s * s).sum())
        return FormSums(squares)
