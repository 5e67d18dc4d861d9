"""What an exported folder holds that is not what its plan makes of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lowprec.core.errors import ExportError
from lowprec.debug.causes.rows import SeenRows
from lowprec.debug.implementations import PlannedModel, ServedModel
from lowprec.export.manifest import sha256_of
from lowprec.models.adapter import ModelAdapter
from lowprec.plan import Precision

__all__ = ["changed_files", "dense_differences", "layer_modules_differences", "table_difference"]

# Rows of less in common with the checkpoint's are said to be of another version, and of still less of none.
_SAME_VERSION, _NO_VERSION = 0.99, 0.3


def table_difference(rows: SeenRows, planned: NDArray[np.uint8]) -> str | None:
    """How the rows that traffic asked for differ from what the plan makes of them; None where they do not.

    planned: uint8[n, row_bytes], in the order of `rows`.
    """
    wrong = (rows.stored != planned).any(axis=1)
    if not wrong.any():
        return None
    where = np.flatnonzero(wrong)
    first, last = int(rows.ids[where[0]]), int(rows.ids[where[-1]])
    between = (rows.ids >= first) & (rows.ids <= last)
    count = f"{len(where):,} of {len(rows.ids):,} rows that traffic asked for"
    if len(where) < len(rows.ids) and wrong[between].all() and len(where) > 1:
        count = f"rows {first} to {last}, all {len(where):,} that traffic asked for, and no other"
    elif len(where) <= 3:
        those = ", ".join(str(int(rows.ids[k])) for k in where)
        count = f"{_plural('row', where)} {those} of those that traffic asked for"
    verb = "is" if len(where) == 1 else "are"
    return f"{count} {verb} not what the plan makes of the checkpoint: {_what(rows, planned, where)}"


def layer_differences(planned: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Which tensors of a layer are not those that the plan makes."""
    said = []
    for name in sorted(planned.keys() | found.keys()):
        if name not in found or name not in planned:
            said.append(f"{name} is {'missing' if name not in found else 'new'}")
            continue
        a, b = planned[name], found[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            said.append(f"{name} is {list(b.shape)} {b.dtype} and not {list(a.shape)} {a.dtype}")
        elif not torch.equal(a, b):
            rows = (a != b).reshape(len(a), -1).any(dim=1).nonzero()[:, 0].tolist() if a.ndim else []
            some = f" of {_plural('channel', rows)} {', '.join(map(str, rows[:4]))}{', ...' if len(rows) > 4 else ''}"
            said.append(f"{name}{some if rows and len(rows) < len(a) else ''} is not what the plan makes of it")
    return said


def dense_differences(adapter: ModelAdapter, served: ServedModel) -> list[str]:
    """Tensors beside tables and layers that are not the checkpoint's."""
    units = {path for table in served.manifest.tables for path in table.modules}
    units |= {path for path, module in adapter.model.named_modules() if isinstance(module, nn.Linear)}
    found = []
    for name, tensor in adapter.model.state_dict().items():
        if name.rpartition(".")[0] in units or name not in served.dense:
            continue
        if not torch.equal(served.dense[name], tensor):
            found.append(f'"{name}" is not what the checkpoint has')
    return found


def layer_modules_differences(planned: PlannedModel, served: ServedModel, layer: str, num_modules: int) -> list[str]:
    """The differences of all modules of a layer."""
    return [
        text
        for position in range(num_modules)
        for text in layer_differences(planned.stored_layer(layer, position), served.stored_layer(layer, position))
    ]


def changed_files(served: ServedModel) -> dict[str, str]:
    """Files that are not what the manifest says, and what is wrong with them."""
    found = {}
    folder = Path(served.folder)
    for name, expected in served.manifest.files.items():
        try:
            if sha256_of(folder / name) != expected.sha256:
                found[name] = f"{name} is not what the manifest says: it was changed after the export, or in copying"
        except OSError as error:
            raise ExportError(f"export {folder}: {name} cannot be read: {error.strerror or error}") from None
    return found


def _plural(word: str, of: Sized) -> str:
    return word if len(of) == 1 else f"{word}s"


def _what(rows: SeenRows, planned: NDArray[np.uint8], where: NDArray[np.int64]) -> str:
    found, expected = rows.stored[where], planned[where]
    if rows.precision.is_rowwise:
        heads, codes = (found[:, :4] != expected[:, :4]).any(), (found[:, 4:] != expected[:, 4:]).any()
        if not codes:
            swapped = (found[:, :2] == expected[:, 2:4]).all() and (found[:, 2:4] == expected[:, :2]).all()
            return "scale and bias are swapped" if swapped else "scales and biases are others, codes are the same"
        if not heads:
            return "codes are others, scales and biases are the same"
    likeness = _cosine(rows.restored[where], rows.exact[where])
    if likeness < _NO_VERSION:
        return f"they are like nothing in the checkpoint (cosine {likeness:.3f} with its rows)"
    if rows.precision is not Precision.INT2 and likeness < _SAME_VERSION:
        return f"they look like rows of another version of the table (cosine {likeness:.3f} with the checkpoint's)"
    return f"other values (cosine {likeness:.3f} with the checkpoint's)"


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    x, y = (np.where(np.isfinite(v), v, 0).astype(np.float64) for v in (a, b))
    size = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / size) if size else 0.0
