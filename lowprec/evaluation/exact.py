"""Exact evaluation: plans and the reference score the same rows; pooled outputs are those of serving, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowprec.errors import ModelError
from lowprec.evaluation.dense import DensePasses
from lowprec.evaluation.kept import Kept
from lowprec.evaluation.metrics import Sums, sums_of_batch
from lowprec.models.adapter import ModelAdapter, ModelInputs, ReferencePass, inputs_of
from lowprec.ops.bags import BagCall
from lowprec.plan import Plan, Precision
from lowprec.shards import LocalTables, Tables
from lowprec.shards.estimate import MAX_KEPT_BYTES
from lowprec.traffic.batch import Batch

__all__ = ["BatchLogits", "ExactEvaluator", "TracedBatch"]


@dataclass(frozen=True)
class BatchLogits:
    """Logits of the reference, float32[B], and of each plan, float32[P, B], on one batch."""

    reference: NDArray[np.float32]
    plans: NDArray[np.float32]


@dataclass(frozen=True)
class TracedBatch:
    """Logits of the reference and of one plan on one batch, float32[B], and where the difference comes from.

    changes: float32[K, B], the change of every logit to first order in the outputs of each of K tables.
    """

    reference: NDArray[np.float32]
    plan: NDArray[np.float32]
    changes: NDArray[np.float32]


class ExactEvaluator:
    """Evaluates many plans on one batch at the cost of one reference pass and one dense pass for each plan.

    Plans share the reference pass and every (table, precision) pooled output that any of them needs.
    """

    def __init__(
        self, adapter: ModelAdapter, tables: Tables | None = None, *, kept_bytes: int = MAX_KEPT_BYTES
    ) -> None:
        """Serve the adapter's model; its tables are its own weights, with minmax ranges, when they are left out.

        kept_bytes: of batches and what was found of them, for tasks that come back.
        """
        self.adapter = adapter
        self.tables = tables or LocalTables(adapter.weights, {})
        # How many ids and bags each table was asked for since this evaluator exists.
        self.lookups: Counter[str] = Counter(dict.fromkeys(self.tables.names, 0))
        self.bags: Counter[str] = Counter(dict.fromkeys(self.tables.names, 0))
        # For tasks that come back to the same batches.
        self.kept = Kept(kept_bytes)
        self._passes = DensePasses(adapter)
        self._is_checked = False

    def sums(self, batch: Batch, plans: Sequence[Plan]) -> Sums:
        """The sums of the reference and of `plans` over the batch."""
        logits = self.logits(batch, plans)
        return sums_of_batch(
            logits.reference.astype(np.float64),
            logits.plans.astype(np.float64),
            batch.labels.astype(np.float64),
            batch.weights,
            batch.groups,
        )

    def logits(self, batch: Batch, plans: Sequence[Plan]) -> BatchLogits:
        """The logits of the reference and of `plans` on the batch.

        Raises `ModelError` when the model cannot be evaluated so (checked on the first batch), when it does not call a
        table that a plan makes low-precision, or when its own logits are not finite.
        """
        if batch.num_rows == 0:  # every row was bad
            return BatchLogits(np.empty(0, np.float32), np.empty((len(plans), 0), np.float32))
        needed: dict[str, set[Precision]] = {name: {plan[name] for plan in plans} for name in self.tables.names}
        inputs = inputs_of(batch)
        if self.tables.are_remote:
            calls = self.adapter.asked(inputs)
            pooled = self.tables.pooled(calls, [needed[call.table] | {Precision.FP32} for call in calls])
            reference = self.adapter.answered(inputs, _with_outputs(calls, pooled))
            self._check(inputs, reference, needed, batch.index)
        else:
            reference = self.adapter.reference(inputs)
            self._check(inputs, reference, needed, batch.index)
            with torch.inference_mode():
                pooled = self.tables.pooled(reference.calls, [needed[call.table] for call in reference.calls])
        outputs = [[pooled[k][plan[call.table]] for k, call in enumerate(reference.calls)] for plan in plans]
        return BatchLogits(reference.logits.numpy(), self._passes.logits(inputs, reference, outputs))

    def differentiated(
        self, batch: Batch, needed: Mapping[str, Collection[Precision]]
    ) -> tuple[ReferencePass, tuple[Tensor, ...]]:
        """The reference pass and the gradient of every call, checked as `logits` checks them.

        `needed` says which precisions of which tables the caller is going to look up.
        """
        inputs = inputs_of(batch)
        calls = None
        if self.tables.are_remote:
            asked = self.adapter.asked(inputs)
            calls = _with_outputs(asked, self.tables.pooled(asked, [{Precision.FP32}] * len(asked)))
        reference, gradients = self.adapter.differentiated(inputs, calls)
        self._check(inputs, reference, needed, batch.index)
        return reference, gradients

    def traced(self, batch: Batch, plan: Plan, tables: Sequence[str]) -> TracedBatch:
        """The reference and one plan on the batch, and what each of `tables` does by itself, to first order.

        One forward and one backward pass, one low-precision lookup and one dense pass. Errors are those of `logits`.
        """
        if batch.num_rows == 0:  # every row was bad
            nothing = np.empty(0, np.float32)
            return TracedBatch(nothing, nothing, np.empty((len(tables), 0), np.float32))
        needed = {name: {plan[name]} for name in self.tables.names}
        inputs = inputs_of(batch)
        if self.tables.are_remote:
            calls = self.adapter.asked(inputs)
            pooled = self.tables.pooled(calls, [needed[call.table] | {Precision.FP32} for call in calls])
            reference, gradients = self.adapter.differentiated(inputs, _with_outputs(calls, pooled))
            self._check(inputs, reference, needed, batch.index)
        else:
            reference, gradients = self.adapter.differentiated(inputs)
            self._check(inputs, reference, needed, batch.index)
            with torch.inference_mode():
                pooled = self.tables.pooled(reference.calls, [needed[call.table] for call in reference.calls])
        outputs = [pooled[k][plan[call.table]] for k, call in enumerate(reference.calls)]
        row = {name: k for k, name in enumerate(tables)}
        changes = np.zeros((len(tables), batch.num_rows), dtype=np.float32)
        with torch.inference_mode():
            for call, output, gradient in zip(reference.calls, outputs, gradients, strict=True):
                if call.table in row:
                    changes[row[call.table]] += ((output - call.output) * gradient).sum(dim=1).numpy()
        logits = self._passes.logits(inputs, reference, [outputs])[0]
        return TracedBatch(reference.logits.numpy(), logits, changes)

    def _check(
        self, inputs: ModelInputs, reference: ReferencePass, needed: Mapping[str, Collection[Precision]], index: int
    ) -> None:
        """Refuse what cannot be evaluated, and count the lookups of the rest."""
        if not torch.isfinite(reference.logits).all():
            self.tables.check_finite(reference.calls)
            raise ModelError(
                f"batch {index}: the fp32 model gives a logit that is not finite; a weight of its dense part "
                "is not, or its inputs are too large for it"
            )
        if not self._is_checked:
            self.adapter.check(inputs, reference)
            self._is_checked = True
        called = {call.table for call in reference.calls}
        for name in set(self.tables.names) - called:
            low = set(needed.get(name, ())) - {Precision.FP32}
            if low:
                raise ModelError(
                    f'"{name}" was to be {", ".join(sorted(low))}, but the model did not call it on batch {index}, so '
                    "what that does cannot be measured; call it through its module, or fix it to fp32 in space.units"
                )
        for call in reference.calls:
            self.lookups[call.table] += len(call.indices)
            self.bags[call.table] += len(call.offsets) - 1


def _with_outputs(calls: Sequence[BagCall], pooled: Sequence[Mapping[Precision, Tensor]]) -> tuple[BagCall, ...]:
    return tuple(replace(call, output=of_call[Precision.FP32]) for call, of_call in zip(calls, pooled, strict=True))
