"""Faults of exported folders, planted as a broken conversion would make them: files are whole, and hashes fit them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import safetensors.torch as torch_files
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from lowprec import ops
from lowprec.plan import Precision, RowRange

__all__ = ["corrupted_rows", "dead_channel", "stale_table", "swapped_scales", "wrong_zero_point"]


def swapped_scales(folder: Path, table: str, rng: np.random.Generator) -> None:
    """The scales and biases of rows are those of other rows."""

    def swapped(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        rows = rows.copy()
        rows[:, :4] = rows[rng.permutation(len(rows)), :4]
        return rows

    _change_rows(folder, table, swapped)


def corrupted_rows(folder: Path, table: str, rng: np.random.Generator, first: int, count: int) -> None:
    """The codes of a range of rows are random."""

    def corrupted(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        rows = rows.copy()
        codes = rows[first : first + count, 4:]
        codes[:] = rng.integers(0, 256, codes.shape)
        return rows

    _change_rows(folder, table, corrupted)


def stale_table(folder: Path, table: str, snapshot: NDArray[np.float32], row_range: RowRange) -> None:
    """The rows are those of another snapshot, float32[num_rows, dim]."""
    precision = Precision(_entry(folder, table)["precision"])
    _change_rows(folder, table, lambda _: ops.quantize(snapshot, precision, row_range=row_range))


def dead_channel(folder: Path, layer: str, channel: int) -> None:
    """The weights of an output channel are zero."""
    path = folder / "dense.safetensors"
    tensors = torch_files.load_file(path)
    (entry,) = [e for e in _manifest(folder)["layers"] if e["unit"] == layer]
    for module in entry["modules"]:
        name = f"{module}.codes" if f"{module}.codes" in tensors else f"{module}.weight"
        tensors[name] = tensors[name].clone()
        tensors[name][channel] = 0
    torch_files.save_file(tensors, path)
    _fit_hash(folder, path)


def wrong_zero_point(folder: Path, layer: str, by: int) -> None:
    """The zero point of a calibrated layer's inputs is off, in the plan that is served."""
    path = folder / "plan.json"
    document = json.loads(path.read_text())
    unit = document["units"][layer]
    unit["input_zero_point"] = (unit["input_zero_point"] + by) % 2 ** unit["input_bits"]
    path.write_text(json.dumps(document))
    _fit_hash(folder, path)


def _change_rows(folder: Path, table: str, change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> None:
    entry = _entry(folder, table)
    path = folder / entry["file"]
    stored = load_file(path)[entry["tensor"]]
    shape, dtype = stored.shape, stored.dtype
    rows = np.ascontiguousarray(stored).view(np.uint8).reshape(entry["num_rows"], entry["row_bytes"])
    save_file({entry["tensor"]: np.ascontiguousarray(change(rows)).view(dtype).reshape(shape)}, path)
    _fit_hash(folder, path)


def _entry(folder: Path, table: str) -> Mapping[str, object]:
    (found,) = [e for e in _manifest(folder)["tables"] if e["unit"] == table]
    return found


def _manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def _fit_hash(folder: Path, path: Path) -> None:
    manifest = _manifest(folder)
    content = path.read_bytes()
    name = str(path.relative_to(folder))
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
