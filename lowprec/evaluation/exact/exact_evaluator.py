"""Exact evaluation: plans and the reference score the same rows; pooled outputs are those of serving, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowprec.core.byte_lru import ByteLru
from lowprec.core.errors import ModelError
from lowprec.evaluation.exact.assignment import ASSIGNED_ROWS, check_assignment, check_bags
from lowprec.evaluation.exact.dense import DensePasses
from lowprec.evaluation.metrics import Sums, sums_of_batch
from lowprec.models.adapter import Gradients, ModelAdapter, ModelInputs, ReferencePass, inputs_of
from lowprec.models.checks import check_passes
from lowprec.models.layers import LayerAt
from lowprec.models.outputs import OutputCount
from lowprec.ops.bags import BagCall
from lowprec.plan import Forms, Plan, Precision, is_layer
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

    changes: float32[K, B], the change of every logit to first order in the outputs of each of K units.
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
        # How many outputs of the reference look like probabilities.
        self.outputs = OutputCount()
        # For tasks that come back to the same batches.
        self.kept = ByteLru(kept_bytes)
        # How layers are stored and computed at precisions that leave a choice.
        self.forms: Forms = {}
        self._passes = DensePasses(adapter)
        self._is_checked = False
        self._called_layers: frozenset[str] | None = None
        # Tables of which the first order was compared with a measured change.
        self._assigned: set[str] = set()

    @contextmanager
    def using(self, forms: Forms) -> Iterator[None]:
        """Layers have these forms while the context lasts."""
        before, self.forms = self.forms, forms
        try:
            yield
        finally:
            self.forms = before

    def layers_at(self, plan: Plan) -> LayerAt:
        """The layers of a plan that are not fp32, with their forms."""
        low = ((unit, p) for unit, p in plan.items() if is_layer(unit) and p is not Precision.FP32)
        return tuple((unit, p, self.forms.get((unit, p))) for unit, p in low)

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
            calls = self.adapter.trace_lookups(inputs)
            pooled = self.tables.pooled(calls, [needed[call.table] | {Precision.FP32} for call in calls])
            reference = self.adapter.run_with_lookups(inputs, _with_outputs(calls, pooled))
            self._check(inputs, reference, needed, batch.index)
        else:
            reference = self.adapter.reference(inputs)
            self._check(inputs, reference, needed, batch.index)
            with torch.inference_mode():
                pooled = self.tables.pooled(reference.calls, [needed[call.table] for call in reference.calls])
        outputs = [[pooled[k][plan[call.table]] for k, call in enumerate(reference.calls)] for plan in plans]
        layers = [self.layers_at(plan) for plan in plans]
        self._check_layers(inputs, reference, {unit for at in layers for unit, _, _ in at}, batch.index)
        return BatchLogits(reference.logits.numpy(), self._passes.logits(inputs, reference, outputs, layers))

    def differentiated(
        self, batch: Batch, needed: Mapping[str, Collection[Precision]]
    ) -> tuple[ReferencePass, Gradients]:
        """The reference pass with its calls of layers, and the gradient of every call, checked as `logits` checks them.

        `needed` says which precisions of which units the caller is going to ask for.
        """
        inputs = inputs_of(batch)
        layers = [unit for unit in needed if is_layer(unit)]
        reference, gradients = self.adapter.differentiated(inputs, self._fp32_calls(inputs), layers)
        self._check(inputs, reference, needed, batch.index)
        check_bags(reference.calls, batch.num_rows, _below_fp32(needed))
        _refuse_uncalled(set(layers) - {call.layer for call in reference.layer_calls}, batch.index)
        return self._as_served(inputs, reference), gradients

    def watched(self, batch: Batch, layers: Sequence[str]) -> ReferencePass:
        """The reference pass with its calls of layers, checked as `logits` checks it."""
        inputs = inputs_of(batch)
        with self.adapter.layers.watched(layers) as calls:
            fp32_calls = self._fp32_calls(inputs)
            if fp32_calls is None:
                reference = self.adapter.reference(inputs)
            else:
                calls.clear()  # of a pass in which tables gave zeros
                reference = self.adapter.run_with_lookups(inputs, fp32_calls)
            found = tuple(calls)
        self._check(inputs, reference, {}, batch.index)
        return replace(reference, layer_calls=found)

    def layer_changes(
        self, reference: ReferencePass, gradients: Gradients, wanted: Mapping[str, Sequence[Precision]]
    ) -> Iterator[tuple[str, Precision, NDArray[np.float32]]]:
        """What layers at precisions do to every logit, float32[B], to first order in the outputs of each call."""
        num_rows = len(reference.logits)
        for call, gradient in zip(reference.layer_calls, gradients.layers, strict=True):
            flat = call.input.reshape(-1, call.input.shape[-1])
            if len(flat) % num_rows:
                raise ModelError(
                    f'"{call.layer}" is called with an input of {list(call.input.shape)} for {num_rows} examples, so '
                    "which example a row of it belongs to is not known; fix it to fp32 in space.units"
                )
            exact, slope = (t.reshape(len(flat), -1) for t in (call.output, gradient))
            for precision in wanted.get(call.layer, ()):
                low = self.adapter.layers.low(
                    call.layer, call.position, precision, self.forms.get((call.layer, precision))
                )
                change = ((low(flat) - exact) * slope).reshape(num_rows, -1).sum(dim=1)
                yield call.layer, precision, change.numpy()

    def traced(self, batch: Batch, plan: Plan, units: Sequence[str]) -> TracedBatch:
        """The reference and one plan on the batch, and what each of `units` does by itself, to first order.

        One forward and one backward pass, one low-precision lookup and one dense pass. Errors are those of `logits`.
        """
        if batch.num_rows == 0:  # every row was bad
            nothing = np.empty(0, np.float32)
            return TracedBatch(nothing, nothing, np.empty((len(units), 0), np.float32))
        layers = [unit for unit in units if is_layer(unit)]
        needed = {name: {plan[name]} for name in self.tables.names}
        inputs = inputs_of(batch)
        if self.tables.are_remote:
            calls = self.adapter.trace_lookups(inputs)
            pooled = self.tables.pooled(calls, [needed[call.table] | {Precision.FP32} for call in calls])
            reference, gradients = self.adapter.differentiated(inputs, _with_outputs(calls, pooled), layers)
            self._check(inputs, reference, needed, batch.index)
        else:
            reference, gradients = self.adapter.differentiated(inputs, None, layers)
            self._check(inputs, reference, needed, batch.index)
            with torch.inference_mode():
                pooled = self.tables.pooled(reference.calls, [needed[call.table] for call in reference.calls])
        check_bags(reference.calls, batch.num_rows, _below_fp32(needed) & set(units))
        self.check_assignment(batch, _below_fp32(needed) & set(units))
        outputs = [pooled[k][plan[call.table]] for k, call in enumerate(reference.calls)]
        row = {name: k for k, name in enumerate(units)}
        changes = np.zeros((len(units), batch.num_rows), dtype=np.float32)
        with torch.inference_mode():
            for call, output, gradient in zip(reference.calls, outputs, gradients.tables, strict=True):
                if call.table in row:
                    changes[row[call.table]] += ((output - call.output) * gradient).sum(dim=1).numpy()
            for layer, _, change in self.layer_changes(reference, gradients, {u: [plan[u]] for u in layers}):
                changes[row[layer]] += change
        at = self.layers_at(plan)
        self._check_layers(inputs, reference, {unit for unit, _, _ in at}, batch.index)
        reference = self._as_served(inputs, reference)
        logits = self._passes.logits(inputs, reference, [outputs], [at])[0]
        return TracedBatch(reference.logits.numpy(), logits, changes)

    def check_assignment(self, batch: Batch, tables: Collection[str]) -> None:
        """Refuse tables of which the first order does not say whose logit they change, once for each of them.

        Found on the first examples of the batch; raises `ModelError`.
        """
        new = set(tables) - self._assigned
        part = batch.rows(0, min(batch.num_rows, ASSIGNED_ROWS))
        if not new or not part.num_rows:
            return
        inputs = inputs_of(part)
        reference, gradients = self.adapter.differentiated(inputs, self._fp32_calls(inputs))
        check_bags(reference.calls, part.num_rows, new)
        check_assignment(self.adapter, inputs, reference, gradients, new)
        self._assigned |= new

    def _fp32_calls(self, inputs: ModelInputs) -> tuple[BagCall, ...] | None:
        """The calls of a model whose rows are elsewhere, with what they return; None for one that has its rows."""
        if not self.tables.are_remote:
            return None
        asked = self.adapter.trace_lookups(inputs)
        return _with_outputs(asked, self.tables.pooled(asked, [{Precision.FP32}] * len(asked)))

    def _as_served(self, inputs: ModelInputs, reference: ReferencePass) -> ReferencePass:
        """The pass with the logits that plans are compared with, where kernels for gradients give others."""
        return self.adapter.as_served(inputs, reference) if self.adapter.has_two_modes else reference

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
            check_passes(self.adapter, inputs, reference)
            self._is_checked = True
        called = {call.table for call in reference.calls}
        for name in set(self.tables.names) - called:
            low = set(needed.get(name, ())) - {Precision.FP32}
            if low:
                raise ModelError(
                    f'"{name}" was to be {", ".join(sorted(low))}, but the model did not call it on batch {index}, so '
                    "what that does cannot be measured; call it through its module, or fix it to fp32 in space.units"
                )
        self.outputs += OutputCount.of(reference.logits, self.adapter.outputs)
        for call in reference.calls:
            self.lookups[call.table] += len(call.indices)
            self.bags[call.table] += len(call.offsets) - 1

    def _check_layers(self, inputs: ModelInputs, reference: ReferencePass, layers: set[str], index: int) -> None:
        """Refuse low-precision layers that the model does not call through their modules, as the first batch shows."""
        if not layers:
            return
        if self._called_layers is None:
            every = [unit.name for unit in self.adapter.layers.units]
            outputs = [call.output for call in reference.calls]
            with self.adapter.layers.watched(every) as calls:
                self.adapter.run_with_outputs(inputs, reference, outputs)
            self._called_layers = frozenset(call.layer for call in calls)
        _refuse_uncalled(layers - self._called_layers, index)


def _below_fp32(needed: Mapping[str, Collection[Precision]]) -> set[str]:
    return {unit for unit, precisions in needed.items() if set(precisions) - {Precision.FP32}}


def _refuse_uncalled(layers: set[str], index: int) -> None:
    for layer in sorted(layers):
        raise ModelError(
            f'"{layer}" was to be low-precision, but the model did not call it on batch {index}, so what that does '
            "cannot be measured; call it through its module, or fix it to fp32 in space.units"
        )


def _with_outputs(calls: Sequence[BagCall], pooled: Sequence[Mapping[Precision, Tensor]]) -> tuple[BagCall, ...]:
    return tuple(replace(call, output=of_call[Precision.FP32]) for call, of_call in zip(calls, pooled, strict=True))
