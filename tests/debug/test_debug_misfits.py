"""Forms that do not fit the inputs of their layer, and forms that do."""

import numpy as np
import pytest
import torch

from lowprec.debug.causes.misfits import misfits
from lowprec.evaluation.exact.layer_inputs import InputHistogram
from lowprec.ops.clip import input_bounds, input_code
from lowprec.plan.layer_form import ClipRange, LayerForm

# What comes out of a ReLU, of half of one, of none.
INPUTS = {
    "exponential": lambda rng: rng.exponential(1.0, 40_000),
    "half zero": lambda rng: np.maximum(rng.normal(0, 1, 40_000), 0),
    "heavy": lambda rng: np.maximum(rng.standard_t(4, 40_000), 0),
}


def found(inputs, clip, bits, shift=0):
    """What is said of a form that was calibrated on other inputs of the same kind, and its zero point then moved."""
    before, now = (InputHistogram.of(inputs(np.random.default_rng(seed)).astype(np.float32)) for seed in (0, 1))
    scale, zero_point = input_code(*input_bounds(before.edges, before.filled_counts, clip, bits), bits)
    form = LayerForm(range=clip, input_bits=bits, input_scale=scale, input_zero_point=(zero_point + shift) % 2**bits)
    return misfits(form, torch.ones(1, 1), {}, now)


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("clip", list(ClipRange))
@pytest.mark.parametrize("kind", INPUTS)
def test_a_zero_point_off_by_a_quarter_is_a_misfit_and_a_calibrated_one_is_none(kind, clip, bits):
    assert found(INPUTS[kind], clip, bits) == ()
    (said,) = found(INPUTS[kind], clip, bits, 2**bits // 4)
    assert said.startswith("its input codes reach from -") and "(a wrong scale or zero point" in said
