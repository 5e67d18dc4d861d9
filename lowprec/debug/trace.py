"""One look at a sample of traffic: every unit by itself and all units together beside the reference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lowprec.debug.arms import Arm, Layer
from lowprec.debug.sums import ErrorSums
from lowprec.evaluation.attribution import UnitSums, unit_sums
from lowprec.evaluation.exact import ExactEvaluator
from lowprec.evaluation.metrics import Sums, sums_of_batch
from lowprec.layer_form import LayerForm
from lowprec.models.adapter import Gradients, ModelAdapter, ModelInputs, ReferencePass, inputs_of
from lowprec.models.layers import LayerCall, any_shape, replaced_forwards
from lowprec.plan import Precision, is_layer
from lowprec.traffic.batch import Batch

__all__ = ["InputCodes", "Trace", "called_units", "logits_with", "trace_batches"]

Single = NDArray[np.float32]


@dataclass
class InputCodes:
    """Of the inputs of a calibrated layer: how many there were, lie outside of the codes, and became zero."""

    num_values: int = 0
    num_saturated: int = 0
    num_underflowed: int = 0


@dataclass
class Trace:
    """What was seen of each unit, by name in the order of the model's calls.

    alone: errors of its output for the inputs of the reference. accumulated: of its output where every unit is the
    arm's. shares: where the change of the logits comes from, on `num_traced` of the examples. ids: what each table was
    asked for, one array for each call.
    """

    units: tuple[str, ...]
    alone: dict[str, ErrorSums] = field(default_factory=dict)
    accumulated: dict[str, ErrorSums] = field(default_factory=dict)
    shares: UnitSums = field(default_factory=lambda: UnitSums.zero(0))
    exact: Sums | None = None
    ids: dict[str, list[NDArray[np.int64]]] = field(default_factory=lambda: defaultdict(list))
    inputs: dict[str, InputCodes] = field(default_factory=lambda: defaultdict(InputCodes))
    num_traced: int = 0


def called_units(adapter: ModelAdapter, inputs: ModelInputs) -> tuple[str, ...]:
    """Every unit that the model calls, in the order of first calls."""
    called: dict[str, None] = {}
    names: dict[nn.Module, str] = {bag: unit for unit, bags in adapter.bags.items() for bag in bags}
    names |= {m: unit.name for unit in adapter.layers.units for m in adapter.layers.modules(unit.name)}
    hooks = [module.register_forward_pre_hook(lambda m, _: called.setdefault(names[m])) for module in names]
    try:
        adapter.reference(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(called)


def trace_batches(
    evaluator: ExactEvaluator,
    arm: Arm,
    batches: Sequence[Callable[[], Batch]],
    *,
    traced_every: int,
    on_progress: Callable[[], None] = lambda: None,
) -> Trace:
    """Look at the batches; the changes of logits by unit, which take a backward pass, on every n-th of them."""
    adapter = evaluator.adapter
    layers = arm.layers()
    trace: Trace | None = None
    for k, read in enumerate(batches):
        batch = read()
        if not batch.num_rows:
            continue
        if trace is None:
            units = called_units(adapter, inputs_of(batch))
            trace = Trace(units, shares=UnitSums.zero(len(units)))
        _add(trace, evaluator, arm, layers, batch, with_gradients=k % traced_every == 0)
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
        return adapter.substituted(inputs, reference, outputs)


def _add(
    trace: Trace,
    evaluator: ExactEvaluator,
    arm: Arm,
    layers: Mapping[nn.Module, Layer],
    batch: Batch,
    *,
    with_gradients: bool,
) -> None:
    adapter, inputs = evaluator.adapter, inputs_of(batch)
    watched = [unit for unit in trace.units if is_layer(unit)]
    gradients: Gradients | None = None
    if with_gradients:
        reference, gradients = evaluator.differentiated(batch, dict.fromkeys(watched, ()))
    else:
        reference = evaluator.watched(batch, watched)
    with torch.inference_mode():
        outputs = [arm.pooled(call) for call in reference.calls]
        changes = np.zeros((len(trace.units), batch.num_rows), np.float32)
        row = {unit: k for k, unit in enumerate(trace.units)}
        for k, (table, output) in enumerate(zip(reference.calls, outputs, strict=True)):
            trace.ids[table.table].append(table.indices.numpy())
            # What a table is asked for does not depend on other units: alone and accumulated are one.
            _count(trace.alone, table.table, table.output, output)
            _count(trace.accumulated, table.table, table.output, output)
            if gradients:
                changes[row[table.table]] += _change(output - table.output, gradients.tables[k], batch.num_rows)
        for k, call in enumerate(reference.layer_calls):
            module = adapter.layers.modules(call.layer)[call.position]
            flat, exact = (
                call.input.reshape(-1, call.input.shape[-1]),
                call.output.detach().reshape(-1, module.out_features),
            )
            found = layers[module](flat) if module in layers else exact
            _count(trace.alone, call.layer, exact, found)
            _count_codes(trace, arm, call.layer, flat)
            if gradients:
                slope = gradients.layers[k].reshape(exact.shape)
                changes[row[call.layer]] += _change(found - exact, slope, batch.num_rows)
        low_forwards = {module: any_shape(low) for module, low in layers.items()}
        with replaced_forwards(low_forwards), adapter.layers.watched(watched) as calls:
            logits = adapter.substituted(inputs, reference, outputs)
        _count_layers(trace.accumulated, reference.layer_calls, calls)
    z, found_z, labels = (v.astype(np.float64) for v in (reference.logits.numpy(), logits.numpy(), batch.labels))
    exact_sums = sums_of_batch(z, found_z[None], labels, batch.weights, batch.groups)
    trace.exact = exact_sums if trace.exact is None else trace.exact + exact_sums
    if gradients:
        weights = np.ones(batch.num_rows) if batch.weights is None else batch.weights.astype(np.float64)
        trace.shares = trace.shares + unit_sums(changes, z, labels, weights)
        trace.num_traced += batch.num_rows


def _count(sums: dict[str, ErrorSums], unit: str, reference: Tensor, found: Tensor) -> None:
    new = ErrorSums.of(reference, found)
    sums[unit] = sums[unit] + new if unit in sums else new


def _count_layers(sums: dict[str, ErrorSums], reference: Sequence[LayerCall], found: Sequence[LayerCall]) -> None:
    for before, now in zip(reference, found, strict=True):
        width = before.output.shape[-1]
        _count(sums, before.layer, before.output.detach().reshape(-1, width), now.output.reshape(-1, width))


def _change(error: Tensor, slope: Tensor, num_rows: int) -> Single:
    """What an error does to each logit, to first order; values that are not finite are counted elsewhere."""
    change: Single = (error * slope).reshape(num_rows, -1).sum(dim=1).numpy()
    return np.nan_to_num(change, nan=0.0, posinf=0.0, neginf=0.0)


def _count_codes(trace: Trace, arm: Arm, layer: str, x: Tensor) -> None:
    form = arm.file.layer_forms.get(layer)
    if arm.file.plan.get(layer) is not Precision.INT8_STATIC or not isinstance(form, LayerForm) or not form.is_static:
        return
    assert form.input_scale is not None and form.input_zero_point is not None
    codes = torch.round(x / form.input_scale) + form.input_zero_point
    seen = trace.inputs[layer]
    seen.num_values += x.numel()
    seen.num_saturated += int(((codes < 0) | (codes > 2**form.input_bits - 1)).sum())
    seen.num_underflowed += int(((codes == form.input_zero_point) & (x != 0)).sum())
