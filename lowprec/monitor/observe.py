"""One pass over a window: the plan against the reference, gaps by unit, statistics of inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lowprec.core.sums import add_fields
from lowprec.evaluation.attribution import UnitSums, unit_sums
from lowprec.evaluation.evaluate import NUM_BLOCKS, pieces_of
from lowprec.evaluation.exact.exact_evaluator import ExactEvaluator
from lowprec.evaluation.metrics import GroupSums, Sums, group_sums, sums_of_batch
from lowprec.evaluation.rows import RowAccount, RowCounter
from lowprec.evaluation.stats.confidence import Blocks, RatioMoments, design_effect, moment_sums
from lowprec.evaluation.workers.worker import Workers
from lowprec.models.quality import softplus
from lowprec.monitor.inputs.counts import InputCounts, counts_of
from lowprec.plan import Forms, Plan, Precision
from lowprec.traffic import BadRow, TrafficWindow
from lowprec.traffic.batch import Batch

__all__ = ["LabelFreeSums", "Observation", "ObservationPart", "WindowObservation", "observe"]

Float = NDArray[np.float64]

# The changes by unit take a backward pass. Where a window has many batches, they are found on so many of them at least,
# and on every fourth at most (`make bench NAME=cost`).
_MIN_TRACED = 16
_MAX_STRIDE = 4


@dataclass(frozen=True)
class LabelFreeSums:
    """Sums over all examples, labelled or not: the KL divergence of the plan and the entropy of the reference.

    The entropy of a prediction is its expected loss where the reference is calibrated, so KL over entropy is the
    expected gap. moments: float64[10], the `moment_sums` of k and h; zero where groups are the units of
    evidence, and then `groups` has the sums of each (rows k, h).
    """

    num_rows: int
    moments: Float
    groups: GroupSums | None

    def __add__(self, other: LabelFreeSums) -> LabelFreeSums:
        groups = self.groups + other.groups if self.groups and other.groups else None
        return LabelFreeSums(self.num_rows + other.num_rows, self.moments + other.moments, groups)

    @property
    def totals(self) -> Float:
        """The sums of k and of h, float64[2]."""
        return self.moments[:2] if self.groups is None else np.asarray(self.groups.values.sum(axis=1))

    @property
    def evidence(self) -> RatioMoments:
        """Moments of (KL, entropy) over the units of evidence."""
        if self.groups is None:
            return RatioMoments(self.num_rows, *map(float, self.moments))
        return RatioMoments.of(*self.groups.values)


@dataclass(frozen=True)
class ObservationPart:
    """What some rows add to an observation. `inputs` has the counts of consecutive stretches of the rows."""

    exact: Sums
    label_free: LabelFreeSums
    units: UnitSums
    inputs: tuple[InputCounts, ...]

    def __add__(self, other: ObservationPart) -> ObservationPart:
        return add_fields(self, other)


@dataclass(frozen=True)
class Observation:
    """A task: one batch of a window, its rows in `num_stretches` for the counts of inputs.

    is_traced: whether the changes of each of `units` are found as well, or only that of the plan.
    """

    plan: Plan
    units: tuple[str, ...]
    dense_names: tuple[str, ...]
    is_traced: bool
    num_stretches: int
    batches: tuple[int, ...]
    keep: None = None
    forms: Forms = field(default_factory=dict)

    def sums(self, evaluator: ExactEvaluator, batch: Batch) -> ObservationPart:
        """What the batch adds."""
        changes = None
        if self.is_traced:
            traced = evaluator.traced(batch, self.plan, self.units)
            reference, plan, changes = traced.reference, traced.plan, traced.changes
        else:
            logits = evaluator.logits(batch, [self.plan])
            reference, plan = logits.reference, logits.plans[0]
        rows = _Rows.of(reference.astype(np.float64), plan.astype(np.float64), batch)
        parts = (
            [batch]
            if self.num_stretches == 1
            else [batch.part(k, self.num_stretches) for k in range(self.num_stretches)]
        )
        return ObservationPart(
            exact=sums_of_batch(rows.reference, rows.plan[None], rows.labels, batch.weights, batch.groups),
            label_free=_label_free(rows.kl, rows.entropy, batch.groups),
            units=(
                UnitSums.zero(len(self.units))
                if changes is None
                else unit_sums(changes, rows.reference, rows.labels, rows.weights)
            ),
            inputs=tuple(counts_of(part, self.dense_names) for part in parts),
        )


@dataclass(frozen=True)
class WindowObservation:
    """An observation of a whole window.

    label_blocks: sums of loss change and reference loss by time block; label_free_blocks: of KL and entropy.
    """

    exact: Sums
    label_free: LabelFreeSums
    units: UnitSums
    label_blocks: Blocks
    kl_blocks: Blocks
    label_free_blocks: Blocks
    rows: RowAccount
    bad_rows: tuple[BadRow, ...]
    is_complete: bool

    @property
    def label_design_effect(self) -> float:
        """By how much the gap varies over time blocks more than between units of evidence."""
        return design_effect(self.exact.evidence(0)[0], self.label_blocks)

    @property
    def label_free_design_effect(self) -> float:
        """By how much the label-free gap does."""
        return design_effect(self.label_free.evidence, self.label_free_blocks)


def low_units(plan: Plan) -> tuple[str, ...]:
    """The units of a plan that are not fp32."""
    return tuple(name for name, precision in plan.items() if precision is not Precision.FP32)


def observe(
    workers: Workers,
    window: TrafficWindow,
    plan: Plan,
    *,
    forms: Forms | None = None,
    on_inputs: Callable[[int, InputCounts], None],
    max_bad_fraction: float = 0.0,
    on_progress: Callable[[int], None] | None = None,
) -> WindowObservation:
    """Observe a plan over a window, its layers in those forms; `on_inputs` gets the counts of inputs by time block.

    A task is one batch, added up in order: the result is the same to the bit for any number of workers.
    """
    stretches = -(-NUM_BLOCKS // window.num_batches)
    schema = window.schema
    traced_every = min(max(window.num_batches // _MIN_TRACED, 1), _MAX_STRIDE)
    tasks = [
        Observation(plan, low_units(plan), schema.dense, k % traced_every == 0, stretches, piece, forms=forms or {})
        for k, piece in enumerate(pieces_of(window, None, 1))
    ]
    counter = RowCounter(window, max_bad_fraction)
    total: ObservationPart | None = None
    by_block = np.zeros((3, NUM_BLOCKS, 2))
    is_complete = True
    for k, chunk in enumerate(workers.run(window, tasks)):
        part = chunk.sums
        for i, counts in enumerate(part.inputs):
            on_inputs((k * stretches + i) * NUM_BLOCKS // (window.num_batches * stretches), counts)
        change, kl, loss, entropy = part.exact.totals()
        by_block[:, k * NUM_BLOCKS // window.num_batches] += np.array(
            [[change, loss], [kl, entropy], part.label_free.totals.tolist()]
        )
        part = ObservationPart(part.exact, part.label_free, part.units, ())
        total = part if total is None else total + part
        counter.add(chunk)
        if on_progress:
            on_progress(1)
        if counter.is_hopeless:
            is_complete = False
            break
    counter.check_outputs()
    assert total is not None, "a window has at least one batch"
    labels, kl_blocks, label_free = (Blocks(of[:, 0], of[:, 1]) for of in by_block)
    return WindowObservation(
        exact=total.exact,
        label_free=total.label_free,
        units=total.units,
        label_blocks=labels,
        kl_blocks=kl_blocks,
        label_free_blocks=label_free,
        rows=counter.account(total.exact.num_unlabelled),
        bad_rows=tuple(counter.bad_rows),
        is_complete=is_complete,
    )


@dataclass(frozen=True)
class _Rows:
    """What is known of each row of a batch, float64[B] each: logits, labels (NaN where not known) and weights, the
    prediction of the reference, the KL divergence of the plan from it, and its entropy.
    """

    reference: Float
    plan: Float
    labels: Float
    weights: Float
    p: Float
    kl: Float
    entropy: Float

    @classmethod
    def of(cls, reference: Float, plan: Float, batch: Batch) -> _Rows:
        weights = np.ones(len(reference)) if batch.weights is None else batch.weights
        positive, plan_positive = softplus(reference), softplus(plan)
        p = np.exp(reference - positive)
        return cls(
            reference=reference,
            plan=plan,
            labels=batch.labels.astype(np.float64),
            weights=weights,
            p=p,
            kl=weights * (plan_positive - positive - p * (plan - reference)),
            entropy=weights * (positive - p * reference),
        )


def _label_free(kl: Float, entropy: Float, groups: NDArray[np.int64] | None) -> LabelFreeSums:
    if groups is not None:
        return LabelFreeSums(len(kl), np.zeros(10), group_sums(np.stack([kl, entropy]), groups))
    return LabelFreeSums(len(kl), moment_sums(kl, entropy), None)
