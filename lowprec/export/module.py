"""Loads an exported folder as a module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lowprec.core.errors import ExportError, LowprecError
from lowprec.export.manifest import DENSE, ExportedTable, Manifest, read_config_and_plan, read_manifest
from lowprec.models.adapter import ModelAdapter
from lowprec.models.factory import build_model, without_table_init
from lowprec.models.layers import any_shape
from lowprec.ops.linear import served_linear
from lowprec.ops.served_bag import ServedBag
from lowprec.plan import PlanFile, Precision

__all__ = ["ServedLinear", "dense_tensors", "in_huge_pages", "load", "paths_of", "replace_modules", "stored_rows"]


_COPIED_BYTES = 64 << 20


class ServedLinear(nn.Module):
    """A layer below fp32 in the place of an `nn.Linear`: inputs of any number of dimensions."""

    def __init__(self, low: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.low, self.precision = low, str(precision)

    def forward(self, input: Tensor) -> Tensor:
        """The layer of the last dimension."""
        return any_shape(self.low)(input)

    def extra_repr(self) -> str:
        """What `print(module)` says."""
        return f"precision={self.precision}"


def load(folder: str | Path, *, verify: bool = True, in_memory: bool = False) -> nn.Module:
    """The module of a folder that `lowprec export` wrote, called as the model is. It returns what the model returns:
    probabilities where the config has `model.outputs: probabilities`.

    Tables below fp32 are FBGEMM's `IntNBitTableBatchedEmbeddingBagsCodegen`, layers below fp32 PyTorch's quantized
    operators; everything else is the model that the factory makes, which has to be importable. Rows are mapped from
    the folder and not copied, so the folder has to stay as it is while the module lives.

    verify: compare every file with its SHA-256 first, which reads all of them once. in_memory: read the rows into
    memory of this process instead, in huge pages where the system has some: lookups in large tables then look for fewer
    pages (`make bench NAME=serving`).

    Raises `ExportError` where the folder is no whole export or a file of it is another one, `ModelError` where the
    factory cannot be imported or makes another model, `KernelError` without FBGEMM.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if verify:
        manifest.check_files(folder)
    config, file = read_config_and_plan(folder, manifest)
    if verify:
        manifest.check_plan(folder, file)
    with without_table_init(without_rows=True):
        model = build_model(config.model.factory, config.model.args, config.traffic.schema_of_columns())
    adapter = ModelAdapter(model, config.model.outputs)
    _check_units(adapter, manifest, folder)
    dense = dense_tensors(folder)
    _load_dense(adapter, manifest, dense, folder)
    replace_modules(model, {**_bags(adapter, manifest, folder, in_memory), **_layers(adapter, manifest, file, dense)})
    return model.eval().requires_grad_(False)


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the places of some, wherever they are registered."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in replacements:
                setattr(parent, name, replacements[child])


def paths_of(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every path that each module is registered at."""
    found: dict[nn.Module, tuple[str, ...]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[module] = (*found.get(module, ()), path)
    return found


def _check_units(adapter: ModelAdapter, manifest: Manifest, folder: Path) -> None:
    found = {unit.name: (unit.num_rows, unit.dim) for unit in adapter.units}
    expected = {table.unit: (table.num_rows, table.dim) for table in manifest.tables}
    layers = {unit.name for unit in adapter.layers.units}
    wrong = [name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)]
    wrong += [layer.unit for layer in manifest.layers if layer.unit not in layers]
    if wrong:
        names = ", ".join(f'"{name}"' for name in sorted(wrong)[:3])
        raise ExportError(
            f"export {folder}: the factory makes another model than the one that was exported: {names} "
            "is missing, new or of another size; use the code that it was exported with"
        )


def dense_tensors(folder: Path) -> dict[str, Tensor]:
    """Everything but the tables, as it is stored; raises `ExportError` where it cannot be read."""
    path = folder / DENSE
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"export {path.parent}: {path.name} cannot be read: {error}; copy the folder again") from None


def _load_dense(adapter: ModelAdapter, manifest: Manifest, dense: Mapping[str, Tensor], folder: Path) -> None:
    """Everything but the tables and the layers below fp32."""
    gone = {path for table in manifest.tables for path in table.modules}
    gone |= {path for layer in manifest.layers for path in layer.modules}
    expected = [n for n in adapter.model.state_dict() if n.rpartition(".")[0] not in gone]
    stored = {name: tensor for name, tensor in dense.items() if name.rpartition(".")[0] not in gone}
    if set(expected) != set(stored):
        names = ", ".join(f'"{name}"' for name in sorted(set(expected) ^ set(stored))[:3])
        raise ExportError(
            f"export {folder}: the factory makes another model than the one that was exported: {names} is missing or "
            "new; use the code that it was exported with"
        )
    try:
        # Copied: memory of its own is aligned, and products of matrices and vectors depend on that in their last bits.
        adapter.model.load_state_dict(stored, strict=False)
    except RuntimeError as error:
        raise ExportError(f"export {folder}: {DENSE} does not fit the model: {' '.join(str(error).split())}") from None


def _bags(adapter: ModelAdapter, manifest: Manifest, folder: Path, in_memory: bool) -> dict[nn.Module, nn.Module]:
    found: dict[nn.Module, nn.Module] = {}
    for table in manifest.tables:
        precision = Precision.parse(table.precision, where=f'export {folder}: "{table.unit}"')
        rows = stored_rows(folder, table)
        if in_memory:
            rows = in_huge_pages(rows)
        for bag in adapter.bags[table.unit]:
            if precision is Precision.FP32:
                # What was certified at fp32 is the model's own lookup.
                bag.weight = nn.Parameter(rows, requires_grad=False)
                continue
            found[bag] = ServedBag(
                rows.view(torch.uint8).view(table.num_rows, table.row_bytes),
                precision,
                table.dim,
                mode="mean" if bag.mode == "mean" else "sum",
                include_last_offset=bag.include_last_offset,
                padding_idx=bag.padding_idx,
                name=f'"{table.unit}"',
            )
    return found


def stored_rows(folder: Path, table: ExportedTable) -> Tensor:
    """The rows of a table, mapped: uint8[num_rows, row_bytes], or float of plain ones; raises `ExportError`."""
    path = folder / table.file
    try:
        with safe_open(path, framework="pt") as file:
            rows: Tensor = file.get_tensor(table.tensor)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"export {folder}: {table.file} cannot be read: {error}; copy the folder again") from None
    if len(rows) != table.num_rows or rows[:1].nbytes != table.row_bytes * min(table.num_rows, 1):
        raise ExportError(
            f"export {folder}: {table.file} has rows {list(rows.shape)} {rows.dtype}, the manifest says "
            f"{table.num_rows} of {table.row_bytes} bytes; copy the folder again"
        )
    return rows


def in_huge_pages(rows: Tensor) -> Tensor:
    """A copy in memory that NumPy asks huge pages for, as PyTorch does not."""
    copy = np.empty(rows.shape, rows.numpy().dtype)
    step = max(1, _COPIED_BYTES // max(1, rows[:1].nbytes))
    for first in range(0, len(rows), step):
        copy[first : first + step] = rows[first : first + step].numpy()
    return torch.from_numpy(copy)


def _layers(
    adapter: ModelAdapter, manifest: Manifest, file: PlanFile, dense: Mapping[str, Tensor]
) -> dict[nn.Module, nn.Module]:
    found: dict[nn.Module, nn.Module] = {}
    for layer in manifest.layers:
        precision, form = file.plan[layer.unit], file.layer_forms.get(layer.unit)
        for path in layer.modules:
            stored = {name[len(path) + 1 :]: t for name, t in dense.items() if name.rpartition(".")[0] == path}
            try:
                # Copied, for the same reason.
                low = served_linear({name: tensor.clone() for name, tensor in stored.items()}, precision, form)
            except (KeyError, RuntimeError) as error:
                if isinstance(error, LowprecError):
                    raise
                raise ExportError(f'export: "{layer.unit}": its tensors in {DENSE} do not fit: {error}') from None
            found[adapter.model.get_submodule(path)] = ServedLinear(low, precision)
    return found
