"""Measured lookup times of a machine, and what a table or a layer costs in latency by them."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lowprec.core.errors import ConfigError
from lowprec.plan import TABLE_PRECISIONS, Precision, Unit

__all__ = [
    "Calibration",
    "LatencyPoint",
    "LayerPoint",
    "layer_latency_ns",
    "unit_latency_ns",
]


@dataclass(frozen=True)
class LatencyPoint:
    """A measured cell: the time of a bag of `pooling` ids in a table of `rows` rows of `dim` values.

    ns_per_bag: the median of the repetitions, in nanoseconds. spread: their interquartile range divided by the median.
    Raises `ConfigError` on a value that no measurement gives.
    """

    precision: Precision
    dim: int
    rows: int
    pooling: float
    ns_per_bag: float
    spread: float

    def __post_init__(self) -> None:
        for name in ("dim", "rows"):
            value = getattr(self, name)
            if type(value) is not int or value <= 0:
                raise ConfigError(f"{name} must be a whole number above 0; got {value!r}")
        for name in ("pooling", "ns_per_bag", "spread"):
            value = getattr(self, name)
            is_number = type(value) in (int, float) and math.isfinite(value)
            if not is_number or value < 0 or (value == 0 and name != "spread"):
                raise ConfigError(f"{name} must be a number {'from' if name == 'spread' else 'above'} 0; got {value!r}")


@dataclass(frozen=True)
class LayerPoint:
    """The time of a layer for one row of a batch of `batch_size`, as `LatencyPoint` has that of a bag."""

    precision: Precision
    num_out: int
    num_in: int
    batch_size: int
    ns_per_row: float
    spread: float

    def __post_init__(self) -> None:
        for name in ("num_out", "num_in", "batch_size"):
            if type(getattr(self, name)) is not int or getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be a whole number above 0; got {getattr(self, name)!r}")
        for name in ("ns_per_row", "spread"):
            value = getattr(self, name)
            is_number = type(value) in (int, float) and math.isfinite(value)
            if not is_number or value < 0 or (value == 0 and name != "spread"):
                raise ConfigError(f"{name} must be a number {'from' if name == 'spread' else 'above'} 0; got {value!r}")


@dataclass(frozen=True)
class Calibration:
    """Lookup times on a grid, times of layers by shape, and the machine that they hold for.

    Every precision has every dim, and every dim every pooling. The most rows may differ by precision and dim (a memory
    limit leaves out the largest tables), but none below the most is missing. Raises `ConfigError` otherwise.
    """

    points: tuple[LatencyPoint, ...]
    machine: Mapping[str, str | int]
    layers: tuple[LayerPoint, ...] = ()

    def __post_init__(self) -> None:
        if not self.points:
            raise ConfigError("there are no points")
        if len(self._times) < len(self.points) or len(self._layer_times) < len(self.layers):
            raise ConfigError("a point stands there twice")
        rows = sorted({p.rows for p in self.points})
        holes = [
            f"{precision} at dim {dim}, {num_rows:,} rows, pooling {pooling:g}"
            for precision in self.precisions
            for dim in self._dims
            for num_rows in rows[: bisect_right(rows, self._rows.get((precision, dim), rows)[-1])]
            for pooling in self._poolings
            if (precision, dim, num_rows, pooling) not in self._times
        ]
        if holes:
            more = f" and {len(holes) - 1} more" if len(holes) > 1 else ""
            raise ConfigError(f"the grid has holes: {holes[0]}{more}")

    @cached_property
    def precisions(self) -> tuple[Precision, ...]:
        """The measured precisions, the most exact first."""
        return tuple(p for p in TABLE_PRECISIONS if any(point.precision is p for point in self.points))

    def ns_per_bag(self, precision: Precision, dim: int, rows: int, pooling: float) -> float:
        """Nanoseconds of a bag of `pooling` ids (on average): exact at measured points, else interpolated.

        Between points linear in pooling and in dim, and linear in the logarithm of rows. Fewer or more rows than were
        measured count as the fewest or most (of this precision, at each of the dims between which it interpolates).
        Outside the measured poolings or dims the line through the two nearest is followed, but never below the time
        of the nearest; with a single one measured, its time is taken. `outside` says where any of this happened.
        Raises `ConfigError` for a precision that was not measured, or a negative size.
        """
        self._require(precision)
        if not (dim > 0 and rows > 0 and pooling >= 0 and math.isfinite(pooling)):
            raise ConfigError(
                f"a lookup needs dim and rows above 0 and ids per bag from 0; got dim {dim}, {rows} rows, {pooling} ids"
            )

        def at_dim(d: float) -> float:
            known = self._rows[precision, d]
            return _on_line(min(max(rows, known[0]), known[-1]), known, lambda r: at_rows(d, r), math.log)

        def at_rows(d: float, r: float) -> float:
            return _on_line(pooling, self._poolings, lambda k: self._times[precision, d, r, k])

        return _on_line(dim, self._dims, at_dim)

    def ns_per_row(self, precision: Precision, num_out: int, num_in: int) -> float:
        """Nanoseconds of a layer for one row; raises `ConfigError` for a shape or a precision that was not measured."""
        found = self._layer_times.get((precision, num_out, num_in))
        if found is None:
            raise ConfigError(
                f"the calibration has no time of a layer of {num_out} outputs and {num_in} inputs at {precision}; "
                "run `lowprec calibrate --config CONFIG` to measure the layers of your model"
            )
        return found

    def outside(self, precision: Precision, dim: int, rows: int, pooling: float) -> str | None:
        """What of this lookup lies outside the measured grid, and what is made of it; None when nothing does."""
        self._require(precision)
        around = _neighbours(dim, self._dims)
        fewest = max(self._rows[precision, d][0] for d in around)
        most = min(self._rows[precision, d][-1] for d in around)
        said = []
        if not self._dims[0] <= dim <= self._dims[-1]:
            said.append(f"dim {dim} is outside the measured {_range(self._dims)}")
        if not fewest <= rows <= most:
            said.append(
                f"{rows:,} rows of {precision} are outside the measured {fewest:,} to {most:,} (the nearest is taken)"
            )
        if not self._poolings[0] <= pooling <= self._poolings[-1]:
            said.append(f"{pooling:g} ids per bag are outside the measured {_range(self._poolings)}")
        return "; ".join(said) or None

    def _require(self, precision: Precision) -> None:
        if precision not in self.precisions:
            raise ConfigError(
                f"the calibration has no times of {precision}, only of {', '.join(self.precisions)}; "
                "run `lowprec calibrate` again"
            )

    @cached_property
    def _times(self) -> dict[tuple[Precision, float, float, float], float]:
        return {(p.precision, p.dim, p.rows, p.pooling): p.ns_per_bag for p in self.points}

    @cached_property
    def _layer_times(self) -> dict[tuple[Precision, int, int], float]:
        return {(p.precision, p.num_out, p.num_in): p.ns_per_row for p in self.layers}

    @cached_property
    def _dims(self) -> tuple[int, ...]:
        return tuple(sorted({p.dim for p in self.points}))

    @cached_property
    def _poolings(self) -> tuple[float, ...]:
        return tuple(sorted({p.pooling for p in self.points}))

    @cached_property
    def _rows(self) -> dict[tuple[Precision, float], tuple[int, ...]]:
        rows: dict[tuple[Precision, float], set[int]] = {}
        for p in self.points:
            rows.setdefault((p.precision, p.dim), set()).add(p.rows)
        return {key: tuple(sorted(known)) for key, known in rows.items()}


def unit_latency_ns(
    calibration: Calibration, unit: Unit, precision: Precision, *, bags_per_example: float, ids_per_bag: float
) -> float:
    """Nanoseconds of lookups in a table for one example.

    bags_per_example: how many bags an example pools from the table (one for each feature that shares it, say);
    ids_per_bag: ids in one of them, on average. Raises `ConfigError` for a layer, which looks nothing up.
    """
    if not unit.name.startswith("table:"):
        raise ConfigError(f'unit "{unit.name}": only tables have a measured lookup time; leave it out of the latency')
    if not (bags_per_example >= 0 and math.isfinite(bags_per_example)):
        raise ConfigError(f'unit "{unit.name}": bags per example must be a number from 0; got {bags_per_example}')
    return bags_per_example * calibration.ns_per_bag(precision, unit.dim, unit.num_rows, ids_per_bag)


def layer_latency_ns(calibration: Calibration, unit: Unit, precision: Precision, *, rows_per_example: float) -> float:
    """Nanoseconds of a layer for one example, which gives it so many rows; raises what `ns_per_row` does."""
    return rows_per_example * calibration.ns_per_row(precision, unit.num_rows, unit.dim)


def _on_line(
    x: float, known: Sequence[float], value: Callable[[float], float], scale: Callable[[float], float] = float
) -> float:
    """`value` at `x`, linear in `scale(x)` between its neighbours in `known`; outside, see `ns_per_bag`."""
    neighbours = _neighbours(x, known)
    if len(neighbours) == 1:
        return value(neighbours[0])
    low, high = neighbours
    at_low, at_high = value(low), value(high)
    part = (scale(x) - scale(low)) / (scale(high) - scale(low))
    there = at_low * (1 - part) + at_high * part
    if x < low:
        return max(there, at_low)
    if x > high:
        return max(there, at_high)
    return min(max(there, min(at_low, at_high)), max(at_low, at_high))  # rounding must not lead out of the interval


def _neighbours(x: float, known: Sequence[float]) -> tuple[float, ...]:
    """The members of `known` (rising) that a value at `x` is made of: x itself, else two, or the only one."""
    upper = bisect_left(known, x)
    if len(known) == 1:
        return (known[0],)
    if upper < len(known) and known[upper] == x:
        return (known[upper],)
    upper = min(max(upper, 1), len(known) - 1)
    return (known[upper - 1], known[upper])


def _range(known: Sequence[float]) -> str:
    if len(known) == 1:
        return f"{known[0]:g} (it is taken)"
    return f"{known[0]:g} to {known[-1]:g} (extrapolated)"
