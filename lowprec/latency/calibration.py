"""Measured lookup times of a machine: what `lowprec calibrate` writes, and what a table costs in latency."""

from __future__ import annotations

import errno
import json
import math
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from lowprec.core.errors import ConfigError, PlanError, ResultsError
from lowprec.core.progress import Progress
from lowprec.ops.timing import Grid, machine_facts, measure_lookups
from lowprec.plan import LAYER_PRECISIONS, TABLE_PRECISIONS, Precision, Unit
from lowprec.storage import Location
from lowprec.storage.whole_file import whole_file

__all__ = [
    "Calibration",
    "LatencyPoint",
    "LayerGrid",
    "LayerPoint",
    "calibrate",
    "calibration_document",
    "check_writable",
    "layer_latency_ns",
    "read_calibration",
    "unit_latency_ns",
    "write_calibration",
]

CALIBRATION_SCHEMA_VERSION = 1

P = TypeVar("P", "LatencyPoint", "LayerPoint")


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


def calibration_document(calibration: Calibration, grid: Grid) -> dict[str, Any]:
    """What `lowprec calibrate` prints: the times, and which tables of the grid were left out for their size."""
    left_out = {cell._replace(pooling=0): cell.table_bytes for cell in grid.left_out()}
    return {
        **_content(calibration),
        "memory_limit_bytes": grid.memory_limit_bytes,
        "left_out": [
            {"precision": cell.precision, "dim": cell.dim, "rows": cell.rows, "bytes": size}
            for cell, size in left_out.items()
        ],
    }


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write a calibration, whole or not at all; raises `ResultsError` where that is not possible."""
    document = {"schema_version": CALIBRATION_SCHEMA_VERSION, **_content(calibration)}
    try:
        with whole_file(path) as partial:
            partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise _not_writable(path, error) from None


def check_writable(path: Path) -> None:
    """Raise the `ResultsError` of `write_calibration` before the time of a measurement is spent."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _not_writable(path, error) from None


def read_calibration(path: str | Path) -> Calibration:
    """Read and check what `write_calibration` wrote, from a path or URL; raises `ConfigError` on anything else."""
    where = f"calibration {path}"
    again = "run `lowprec calibrate` again"
    try:
        document = json.loads(Location.of(path).read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{where}: cannot be read: {error.strerror or error}; `lowprec calibrate --out {path}` makes it"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{where}: is not JSON: {error}; {again}") from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != CALIBRATION_SCHEMA_VERSION:
        raise ConfigError(f"{where}: schema_version must be {CALIBRATION_SCHEMA_VERSION}; got {version!r}; {again}")
    machine, entries, of_layers = document.get("machine"), document.get("points"), document.get("layers", [])
    if not isinstance(machine, dict) or not isinstance(entries, list) or not isinstance(of_layers, list):
        raise ConfigError(f"{where}: needs machine (an object) and points (a list); {again}")
    points = tuple(
        _point(entry, f"{where}: points[{k}]", again, LatencyPoint, TABLE_PRECISIONS) for k, entry in enumerate(entries)
    )
    layers = tuple(
        _point(entry, f"{where}: layers[{k}]", again, LayerPoint, LAYER_PRECISIONS) for k, entry in enumerate(of_layers)
    )
    try:
        return Calibration(points, machine, layers)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}; {again}") from None


def _content(calibration: Calibration) -> dict[str, Any]:
    layers = {"layers": [asdict(point) for point in calibration.layers]} if calibration.layers else {}
    return {"machine": dict(calibration.machine), "points": [asdict(point) for point in calibration.points], **layers}


def _point(entry: Any, where: str, again: str, kind: type[P], among: Sequence[Precision]) -> P:
    names = kind.__dataclass_fields__
    if not isinstance(entry, dict) or entry.keys() != names.keys():
        raise ConfigError(f"{where}: needs {', '.join(names)} and nothing else; got {entry!r}; {again}")
    try:
        precision = Precision.parse(str(entry["precision"]), where=where, among=among)
    except PlanError as error:
        raise ConfigError(f"{error}; {again}") from None
    try:
        return kind(**{**entry, "precision": precision})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}; {again}") from None


def _not_writable(path: Path, error: OSError) -> ResultsError:
    return ResultsError(f"calibration {path}: cannot be written: {error.strerror or error}; choose another --out")


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
