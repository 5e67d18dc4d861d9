"""How layers are stored and computed at int8: inputs calibrated on the search window, the best of all forms taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lowprec.config import LayersConfig
from lowprec.core.errors import ConfigError
from lowprec.evaluation.evaluate import pieces_of
from lowprec.evaluation.exact.layer_inputs import FormSums, FormTask, InputHistogram, LayerInputs, LayerInputsTask
from lowprec.evaluation.workers.worker import Workers
from lowprec.ops.clip import input_bounds, input_code
from lowprec.ops.linear import safe_input_bits
from lowprec.plan import Form, Forms, Precision, is_layer
from lowprec.plan.layer_form import LayerForm
from lowprec.search.space.space import SearchSpace
from lowprec.traffic import TrafficWindow

__all__ = ["fitted_forms", "forms_beside", "num_passes", "recalibrated"]

_INT8 = (Precision.INT8_DYNAMIC, Precision.INT8_STATIC)


def fitted_forms(
    workers: Workers,
    window: TrafficWindow,
    space: SearchSpace,
    config: LayersConfig,
    *,
    batches_per_task: int,
    on_progress: Callable[[int], None] | None = None,
) -> dict[tuple[str, Precision], Form]:
    """The form of every layer at every precision of the space that leaves a choice.

    Ranges of calibrated inputs come from histograms over the whole window. Of the int8 forms that the config allows,
    all of the same bytes, the one is taken that changes the predictions of `calibration_examples` least when it alone
    is applied, by the second-order KL divergence, which needs no labels; of equal ones the first.
    """
    wanted = [(unit, p) for d in space.decisions for unit in d.units if is_layer(unit) for p in d.choices]
    found: dict[tuple[str, Precision], Form] = {}
    if config.arithmetic is not None:
        found = {(unit, p): config.arithmetic.to_arithmetic() for unit, p in wanted if p is Precision.EMULATED}
    int8 = [(unit, p) for unit, p in wanted if p in _INT8]
    if not int8:
        return found
    static = tuple(dict.fromkeys(unit for unit, p in int8 if p is Precision.INT8_STATIC))
    inputs = _inputs(workers, window, static, batches_per_task, on_progress) if static else LayerInputs({})
    for layer in static:
        if layer not in inputs.of:
            raise ConfigError(
                f'"{layer}" was to be int8_static, but the model did not call it on the search window, so its inputs '
                "cannot be calibrated; call it through its module, or fix it to fp32 in space.units"
            )
    tried = tuple((unit, p, form) for unit, p in int8 for form in _candidates(config, p, inputs.of.get(unit)))
    squares = _sums(workers, window, tried, config.calibration_examples, on_progress).squares
    least: dict[tuple[str, Precision], float] = {}
    for (unit, precision, form), square in zip(tried, squares.tolist(), strict=True):
        if (unit, precision) not in least or square < least[unit, precision]:
            least[unit, precision], found[unit, precision] = square, form
    return found


def recalibrated(workers: Workers, window: TrafficWindow, forms: Forms, *, batches_per_task: int) -> Forms:
    """The forms of a plan on another snapshot: calibrated inputs have the ranges that they have in this window now."""
    static = {key: form for key, form in forms.items() if isinstance(form, LayerForm) and form.is_static}
    if not static:
        return forms
    layers = tuple(dict.fromkeys(unit for unit, _ in static))
    inputs = _inputs(workers, window, layers, batches_per_task, None)
    found = dict(forms)
    for (unit, precision), form in static.items():
        if unit in inputs.of:
            found[unit, precision] = _calibrated(form, inputs.of[unit])
    return found


def forms_beside(plan_forms: Forms) -> dict[tuple[str, Precision], Form]:
    """Those of a plan, and for calibrated int8 layers the one that takes the range of each batch instead."""
    found = dict(plan_forms)
    for (unit, precision), form in plan_forms.items():
        if precision is Precision.INT8_STATIC and isinstance(form, LayerForm):
            found[unit, Precision.INT8_DYNAMIC] = replace(form, input_scale=None, input_zero_point=None)
    return found


def num_passes(window: TrafficWindow, space: SearchSpace, config: LayersConfig) -> int:
    """Batches that `fitted_forms` reads."""
    chosen = {p for d in space.decisions for unit in d.units if is_layer(unit) for p in d.choices}
    all_of_it = window.num_batches if Precision.INT8_STATIC in chosen else 0
    return all_of_it + (len(_sample(window, config.calibration_examples)) if chosen & set(_INT8) else 0)


def _candidates(config: LayersConfig, precision: Precision, inputs: InputHistogram | None) -> list[LayerForm]:
    bits = config.input_bits or safe_input_bits()
    found = []
    for outliers in config.outliers:
        for weights in config.weights:
            for clip in config.ranges:
                form = LayerForm(weights, clip, outliers, bits)
                if precision is Precision.INT8_STATIC and inputs is not None:
                    form = _calibrated(form, inputs)
                found.append(form)
    return found


def _calibrated(form: LayerForm, inputs: InputHistogram) -> LayerForm:
    bounds = input_bounds(inputs.edges, inputs.filled_counts, form.range, form.input_bits)
    scale, zero_point = input_code(*bounds, form.input_bits)
    return replace(form, input_scale=scale, input_zero_point=zero_point)


def _inputs(
    workers: Workers,
    window: TrafficWindow,
    layers: tuple[str, ...],
    batches_per_task: int,
    on_progress: Callable[[int], None] | None,
) -> LayerInputs:
    total = LayerInputs({})
    tasks = [LayerInputsTask(layers, piece) for piece in pieces_of(window, None, batches_per_task)]
    for task, chunk in zip(tasks, workers.run(window, tasks), strict=True):
        total = total + chunk.sums
        if on_progress:
            on_progress(len(task.batches))
    return total


def _sums(
    workers: Workers,
    window: TrafficWindow,
    forms: tuple[tuple[str, Precision, LayerForm], ...],
    num_examples: int,
    on_progress: Callable[[int], None] | None,
) -> FormSums:
    total: FormSums | None = None
    tasks = [FormTask(forms, (k,)) for k in _sample(window, num_examples)]
    for chunk in workers.run(window, tasks):
        total = chunk.sums if total is None else total + chunk.sums
        if on_progress:
            on_progress(1)
    assert total is not None, "a window has at least one batch"
    return total


def _sample(window: TrafficWindow, num_examples: int) -> Sequence[int]:
    """Batches with so many examples, evenly over the window."""
    count = min(-(-num_examples // window.batch_size), window.num_batches)
    return [k * window.num_batches // count for k in range(count)]
