"""Sums of v v^T over examples: exact where directions are few, a random sketch of fixed width where they are many.

A sketch adds every v, with a random sign, to one of `num_buckets` rows. For any z, |rows z|^2 is then an unbiased
estimate of z^T (sum v v^T) z with a relative standard deviation of about sqrt(2 / num_buckets). The diagonal is kept
exactly beside it, so only the part between different directions is estimated: its error is at most that share of
z^T M z and of its diagonal part together. Where the keys of examples are groups, the v of a group are added up before
they are squared: the sketch is then of the sum over groups of (sum v)(sum v)^T.

Source: Charikar, Chen, Farach-Colton, "Finding frequent items in data streams" (the sketch); Alon, Matias, Szegedy,
"The space complexity of approximating the frequency moments" (its second moment).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["DenseMoment", "SecondMoment", "SketchedMoment", "mixed"]

Float = NDArray[np.float64]


class SecondMoment(Protocol):
    """A sum of v v^T over examples, for v with D directions. Adding is associative up to rounding."""

    def __add__(self, other: Self) -> Self: ...

    @property
    def diagonal(self) -> Float:
        """The sums of squares, exact: float64[D]."""

    @property
    def relative_error(self) -> float:
        """The standard deviation of `quadratic`, relative to z^T M z plus its diagonal part; 0 where it is exact."""

    def quadratic(self, z: Float) -> Float:
        """z^T M z of every row of z, float64[P]; z: float64[P, D]. A row's value does not depend on the others."""

    def squared_correlations(self, among: NDArray[np.bool_]) -> float:
        """The sum of squared correlations between the directions in `among` (bool, up to D), each with itself too."""

    def columns(self, first: int) -> Float:
        """The columns of the matrix from `first` on, float64[D, D - first]."""

    def dense(self) -> Float:
        """The matrix, float64[D, D]; it takes D^2 numbers."""


@dataclass(frozen=True)
class DenseMoment:
    """The matrix itself, float64[D, D]."""

    matrix: Float

    @classmethod
    def zero(cls, num_directions: int) -> DenseMoment:
        """The sum over nothing."""
        return cls(np.zeros((num_directions, num_directions)))

    @classmethod
    def of(cls, v: NDArray[np.float32], weights: Float) -> DenseMoment:
        """The sum of weights v v^T; v: float32[D, B], weights: float64[B], not negative.

        The products of one batch are summed in float32, batches in float64: of 4,096 terms the sum is good to about
        1e-6, far below what any sample says.
        """
        # By PyTorch, which keeps to the worker's number of threads; NumPy's BLAS takes every core.
        scaled = torch.from_numpy(v * np.sqrt(weights).astype(np.float32))
        return cls((scaled @ scaled.T).numpy().astype(np.float64))

    def __add__(self, other: DenseMoment) -> DenseMoment:
        return DenseMoment(self.matrix + other.matrix)

    @property
    def diagonal(self) -> Float:
        """The sums of squares, float64[D]."""
        return np.diag(self.matrix).copy()

    @property
    def relative_error(self) -> float:
        """Nothing is estimated."""
        return 0.0

    def quadratic(self, z: Float) -> Float:
        """z^T M z of every row of z, float64[P]."""
        return np.array([row @ self.matrix @ row for row in z])

    def squared_correlations(self, among: NDArray[np.bool_]) -> float:
        """The sum of squared correlations."""
        chosen = np.flatnonzero(among)
        scale = 1 / np.sqrt(self.matrix[chosen, chosen])
        return float(np.square(self.matrix[np.ix_(chosen, chosen)] * scale * scale[:, None]).sum())

    def columns(self, first: int) -> Float:
        """The columns from `first` on."""
        return self.matrix[:, first:]

    def dense(self) -> Float:
        """The matrix."""
        return self.matrix


@dataclass(frozen=True)
class SketchedMoment:
    """`rows`: float64[num_buckets, D]; `squares`: float64[D], the exact diagonal.

    `squares` is None where the diagonal is estimated too, because squares of single examples are not what is summed
    (groups).
    """

    rows: Float
    squares: Float | None

    @classmethod
    def zero(cls, num_directions: int, num_buckets: int, *, by_group: bool = False) -> SketchedMoment:
        """The sum over nothing."""
        rows = np.zeros((num_buckets, num_directions))
        return cls(rows, None if by_group else np.zeros(num_directions))

    @classmethod
    def of(
        cls, v: NDArray[np.float32], weights: Float, keys: NDArray[np.uint64], num_buckets: int, *, by_group: bool
    ) -> SketchedMoment:
        """The sketch of weights v v^T; v: float32[D, B], weights: float64[B], keys: uint64[B].

        Keys name the examples, each a different one, or with `by_group` their groups.
        """
        hashed = mixed(keys)
        buckets = (hashed % np.uint64(num_buckets)).astype(np.int64)
        signs = 1.0 - 2.0 * (hashed >> np.uint64(63)).astype(np.float64)
        scaled = v * (np.sqrt(weights) * signs).astype(np.float32)
        # Examples of one bucket beside each other, so that each bucket is one sum of neighbouring columns.
        order = np.argsort(buckets, kind="stable")
        present, starts = np.unique(buckets[order], return_index=True)
        rows = np.zeros((num_buckets, len(v)))
        if len(present):
            rows[present] = np.add.reduceat(scaled[:, order], starts, axis=1).T
        squares = None if by_group else np.einsum("db,db->d", scaled, scaled, dtype=np.float64)
        return cls(rows, squares)

    def __add__(self, other: SketchedMoment) -> SketchedMoment:
        squares = None if self.squares is None or other.squares is None else self.squares + other.squares
        return SketchedMoment(self.rows + other.rows, squares)

    @property
    def diagonal(self) -> Float:
        """The sums of squares, float64[D]; estimated where groups are summed."""
        return self._sketched_squares if self.squares is None else self.squares.copy()

    @property
    def relative_error(self) -> float:
        """sqrt(2 / num_buckets): an upper limit, reached where directions cancel in z^T M z but not on its diagonal."""
        return math.sqrt(2 / len(self.rows))

    @property
    def _sketched_squares(self) -> Float:
        return np.asarray(np.einsum("md,md->d", self.rows, self.rows))

    def quadratic(self, z: Float) -> Float:
        """An estimate of z^T M z of every row of z, float64[P]."""
        total = np.array([np.square(self.rows @ row).sum() for row in z])
        if self.squares is not None:
            rest = self.squares - self._sketched_squares
            total += np.array([np.square(row) @ rest for row in z])
        return total

    def squared_correlations(self, among: NDArray[np.bool_]) -> float:
        """An estimate of the sum of squared correlations; too high by about (number of directions)^2 / buckets."""
        chosen = np.flatnonzero(among)
        scaled = self.rows[:, chosen] / np.sqrt(self.diagonal[chosen])
        return float(np.square(scaled @ scaled.T).sum())

    def columns(self, first: int) -> Float:
        """The estimated columns from `first` on."""
        found = self.rows.T @ self.rows[:, first:]
        if self.squares is not None:
            own = np.arange(first, len(found))
            found[own, own - first] = self.squares[first:]
        return np.asarray(found)

    def dense(self) -> Float:
        """The estimated matrix."""
        matrix = self.rows.T @ self.rows
        if self.squares is not None:
            np.fill_diagonal(matrix, self.squares)
        return np.asarray(matrix)


def mixed(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 of every key: neighbouring keys give unrelated bits."""
    z = keys + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
