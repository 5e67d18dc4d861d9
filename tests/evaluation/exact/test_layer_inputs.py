"""Histograms of what layers are given, and the error that a form of a layer causes."""

from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lowprec.core.errors import ModelError
from lowprec.evaluation.exact.exact_evaluator import ExactEvaluator
from lowprec.evaluation.exact.layer_inputs import BINS, FormTask, InputHistogram, LayerInputs, LayerInputsTask
from lowprec.evaluation.profile.profile import logit_changes
from lowprec.ops.linear import safe_input_bits
from lowprec.plan import Plan, Precision
from lowprec.plan.layer_form import ClipRange, LayerForm, WeightScale
from lowprec.search import open_job

VALUES = hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-1e6, 1e6, width=32))


def same(a, b):
    return (a.exponent, a.lower, a.upper) == (b.exponent, b.lower, b.upper) and a.counts.tolist() == b.counts.tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES | st.just(np.zeros(2, np.float32)), min_size=1, max_size=4), st.randoms())
def test_histograms_of_parts_are_that_of_the_whole_in_any_order(parts, random):
    whole = InputHistogram.of(np.concatenate(parts))
    found = [InputHistogram.of(part) for part in parts]
    random.shuffle(found)
    assert same(reduce(lambda a, b: a + b, found), whole)


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_values_lie_between_the_edges_that_count_them(values):
    found = InputHistogram.of(values)
    counts, edges = found.filled_counts, found.edges
    assert counts.sum() == len(values) and (edges[0], edges[-1]) == (values.min(), values.max())
    assert len(edges) == len(counts) + 1
    width = 2.0**found.exponent / BINS
    assert width <= 2 * max(np.abs(values).max(), 2.0**-60) / BINS * 1.001
    inner = edges[1:-1]
    assert [(values < edge).sum() for edge in inner] == np.cumsum(counts)[:-1].tolist()


@pytest.fixture
def job(small_config):
    return open_job(small_config("space.layers=[fp32, fp16, bf16, int8_dynamic, int8_static]"))


def test_inputs_are_those_of_the_model(job):
    evaluator, batch = ExactEvaluator(job.adapter), job.window("search").batch(0)
    names = tuple(unit.name for unit in job.adapter.layers.units)
    seen = {}
    hooks = [
        job.adapter.layers.modules(name)[0].register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].clone()})
        )
        for name in names
    ]
    evaluator.logits(batch, [])
    for hook in hooks:
        hook.remove()
    found = LayerInputsTask(names, (0,)).sums(evaluator, batch)
    assert found.of.keys() == seen.keys() == set(names)
    for name in names:
        assert same(found.of[name], InputHistogram.of(seen[name].numpy()))
    assert LayerInputs({}) + found == LayerInputs(dict(found.of))


def test_an_input_that_is_not_finite_names_its_layer(job):
    evaluator, batch = ExactEvaluator(job.adapter), job.window("search").batch(0)
    first = job.adapter.layers.units[0].name
    (module,) = job.adapter.layers.modules(first)
    hook = module.register_forward_pre_hook(lambda _, args: (torch.full_like(args[0], torch.inf),))
    try:
        with pytest.raises(ModelError, match="not finite"):
            LayerInputsTask((first,), (0,)).sums(evaluator, batch)
    finally:
        hook.remove()


def test_the_error_of_a_form_is_the_divergence_that_it_causes_alone(job):
    """Second order against the exact KL divergence of the plan with that layer alone."""
    evaluator, batch = ExactEvaluator(job.adapter), job.window("search").batch(0)
    units = [unit.name for unit in job.units]
    forms = tuple(
        (unit, Precision.INT8_DYNAMIC, LayerForm(weights, clip, input_bits=safe_input_bits()))
        for unit in units
        if unit.startswith("layer:")
        for weights in WeightScale
        for clip in (ClipRange.MINMAX, ClipRange.PERCENTILE)
    )
    found = FormTask(forms, (0,)).sums(evaluator, batch).squares / 2
    reference = Plan.uniform(job.units, Precision.FP32)
    for (unit, precision, form), predicted in zip(forms, found, strict=True):
        with evaluator.using({(unit, precision): form}):
            logits = evaluator.logits(batch, [reference.replace({unit: precision})])
        z, changed = logits.reference.astype(float), logits.plans[0].astype(float)
        p = 1 / (1 + np.exp(-z))
        exact = (np.logaddexp(0, changed) - np.logaddexp(0, z) - p * (changed - z)).sum()
        assert predicted == pytest.approx(exact, rel=0.1), (unit, form)


def test_first_order_changes_of_layers_join_those_of_tables(job):
    evaluator, batch = ExactEvaluator(job.adapter), job.window("search").batch(0)
    forms = {(u.name, Precision.INT8_DYNAMIC): LayerForm(input_bits=safe_input_bits()) for u in job.units if u.is_layer}
    columns = tuple((u.name, Precision.INT8_DYNAMIC if u.is_layer else Precision.INT4) for u in job.units)
    with evaluator.using(forms):
        logits, s = logit_changes(evaluator, batch, columns)
        for k, (unit, precision) in enumerate(columns):
            plan = Plan.uniform(job.units, Precision.FP32).replace({unit: precision})
            exact = evaluator.logits(batch, [plan]).plans[0] - logits
            traced = evaluator.traced(batch, plan, [unit])
            np.testing.assert_allclose(traced.changes[0], s[k], rtol=1e-3, atol=1e-5)
            assert np.corrcoef(exact, s[k])[0, 1] > 0.98, unit


def test_a_layer_that_the_model_never_calls_is_refused(job, monkeypatch):
    evaluator, batch = ExactEvaluator(job.adapter), job.window("search").batch(0)
    layers = job.adapter.layers
    name = layers.units[-1].name
    (module,) = layers.modules(name)
    monkeypatch.setitem(layers._modules, "layer:unused", [torch.nn.Linear(*reversed(module.weight.shape))])
    plan = Plan({**Plan.uniform(job.units, Precision.FP32), "layer:unused": Precision.BF16})
    with pytest.raises(ModelError, match='"layer:unused" was to be low-precision, but the model did not call it'):
        evaluator.logits(batch, [plan])
    with pytest.raises(ModelError, match='"layer:unused" was to be low-precision, but the model did not call it'):
        evaluator.differentiated(batch, {"layer:unused": {Precision.BF16}})
