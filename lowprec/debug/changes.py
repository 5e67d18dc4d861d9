"""The single change that helps most: units restored one at a time, all others as they are, evaluated exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lowprec.core.errors import WeightError
from lowprec.debug.implementations import Implementation, Layer, PlannedModel
from lowprec.debug.report import Change, Suspect
from lowprec.debug.trace import TracedPart, logits_with
from lowprec.evaluation.metrics import sums_of_batch
from lowprec.models.adapter import ModelAdapter, inputs_of
from lowprec.plan import TABLE_PRECISIONS, Form, Precision, is_layer
from lowprec.plan.layer_form import ClipRange, LayerForm, WeightScale
from lowprec.session import Session

__all__ = ["best_change"]

# A cheaper change that takes so much of what fp32 would take from the gap is as good.
_ENOUGH = 0.9
_NUM_SUSPECTS = 3


@dataclass(frozen=True)
class _Choice:
    """A precision for a unit, or None for what the plan makes of it."""

    unit: str
    precision: Precision | None
    form: Form | None = None

    def __str__(self) -> str:
        return (
            "as planned" if self.precision is None else " ".join(filter(None, (self.precision, str(self.form or ""))))
        )


def best_change(
    session: Session,
    implementation: Implementation,
    planned: PlannedModel,
    suspects: Sequence[Suspect],
    differing: Sequence[str],
    broken: Sequence[str],
    parts: Sequence[TracedPart],
) -> Change | None:
    """The change of one of the first suspects that takes most from the label-free gap on some examples.

    A suspect that differs from the plan is put back; of the others, fp32 shows who matters most, and then the cheapest
    change of that unit is taken that does nearly as much. Where suspects are `broken` (they return values that are not
    finite) it is one of them, at fp32, whatever the gap says: an int8 layer behind makes some code of such a value, and
    the logits look well.
    """
    first = [suspect.unit for suspect in suspects[:_NUM_SUSPECTS]]
    first = [unit for unit in first if unit in broken] or first
    if not first:
        return None
    trial = _Trial(session.adapter, implementation, planned, parts)
    before = trial.kl_pct(None)
    restored = {unit: _Choice(unit, None if unit in differing else Precision.FP32) for unit in first}
    after = {unit: trial.kl_pct(choice) for unit, choice in restored.items()}
    unit = min(after, key=lambda u: after[u] if math.isfinite(after[u]) else math.inf)
    choice, found, kept = restored[unit], after[unit], 1.0
    if not math.isfinite(found):
        return None
    if unit not in broken:
        taken = before - found if math.isfinite(before) else math.inf
        if taken <= 0:
            return None
        for cheaper in _cheaper(planned, unit) if choice.precision is Precision.FP32 else ():
            try:
                kl = trial.kl_pct(cheaper)
            except WeightError:
                continue
            share = (before - kl) / taken if math.isfinite(before) else float(math.isfinite(kl))
            if share >= _ENOUGH:
                choice, found, kept = cheaper, kl, share
                break
    added = _bytes(session, planned, choice) - _bytes(session, planned, _Choice(unit, None))
    return Change(unit, str(choice), before, found, added, trial.num_examples, kept)


class _Trial:
    """The label-free gap of the implementation on some batches with one unit changed."""

    def __init__(
        self, adapter: ModelAdapter, implementation: Implementation, planned: PlannedModel, parts: Sequence[TracedPart]
    ) -> None:
        self._adapter, self._planned, self._parts = adapter, planned, parts
        self._layers = dict(implementation.layers())
        self.num_examples = sum(part.batch.num_rows for part in parts)

    def kl_pct(self, choice: _Choice | None) -> float:
        """The label-free gap in percent; NaN where a logit is not finite."""
        total = None
        for part in self._parts:
            logits = part.logits if choice is None else self._logits(choice, part)
            z, found, labels = (
                v.astype(np.float64) for v in (part.reference.logits.numpy(), logits.numpy(), part.batch.labels)
            )
            sums = sums_of_batch(z, found[None], labels, part.batch.weights, part.batch.groups)
            total = sums if total is None else total + sums
        assert total is not None, "there is a part"
        return total.metrics(0, confidence=0.95).kl_pct

    def _logits(self, choice: _Choice, part: TracedPart) -> Tensor:
        if is_layer(choice.unit):
            outputs, layers = part.outputs, self._layers | self._modules(choice)
        else:
            changed = self._planned.with_precision(choice.unit, choice.precision)
            outputs = tuple(
                changed.pooled(call) if call.table == choice.unit else output
                for call, output in zip(part.reference.calls, part.outputs, strict=True)
            )
            layers = self._layers
        with torch.inference_mode():
            return logits_with(self._adapter, inputs_of(part.batch), part.reference, outputs, layers)

    def _modules(self, choice: _Choice) -> dict[nn.Module, Layer]:
        layers = self._adapter.layers
        precision, form = choice.precision, choice.form
        if precision is None:
            precision = self._planned.file.plan.get(choice.unit, Precision.FP32)
            form = self._planned.file.layer_forms.get(choice.unit)
        return {
            module: layers.low(choice.unit, position, precision, form)
            for position, module in enumerate(layers.modules(choice.unit))
        }


def _cheaper(planned: PlannedModel, unit: str) -> list[_Choice]:
    """More exact than the unit is now and cheaper than fp32, the cheapest first."""
    now = planned.file.plan[unit]
    if not is_layer(unit):
        better = TABLE_PRECISIONS[1 : TABLE_PRECISIONS.index(now)]
        return [_Choice(unit, precision) for precision in reversed(better)]
    form = planned.file.layer_forms.get(unit)
    found = []
    if isinstance(form, LayerForm):
        plain = LayerForm(WeightScale.CHANNEL, ClipRange.MINMAX, input_bits=form.input_bits)
        if form != plain:
            found.append(_Choice(unit, Precision.INT8_DYNAMIC, plain))
        return [*found, _Choice(unit, Precision.BF16), _Choice(unit, Precision.FP16)]
    return [_Choice(unit, Precision.FP16)] if now is Precision.BF16 else found


def _bytes(session: Session, planned: PlannedModel, choice: _Choice) -> int:
    unit = next(u for u in (*session.adapter.units, *session.adapter.layers.units) if u.name == choice.unit)
    precision = choice.precision or planned.file.plan.get(unit.name, Precision.FP32)
    return session.storage.unit_bytes(unit, precision)
