"""The file of a calibration: what `lowprec calibrate` writes and `cost.calibration` names."""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from lowprec.core.errors import ConfigError, PlanError, ResultsError
from lowprec.latency.calibration import Calibration, LatencyPoint, LayerPoint
from lowprec.ops.timing import Grid
from lowprec.plan import LAYER_PRECISIONS, TABLE_PRECISIONS, Precision
from lowprec.storage import Location
from lowprec.storage.whole_file import whole_file

__all__ = ["calibration_document", "check_writable", "read_calibration", "write_calibration"]

CALIBRATION_SCHEMA_VERSION = 1

P = TypeVar("P", LatencyPoint, LayerPoint)


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
