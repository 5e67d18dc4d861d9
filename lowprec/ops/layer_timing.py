"""Measures FC layers on this machine, by shape and precision."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from lowprec.core.progress import Progress, Silent
from lowprec.ops.linear import LowLinear, low_linear, safe_input_bits
from lowprec.ops.timing import spoil_cache, torch_threads
from lowprec.plan import Precision
from lowprec.plan.layer_form import LayerForm

__all__ = ["LayerCell", "LayerTime", "measure_layers"]

# For each repetition.
_NUM_CALLS = 3
# Emulated layers are slow here whatever they are on the machine that they stand for.
_TIMED = (Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8_DYNAMIC, Precision.INT8_STATIC)


class LayerCell(NamedTuple):
    """A layer of `num_out` outputs and `num_in` inputs."""

    precision: Precision
    num_out: int
    num_in: int


class LayerTime(NamedTuple):
    """The median of all calls for one row of a batch, and their interquartile range divided by it."""

    cell: LayerCell
    ns_per_row: float
    spread: float


def measure_layers(
    shapes: Sequence[tuple[int, int]],
    *,
    batch_size: int,
    outliers: float,
    num_repeats: int,
    seed: int = 0,
    num_threads: int = 1,
    progress: Progress | None = None,
) -> list[LayerTime]:
    """The time of layers of these shapes (outputs, inputs) at every precision, in batches of `batch_size` rows.

    outliers: the share of weights that int8 layers keep in fp32. Inputs and weights are normal; times do not depend on
    them. A model calls each of its layers once, after something else. So every call here comes after one of another
    layer, with the caches as `measure_lookups` leaves them: in a row, calls of a small layer find their code in place
    and take half as long (`make bench NAME=serving`). Calls go through all cells again and again, each time in another
    order, so that a machine that is slow for a while is slow for all of them alike.

    Raises `KernelError` where PyTorch has no such operator.
    """
    progress = progress or Silent()
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    cells = [LayerCell(p, *shape) for shape in dict.fromkeys(shapes) for p in _TIMED]
    inputs = {n: torch.randn(batch_size, n, generator=generator) for n in {cell.num_in for cell in cells}}
    layers = [_made(cell, outliers, generator) for cell in cells]
    seconds: list[list[float]] = [[] for _ in cells]
    with torch_threads(num_threads), torch.inference_mode():
        progress.stage("layers", num_repeats * len(cells))
        for _ in range(num_repeats):
            for index in (k for _ in range(_NUM_CALLS) for k in rng.permutation(len(cells))):
                seconds[index].append(_seconds_of_call(layers[index], inputs[cells[index].num_in]))
            progress.advance(len(cells))
    return [_summary(cell, seconds[k], batch_size) for k, cell in enumerate(cells)]


def _made(cell: LayerCell, outliers: float, generator: torch.Generator) -> LowLinear:
    weight = torch.randn(cell.num_out, cell.num_in, generator=generator)
    bias = torch.randn(cell.num_out, generator=generator)
    form = LayerForm(outliers=outliers, input_bits=safe_input_bits())
    if cell.precision is Precision.INT8_STATIC:
        top = 2**form.input_bits - 1
        form = LayerForm(outliers=outliers, input_bits=form.input_bits, input_scale=8 / top, input_zero_point=top // 2)
    return low_linear(weight, bias, cell.precision, form)


def _seconds_of_call(layer: LowLinear, x: torch.Tensor) -> float:
    spoil_cache()
    x.add_(0)  # as the layer before has made it just now
    began = time.perf_counter()
    layer(x)
    return time.perf_counter() - began


def _summary(cell: LayerCell, seconds: Sequence[float], batch_size: int) -> LayerTime:
    median = statistics.median(seconds)
    lower, upper = np.quantile(seconds, (0.25, 0.75))
    return LayerTime(cell, 1e9 * median / batch_size, float(upper - lower) / median)
