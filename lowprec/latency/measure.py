"""Measuring a calibration on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowprec.core.progress import Progress
from lowprec.latency.calibration import Calibration, LatencyPoint, LayerPoint
from lowprec.ops.timing import Grid, machine_facts, measure_lookups

__all__ = ["LayerGrid", "calibrate"]


@dataclass(frozen=True)
class LayerGrid:
    """Which layers to measure: shapes (outputs, inputs), in batches of so many rows, with that share of outliers."""

    shapes: Sequence[tuple[int, int]]
    batch_size: int
    outliers: float


def calibrate(
    grid: Grid,
    layers: LayerGrid | None = None,
    *,
    seed: int = 0,
    num_threads: int = 1,
    progress: Progress | None = None,
) -> Calibration:
    """Measure a grid on this machine; see `measure_lookups` and `measure_layers` of `lowprec.ops` for how."""
    times = measure_lookups(grid, seed=seed, num_threads=num_threads, progress=progress)
    points = tuple(LatencyPoint(*time.cell, ns_per_bag=time.ns_per_bag, spread=time.spread) for time in times)
    found: tuple[LayerPoint, ...] = ()
    if layers is not None:
        from lowprec.ops.layer_timing import measure_layers

        of_layers = measure_layers(
            layers.shapes,
            batch_size=layers.batch_size,
            outliers=layers.outliers,
            num_repeats=grid.num_repeats,
            seed=seed,
            num_threads=num_threads,
            progress=progress,
        )
        found = tuple(LayerPoint(*t.cell, layers.batch_size, t.ns_per_row, t.spread) for t in of_layers)
    return Calibration(points, machine_facts(grid, seed=seed, num_threads=num_threads), found)
