"""First- and second-order statistics of one pass over a window, from which the gap of any plan follows.

Let s[u,p,i] be the change of example i's logit when unit u alone goes to precision p, to first order in the unit's
outputs. With r = p_ref - y and h = p_ref (1 - p_ref), the mean loss change of a plan with one column z per (unit,
precision) is about a . z + 1/2 z Q z, where a = mean(w r s) and Q = mean(w h s s^T).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lowprec.models.adapter import ModelAdapter, inputs_of
from lowprec.plan import Plan, Precision, Unit
from lowprec.shards import TableShard
from lowprec.traffic.batch import Batch

__all__ = ["Column", "Profile", "ProfileSums", "Profiler", "columns_of"]

Float = NDArray[np.float64]

# A unit at a precision other than fp32.
Column = tuple[str, Precision]


def columns_of(units: Iterable[Unit], precisions: Iterable[Precision]) -> tuple[Column, ...]:
    """Every unit at every precision but fp32, unit by unit, most exact first."""
    low = [p for p in Precision if p in set(precisions) and p is not Precision.FP32]
    return tuple((unit.name, p) for unit in units for p in low)


@dataclass(frozen=True)
class ProfileSums:
    """Sums over the labelled examples of one block of a window; K columns.

    loss: sum of w l_ref; first: float64[K], sum of w r s; second: float64[K, K], sum of w h s s^T;
    noise: float64[K, K], sum of w^2 r^2 s s^T, the second moment of the terms of `first`.
    """

    num_rows: int
    weight: float
    loss: float
    first: Float
    second: Float
    noise: Float

    def __add__(self, other: ProfileSums) -> ProfileSums:
        return ProfileSums(
            self.num_rows + other.num_rows,
            self.weight + other.weight,
            self.loss + other.loss,
            self.first + other.first,
            self.second + other.second,
            self.noise + other.noise,
        )

    @classmethod
    def zero(cls, num_columns: int) -> ProfileSums:
        """The sums of nothing."""
        square = np.zeros((num_columns, num_columns))
        return cls(0, 0.0, 0.0, np.zeros(num_columns), square, square)


@dataclass(frozen=True)
class Profile:
    """The sums of a window, block by block in time order, so that everything has a standard error.

    Profiles over the same columns add: block k of the sum is block k of both.
    """

    columns: tuple[Column, ...]
    blocks: tuple[ProfileSums, ...]

    def __add__(self, other: Profile) -> Profile:
        if self.columns != other.columns or len(self.blocks) != len(other.blocks):
            raise ValueError("profiles add only over the same columns and number of blocks")
        return Profile(self.columns, tuple(a + b for a, b in zip(self.blocks, other.blocks, strict=True)))

    @property
    def total(self) -> ProfileSums:
        """The sums of the whole window."""
        return sum(self.blocks[1:], self.blocks[0])

    def selected(self, plans: Sequence[Plan]) -> Float:
        """float64[P, K], 1 where a plan has the column's unit at the column's precision."""
        return np.array([[plan[unit] is precision for unit, precision in self.columns] for plan in plans], dtype=float)


class Profiler:
    """Measures s of every column on a batch, with one reference pass, one backward pass and one lookup a column."""

    def __init__(self, adapter: ModelAdapter, shards: dict[str, TableShard], columns: Sequence[Column]) -> None:
        """Profile `columns` of the adapter's model on the given shards."""
        self._adapter = adapter
        self._shards = shards
        self._columns = tuple(columns)
        self._rows: dict[str, dict[Precision, int]] = {}
        for k, (unit, precision) in enumerate(columns):
            self._rows.setdefault(unit, {})[precision] = k

    def swaps(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The reference logits float32[B] and the first-order logit changes s, float32[K, B]."""
        reference, gradients = self._adapter.differentiated(inputs_of(batch))
        s = torch.zeros(len(self._columns), batch.num_rows)
        with torch.inference_mode():
            for call, gradient in zip(reference.calls, gradients, strict=True):
                rows = self._rows.get(call.table, {})
                at_reference = torch.linalg.vecdot(gradient, call.output)
                for precision, pooled in self._shards[call.table].pooled(call, list(rows)).items():
                    s[rows[precision]] += torch.linalg.vecdot(gradient, pooled) - at_reference
        return reference.logits.numpy(), s.numpy()

    def sums(self, batch: Batch) -> ProfileSums:
        """The sums of one batch; rows without a label are left out."""
        if batch.num_rows == 0:
            return ProfileSums.zero(len(self._columns))
        logits, s = self.swaps(batch)
        labelled = ~np.isnan(batch.labels)
        z, y = logits[labelled].astype(np.float64), batch.labels[labelled].astype(np.float64)
        w = np.ones(len(y)) if batch.weights is None else batch.weights[labelled]
        s64 = s[:, labelled].astype(np.float64)
        softplus = np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z)))
        p = np.exp(z - softplus)
        residual = w * (p - y)
        return ProfileSums(
            num_rows=len(y),
            weight=float(w.sum()),
            loss=float((w * (softplus - y * z)).sum()),
            first=s64 @ residual,
            second=(s64 * (w * p * (1 - p))) @ s64.T,
            noise=(s64 * residual**2) @ s64.T,
        )
