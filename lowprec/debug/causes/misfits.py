"""Forms of layers that do not fit their weights or inputs, though another form of the same bytes would."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from lowprec.evaluation.exact.layer_inputs import InputHistogram
from lowprec.ops.clip import input_bounds, input_code, input_error
from lowprec.ops.linear import restored_weight
from lowprec.plan.layer_form import ClipRange, LayerForm

__all__ = ["misfits"]

# Times the squared error of what fits. Ranges that were calibrated on another window, or chosen for what predictions
# lose and not for squared error, stay below in healthy plans (`make bench NAME=debugger`).
_MISFIT = 4.0
# Codes that reach so far beyond the inputs at one end, as a share of their range, and end as much too early at the
# other: no way to calibrate makes such a range, whatever the error is.
_SHIFTED = 0.1


def misfits(
    form: object, weight: Tensor, stored: Mapping[str, Tensor], inputs: InputHistogram | None
) -> tuple[str, ...]:
    """A sentence for each.

    weight: float32[out, in] of the checkpoint; stored: what is served of it; inputs: what a calibrated layer was given.
    """
    if not isinstance(form, LayerForm):
        return ()
    said = []
    if inputs is not None and form.input_scale is not None and form.input_zero_point is not None:
        said += _inputs(form, form.input_scale, form.input_zero_point, inputs)
    if "codes" in stored and len(stored["scales"]) == 1 < len(weight):
        said += _weights(weight, restored_weight(stored))
    return tuple(said)


def _inputs(form: LayerForm, scale: float, zero_point: int, inputs: InputHistogram) -> list[str]:
    edges, counts, bits = inputs.edges, inputs.filled_counts, form.input_bits
    # A range by squared error has less of it than one that holds everything.
    clip = ClipRange.PERCENTILE if form.range is ClipRange.PERCENTILE else ClipRange.MINMAX
    fitting = input_error(edges, counts, *input_code(*input_bounds(edges, counts, clip, bits), bits), bits)
    found = input_error(edges, counts, scale, zero_point, bits)
    lower, upper = -zero_point * scale, (2**bits - 1 - zero_point) * scale
    # Codes hold zero whatever the inputs are.
    unused = min(inputs.lower, 0.0) - lower, upper - max(inputs.upper, 0.0)
    is_shifted = max(unused) > _SHIFTED * (upper - lower) and min(unused) < -_SHIFTED * (upper - lower)
    if not (found > _MISFIT * fitting or is_shifted):
        return []
    better = f"{found / fitting:.0f}" if found >= 10 * fitting else f"{found / fitting:.1f}"
    return [
        f"its input codes reach from {lower:.3g} to {upper:.3g} and its inputs from {inputs.lower:.3g} to "
        f"{inputs.upper:.3g}: calibrated on these, they would have {better} times less squared error "
        "(a wrong scale or zero point, or inputs that moved)"
    ]


def _weights(weight: Tensor, restored: Tensor) -> list[str]:
    values = weight.numpy()
    step = np.abs(values).max(axis=1, keepdims=True) / 127
    by_channel = float((np.square(step) / 12).sum() * values.shape[1])
    found = float((restored - weight).square().sum())
    if not found > _MISFIT * by_channel:
        return []
    return [
        f"one scale for all channels: with one for each, weights would have {found / by_channel:.0f} times less error"
    ]
