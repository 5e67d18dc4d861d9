"""First- and second-order statistics of one pass over a window, from which the gap of any plan follows.

Let s[u,p,i] be the change of example i's logit when unit u alone goes to precision p, to first order in the unit's
outputs. With r = p_ref - y and h = p_ref (1 - p_ref), the mean loss change of a plan with one column z per (unit,
precision) is about a . z + 1/2 z Q z, where a = mean(w r s) and Q = mean(w h s s^T).

Beside the columns two directions are kept that no plan takes: a shift of every logit by one (s = 1) and a growth of
every logit by its own size (s = z_ref). They say how far the reference is from calibrated, and what that does to a.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from lowprec.core.sums import add_fields
from lowprec.evaluation.exact.exact_evaluator import ExactEvaluator
from lowprec.evaluation.stats.confidence import Blocks, Interval, RatioMoments, ratio_interval
from lowprec.evaluation.stats.second_moment import DenseMoment, SecondMoment, SketchedMoment
from lowprec.models.quality import softplus
from lowprec.plan import Forms, Plan, Precision, Unit, is_layer
from lowprec.traffic.batch import Batch

__all__ = [
    "MAX_DENSE_COLUMNS",
    "BlockSums",
    "Column",
    "Profile",
    "ProfilePart",
    "ProfileTask",
    "columns_of",
    "logit_changes",
]

Float = NDArray[np.float64]

# A unit at a precision other than fp32.
Column = tuple[str, Precision]

# Beyond so many columns Q is sketched.
MAX_DENSE_COLUMNS = 2048
# Rows of the sketch of Q over all blocks of a window, and of the sketch over groups: relative errors of 2.2 and 4.4
# percent (one standard deviation).
SKETCH_BUCKETS = 4096
GROUP_SKETCH_BUCKETS = 1024

# Directions beside the columns: the shift and the scale of the reference's logits.
NUM_CALIBRATION_DIRECTIONS = 2


def columns_of(units: Iterable[Unit], precisions: Iterable[Precision]) -> tuple[Column, ...]:
    """Every unit at every precision but fp32, unit by unit, most exact first."""
    low = [p for p in Precision if p in set(precisions) and p is not Precision.FP32]
    return tuple((unit.name, p) for unit in units for p in low)


@dataclass(frozen=True)
class BlockSums:
    """Sums over the labelled examples of one time block; D directions: the K columns, then shift and scale.

    weight: of w; label: of w y; prediction: of w p_ref; loss: of w l_ref; first: float64[D], of w r s; second: of
    w h s s^T; entropy: of w H(p_ref).
    """

    num_rows: int
    num_unlabelled: int
    weight: float
    label: float
    prediction: float
    loss: float
    entropy: float
    first: Float
    second: SecondMoment

    def __add__(self, other: BlockSums) -> BlockSums:
        return add_fields(self, other)


@dataclass(frozen=True)
class ProfilePart:
    """What some batches of one block add to a profile. `evidence` is described at `Profile`."""

    block: BlockSums
    evidence: SecondMoment

    def __add__(self, other: ProfilePart) -> ProfilePart:
        return add_fields(self, other)

    @classmethod
    def zero(cls, num_columns: int, num_blocks: int, *, by_group: bool) -> ProfilePart:
        """The sums of nothing."""
        d = num_columns + NUM_CALIBRATION_DIRECTIONS
        second: SecondMoment
        evidence: SecondMoment
        is_dense = num_columns <= MAX_DENSE_COLUMNS
        second = DenseMoment.zero(d) if is_dense else SketchedMoment.zero(d, _sketch_buckets(num_blocks))
        if by_group:
            evidence = SketchedMoment.zero(d + 1, GROUP_SKETCH_BUCKETS, by_group=True)
        elif is_dense:
            evidence = DenseMoment.zero(d + 1)
        else:
            evidence = SketchedMoment.zero(d + 1, GROUP_SKETCH_BUCKETS)
        return cls(BlockSums(0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, np.zeros(d), second), evidence)


@dataclass(frozen=True)
class Profile:
    """The sums of a window, block by block in time order, so that everything has a standard error.

    `evidence` is the sum over units of evidence (examples, or groups where traffic has them) of v v^T, where v sums up
    the terms of `first`, and in one more direction of the reference loss, over the examples of a unit: all that the
    error of a first-order sum needs. Profiles over the same columns add: block k of the sum is block k of both.
    """

    columns: tuple[Column, ...]
    blocks: tuple[BlockSums, ...]
    evidence: SecondMoment

    def __add__(self, other: Profile) -> Profile:
        if self.columns != other.columns or len(self.blocks) != len(other.blocks):
            raise ValueError("profiles add only over the same columns and number of blocks")
        blocks = tuple(a + b for a, b in zip(self.blocks, other.blocks, strict=True))
        return Profile(self.columns, blocks, self.evidence + other.evidence)

    @property
    def num_rows(self) -> int:
        """Labelled examples of the window."""
        return sum(block.num_rows for block in self.blocks)

    @property
    def loss(self) -> float:
        """The sum of w l_ref."""
        return float(sum(block.loss for block in self.blocks))

    @property
    def entropy(self) -> float:
        """The sum of w H(p_ref)."""
        return float(sum(block.entropy for block in self.blocks))

    @property
    def first(self) -> Float:
        """The sum of w r s, float64[D]."""
        return np.asarray(sum(block.first for block in self.blocks))

    @property
    def second(self) -> SecondMoment:
        """The sum of w h s s^T over D directions; sketches of the blocks side by side, each its own examples."""
        moments = [block.second for block in self.blocks]
        if isinstance(moments[0], SketchedMoment):
            sketches = [m for m in moments if isinstance(m, SketchedMoment) and m.squares is not None]
            squares = np.sum([m.diagonal for m in sketches], axis=0)
            return SketchedMoment(np.concatenate([m.rows for m in sketches]), squares)
        total = moments[0]
        for moment in moments[1:]:
            total = total + moment
        return total

    def selected(self, plans: Sequence[Plan]) -> Float:
        """float64[P, D], 1 where a plan has the column's unit at the column's precision; no plan shifts or scales."""
        chosen = np.array(
            [[plan[unit] is precision for unit, precision in self.columns] for plan in plans], dtype=float
        )
        return np.pad(chosen.reshape(len(plans), len(self.columns)), ((0, 0), (0, NUM_CALIBRATION_DIRECTIONS)))

    def gaps_pct(self, z: Float, first: Float | None = None) -> tuple[Float, Float]:
        """The proxy gap (of the reference's loss) and KL gap (of its entropy) of plans in percent, float64[P] each.

        z: float64[P, D]. `first` replaces the measured first-order sums, float64[D].
        """
        quadratic = 0.5 * self.second.quadratic(z)
        linear = _dots(z, self.first if first is None else first)
        return 100 * (linear + quadratic) / self.loss, 100 * quadratic / self.entropy

    def block_sums(self, z: Float) -> tuple[Float, Float]:
        """The predicted loss change of each plan in each block, float64[P, num_blocks], and each block's loss."""
        change = [_dots(z, block.first) + 0.5 * block.second.quadratic(z) for block in self.blocks]
        return np.stack(change, axis=1), np.array([block.loss for block in self.blocks])

    def moments(self, z: Float) -> list[RatioMoments]:
        """Moments of (predicted loss change, reference loss) over the units of evidence, for each plan.

        Their spread is that of the first order, which is nearly all of it for changes that a budget would allow. How
        many units carry the change is not known here: all of them are taken to.
        """
        ahead = np.pad(z, ((0, 0), (0, 1)))
        loss = np.zeros(ahead.shape[1])
        loss[-1] = 1.0
        xx, (yy,) = self.evidence.quadratic(ahead), self.evidence.quadratic(loss[None])
        xy = (self.evidence.quadratic(ahead + loss) - self.evidence.quadratic(ahead - loss)) / 4
        x = _dots(z, self.first) + 0.5 * self.second.quadratic(z)
        n, y = self.num_rows, self.loss
        return [
            RatioMoments(n, float(a), y, max(float(b), 0.0), float(c), float(yy), xxxx=float(b) ** 2 / max(n, 1))
            for a, b, c in zip(x, xx, xy, strict=True)
        ]

    def intervals_pct(self, z: Float, *, confidence: float) -> list[Interval]:
        """The interval of each plan's proxy gap, in percent: how far labels and sample let it be from the truth.

        It says nothing of the error of the quadratic model itself.
        """
        change, loss = self.block_sums(z)
        found = [
            ratio_interval(m, 1 - confidence, blocks=Blocks(x, loss))
            for m, x in zip(self.moments(z), change, strict=True)
        ]
        return [Interval(100 * i.lower, 100 * i.upper) for i in found]


@dataclass(frozen=True)
class ProfileTask:
    """A piece of a profile: batches of one time block of a window.

    label_free: every example has the reference's own prediction for a label, whether it has another one or not. Then
    the first order is zero, the loss is the entropy, and gaps are the label-free ones.
    """

    columns: tuple[Column, ...]
    num_blocks: int
    batches: tuple[int, ...]
    keep: None = None
    label_free: bool = False
    forms: Forms = field(default_factory=dict)

    def sums(self, evaluator: ExactEvaluator, batch: Batch) -> ProfilePart:
        """What one batch adds; rows without a label are counted and left out."""
        by_group = batch.groups is not None
        zero = ProfilePart.zero(len(self.columns), self.num_blocks, by_group=by_group)
        if batch.num_rows == 0:
            return zero
        logits, s = logit_changes(evaluator, batch, self.columns)
        rows = np.arange(batch.num_rows) if self.label_free else np.flatnonzero(~np.isnan(batch.labels))
        if len(rows) < batch.num_rows:
            s, logits = s[:, rows], logits[rows]
        z = logits.astype(np.float64)
        w = np.ones(len(z)) if batch.weights is None else batch.weights[rows]
        positive = softplus(z)
        p = np.exp(z - positive)
        y = p if self.label_free else batch.labels[rows].astype(np.float64)
        loss, residual, curvature = w * (positive - y * z), w * (p - y), w * p * (1 - p)
        directions = np.empty((len(s) + NUM_CALIBRATION_DIRECTIONS + 1, len(y)), dtype=np.float32)
        directions[: len(s)], directions[len(s)], directions[len(s) + 1] = s, 1.0, logits
        moved = directions[:-1]
        keys = (np.uint64(batch.index) << np.uint64(32)) + rows.astype(np.uint64)
        second: SecondMoment
        if isinstance(zero.block.second, DenseMoment):
            second = DenseMoment.of(moved, curvature)
        else:
            second = SketchedMoment.of(moved, curvature, keys, _sketch_buckets(self.num_blocks), by_group=False)
        first = torch.mv(torch.from_numpy(moved), torch.from_numpy(residual.astype(np.float32))).numpy()
        # In place: the terms of `first`, with the loss in the last direction.
        np.multiply(moved, residual.astype(np.float32), out=moved)
        directions[-1] = loss
        block = BlockSums(
            num_rows=len(y),
            num_unlabelled=int(batch.num_rows - len(y)),
            weight=float(w.sum()),
            label=float((w * y).sum()),
            prediction=float((w * p).sum()),
            loss=float(loss.sum()),
            entropy=float((w * (positive - p * z)).sum()),
            first=first.astype(np.float64),
            second=second,
        )
        return ProfilePart(block, _evidence(zero.evidence, directions, keys, batch, rows))


def logit_changes(
    evaluator: ExactEvaluator, batch: Batch, columns: Sequence[Column]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The reference logits float32[B] and the first-order logit changes s of every column, float32[K, B].

    One forward and one backward pass, and one reading of the rows.
    """
    if batch.num_rows == 0:  # every row was bad
        return np.empty(0, np.float32), np.empty((len(columns), 0), np.float32)
    rows: dict[str, dict[Precision, int]] = {}
    for k, (unit, precision) in enumerate(columns):
        rows.setdefault(unit, {})[precision] = k
    needed = {unit: set(found) for unit, found in rows.items()}
    reference, gradients = evaluator.differentiated(batch, needed)
    evaluator.check_assignment(batch, [unit for unit in needed if not is_layer(unit)])
    s = np.zeros((len(columns), batch.num_rows), dtype=np.float32)
    with torch.inference_mode():
        wanted = [rows.get(call.table, {}) for call in reference.calls]
        found = evaluator.tables.scores(reference.calls, [list(columns_of) for columns_of in wanted], gradients.tables)
        for columns_of, changes in zip(wanted, found, strict=True):
            for precision, change in changes.items():
                s[columns_of[precision]] += change
        layers = {unit: list(found) for unit, found in rows.items() if is_layer(unit)}
        for layer, precision, change in evaluator.layer_changes(reference, gradients, layers):
            s[rows[layer][precision]] += change
    return reference.logits.numpy(), s


def _evidence(
    zero: SecondMoment, v: NDArray[np.float32], keys: NDArray[np.uint64], batch: Batch, rows: NDArray[np.int64]
) -> SecondMoment:
    ones = np.ones(v.shape[1])
    if isinstance(zero, DenseMoment):
        return DenseMoment.of(v, ones)
    by_group = batch.groups is not None
    if batch.groups is not None:
        keys = batch.groups[rows].astype(np.uint64)
    return SketchedMoment.of(v, ones, keys, GROUP_SKETCH_BUCKETS, by_group=by_group)


def _dots(z: Float, v: Float) -> Float:
    """Z @ v, but the last bits of a row do not depend on how many rows there are."""
    return np.array([row @ v for row in z])


def _sketch_buckets(num_blocks: int) -> int:
    return -(-SKETCH_BUCKETS // num_blocks)
