"""Traces a sample of traffic: each unit alone, and all units together, against the reference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lowprec.debug.implementations import Implementation, Layer
from lowprec.debug.sums import MAX_ROWS, ErrorSums
from lowprec.evaluation.attribution import UnitSums, unit_sums
from lowprec.evaluation.exact.assignment import check_bags
from lowprec.evaluation.exact.exact_evaluator import ExactEvaluator
from lowprec.evaluation.exact.layer_inputs import InputHistogram
from lowprec.evaluation.metrics import Sums, sums_of_batch
from lowprec.models.adapter import ModelAdapter, ModelInputs, ReferencePass, inputs_of
from lowprec.models.called import called_units
from lowprec.models.layers import any_shape, in_fp32, replaced_forwards
from lowprec.ops.bags import BagCall
from lowprec.plan import Precision, is_layer
from lowprec.plan.layer_form import LayerForm
from lowprec.traffic.batch import Batch

__all__ = ["InputCodes", "Trace", "TracedPart", "logits_with", "trace_batches"]

Single = NDArray[np.float32]

# Enough to see in which order units are called.
_FEW_ROWS = 16
# Batches from one part that takes a backward pass to the next.
PART_EVERY = 4
# Values of a layer's inputs that are looked at, of a batch.
_MAX_INPUTS = 1 << 15


@dataclass
class InputCodes:
    """Of the inputs of a calibrated layer: how many there were, lie outside of the codes, and became zero.

    error2, saturated_error2: the squared error of the layer's outputs, and of those for an input outside the codes.
    """

    num_values: int = 0
    num_saturated: int = 0
    num_underflowed: int = 0
    error2: float = 0.0
    saturated_error2: float = 0.0
    histogram: InputHistogram | None = None

    @property
    def saturated_share(self) -> float:
        """Of the squared error, the part in rows with an input outside the codes."""
        return self.saturated_error2 / self.error2 if self.error2 > 0 else 0.0


@dataclass(frozen=True)
class TracedPart:
    """Some examples of the sample: the reference on them, what the calls of tables return, and both models' logits."""

    batch: Batch
    reference: ReferencePass
    outputs: tuple[Tensor, ...]
    logits: Tensor


@dataclass
class Trace:
    """What was seen of each unit, by name in the order of the model's calls.

    alone: errors of its output for the inputs of the reference. accumulated: of its output where every unit is the
    implementation's. Both are of the first rows of each batch, `num_compared` in all. shares: where the change of the
    logits comes from, on the examples of `parts`. ids: what each table was asked for, one array for each call.
    """

    units: tuple[str, ...]
    alone: dict[str, ErrorSums] = field(default_factory=dict)
    accumulated: dict[str, ErrorSums] = field(default_factory=dict)
    shares: UnitSums = field(default_factory=lambda: UnitSums.zero(0))
    exact: Sums | None = None
    ids: dict[str, list[NDArray[np.int64]]] = field(default_factory=lambda: defaultdict(list))
    inputs: dict[str, InputCodes] = field(default_factory=lambda: defaultdict(InputCodes))
    parts: list[TracedPart] = field(default_factory=list)
    num_compared: int = 0

    @property
    def num_traced(self) -> int:
        """Examples of `parts`."""
        return sum(part.batch.num_rows for part in self.parts)


def trace_batches(
    evaluator: ExactEvaluator,
    implementation: Implementation,
    batches: Sequence[Callable[[], Batch]],
    *,
    num_parts: int,
    on_progress: Callable[[], None] = lambda: None,
) -> Trace:
    """Look at the batches; changes of logits by unit, which take a backward pass, on one of `num_parts` of all rows.

    They are rows of every fourth batch, four times as many of it: a pass over few rows takes as long as over more.
    """
    layers = implementation.layers()
    num_looks = 0
    trace: Trace | None = None
    for read in batches:
        batch = read()
        if not batch.num_rows:
            continue
        if trace is None:
            few = batch.part(0, max(1, batch.num_rows // _FEW_ROWS))
            units = called_units(evaluator.adapter, inputs_of(few))
            trace = Trace(units, shares=UnitSums.zero(len(units)))
        num_here = max(1, num_parts // PART_EVERY)
        part = batch.part(num_here - 1, num_here) if num_looks % PART_EVERY == 0 else batch.rows(0, 0)
        num_looks += 1
        _Look(trace, evaluator, implementation, layers, batch, part).add()
        on_progress()
    return trace or Trace(())


def logits_with(
    adapter: ModelAdapter,
    inputs: ModelInputs,
    reference: ReferencePass,
    outputs: Sequence[Tensor],
    layers: Mapping[nn.Module, Layer],
) -> Tensor:
    """Logits float32[B] where the calls of tables return `outputs` and layers are computed as said."""
    with replaced_forwards({module: any_shape(low) for module, low in layers.items()}):
        return adapter.run_with_outputs(inputs, reference, outputs)


class _Look:
    """What one batch adds to a trace.

    The reference runs once, and each layer is computed the other way at once, on the inputs that it has anyway; then
    the model runs with all units the other way. What is summed is summed where it is made: nothing is kept but outputs.
    """

    def __init__(
        self,
        trace: Trace,
        evaluator: ExactEvaluator,
        implementation: Implementation,
        layers: Mapping[nn.Module, Layer],
        batch: Batch,
        part: Batch,
    ) -> None:
        self._trace, self._evaluator, self._implementation, self._layers = trace, evaluator, implementation, layers
        self._batch, self._part = batch, part
        self._modules: dict[nn.Module, str] = {
            module: unit.name
            for unit in evaluator.adapter.layers.units
            if unit.name in trace.units
            for module in evaluator.adapter.layers.modules(unit.name)
        }
        self._exact: list[tuple[str, Tensor]] = []
        self._position = 0

    def add(self) -> None:
        """Look, and add."""
        adapter, batch, inputs = self._evaluator.adapter, self._batch, inputs_of(self._batch)
        if self._part.num_rows:  # first, because the evaluator checks the model on the first rows that it sees
            self._add_part()
        with replaced_forwards({module: self._alone(module) for module in self._modules}):
            reference = self._evaluator.watched(batch, ())
        with torch.inference_mode():
            outputs = [self._table(call) for call in reference.calls]
        with replaced_forwards({module: self._accumulated(module) for module in self._modules}):
            logits = adapter.run_with_outputs(inputs, reference, outputs)
        z, found, labels = (v.astype(np.float64) for v in (reference.logits.numpy(), logits.numpy(), batch.labels))
        self._trace.num_compared += min(batch.num_rows, MAX_ROWS)
        exact = sums_of_batch(z, found[None], labels, batch.weights, batch.groups)
        self._trace.exact = exact if self._trace.exact is None else self._trace.exact + exact

    def _add_part(self) -> None:
        """What each unit does to the logits, to first order, and what single changes are tried on."""
        adapter, part = self._evaluator.adapter, self._part
        layers = dict.fromkeys((unit for unit in self._trace.units if is_layer(unit)), ())
        reference, gradients = self._evaluator.differentiated(part, layers)
        row = {unit: k for k, unit in enumerate(self._trace.units)}
        changes = np.zeros((len(row), part.num_rows), np.float32)
        with torch.inference_mode():
            low = {
                unit for unit, precision in self._implementation.file.plan.items() if precision is not Precision.FP32
            }
            check_bags(reference.calls, part.num_rows, low, may_be_several=True)
            outputs = tuple(self._implementation.pooled(call) for call in reference.calls)
            for call, output, slope in zip(reference.calls, outputs, gradients.tables, strict=True):
                if len(output) % part.num_rows == 0:
                    changes[row[call.table]] += _change(output - call.output, slope, part.num_rows)
            for layer_call, slope in zip(reference.layer_calls, gradients.layers, strict=True):
                module = adapter.layers.modules(layer_call.layer)[layer_call.position]
                flat = layer_call.input.reshape(-1, layer_call.input.shape[-1])
                if module in self._layers:
                    error = self._layers[module](flat) - layer_call.output.reshape(len(flat), -1)
                    self._count_codes(layer_call.layer, flat, error)
                    changes[row[layer_call.layer]] += _change(error, slope.reshape(error.shape), part.num_rows)
            logits = logits_with(adapter, inputs_of(part), reference, outputs, self._layers)
        # Values that are not finite are counted where they are made.
        changes = np.nan_to_num(changes, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        z, labels = reference.logits.numpy().astype(np.float64), part.labels.astype(np.float64)
        weights = np.ones(part.num_rows) if part.weights is None else part.weights
        self._trace.shares = self._trace.shares + unit_sums(changes, z, labels, weights)
        self._trace.parts.append(TracedPart(part, reference, outputs, logits))

    def _table(self, call: BagCall) -> Tensor:
        """What a call of a table returns. What it is asked for depends on no unit: alone and accumulated are one."""
        output = self._implementation.pooled(call)
        self._trace.ids[call.table].append(call.indices.numpy())
        sums = ErrorSums.of(call.output, output)
        _add(self._trace.alone, call.table, sums)
        _add(self._trace.accumulated, call.table, sums)
        return output

    def _alone(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        layer, forward = self._modules[module], module.forward
        # With one input scale for a batch a part of it is another batch; elsewhere a row's output is its own.
        is_by_batch = self._implementation.file.plan.get(layer) is Precision.INT8_DYNAMIC

        def computed(input: Tensor) -> Tensor:
            output: Tensor = forward(input)
            flat, exact = input.reshape(-1, input.shape[-1]), output.reshape(-1, output.shape[-1]).float()
            if module in self._layers and not is_by_batch:
                flat, exact = flat[:MAX_ROWS], exact[:MAX_ROWS]
            found = in_fp32(self._layers[module], flat) if module in self._layers else exact
            _add(self._trace.alone, layer, ErrorSums.of(exact, found))
            self._exact.append((layer, exact[:MAX_ROWS].clone()))  # the model may change it in place
            return output

        return computed

    def _accumulated(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        forward = any_shape(self._layers[module]) if module in self._layers else module.forward

        def computed(input: Tensor) -> Tensor:
            output: Tensor = forward(input)
            layer, exact = self._exact[self._position]
            self._position += 1
            _add(self._trace.accumulated, layer, ErrorSums.of(exact, output.reshape(-1, exact.shape[1]).float()))
            return output

        return computed

    def _count_codes(self, layer: str, x: Tensor, error: Tensor) -> None:
        form = self._implementation.file.layer_forms.get(layer)
        if not isinstance(form, LayerForm) or form.input_scale is None or form.input_zero_point is None:
            return
        x = x[: max(1, _MAX_INPUTS // x.shape[1])]
        if not len(x) or not torch.isfinite(x).all():
            return
        histogram = InputHistogram.of(x.numpy())
        seen = self._trace.inputs[layer]
        seen.histogram = histogram if seen.histogram is None else seen.histogram + histogram
        codes = torch.round(x / form.input_scale) + form.input_zero_point
        seen.num_values += x.numel()
        is_saturated = (codes < 0) | (codes > 2**form.input_bits - 1)
        seen.num_saturated += int(is_saturated.sum())
        error2 = error[: len(x)].square().sum(dim=1)
        seen.error2 += float(error2.sum())
        seen.saturated_error2 += float(error2[is_saturated.any(dim=1)].sum())
        seen.num_underflowed += int(((codes == form.input_zero_point) & (x != 0)).sum())


def _add(sums: dict[str, ErrorSums], unit: str, new: ErrorSums) -> None:
    sums[unit] = sums[unit] + new if unit in sums else new


def _change(error: Tensor, slope: Tensor, num_rows: int) -> Single:
    """What an error does to each logit, to first order."""
    change: Single = (error * slope).reshape(num_rows, -1).sum(dim=1).numpy()
    return change
