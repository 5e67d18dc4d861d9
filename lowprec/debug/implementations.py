"""Implementations that are compared with the reference: a plan, or an exported folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from lowprec import ops
from lowprec.core.errors import ExportError, PlanError, WeightError
from lowprec.evaluation.workers.worker import evaluator_of
from lowprec.export import load, read_manifest
from lowprec.export.manifest import MANIFEST, Manifest, read_config_and_plan
from lowprec.export.module import ServedLinear, dense_tensors, stored_rows
from lowprec.ops.bags import BagCall
from lowprec.ops.linear import stored_linear
from lowprec.plan import PlanFile, Precision
from lowprec.session import Session
from lowprec.session.planned import read_planned
from lowprec.storage import AnyPath, Location

__all__ = ["Implementation", "PlannedModel", "ServedModel", "open_implementation"]

Ids = NDArray[np.int64]
# Inputs float32[n, in] to outputs float32[n, out].
Layer = Callable[[Tensor], Tensor]


class Implementation(Protocol):
    """Another way to compute the units of a model."""

    label: str
    file: PlanFile

    def pooled(self, call: BagCall) -> Tensor:
        """What the call of a table returns, float32[B, dim]; it may hold values that are not finite."""

    def layers(self) -> Mapping[nn.Module, Layer]:
        """How the layers are computed that are not what they are in the reference."""

    def stored(self, table: str, ids: Ids) -> NDArray[np.uint8]:
        """Stored rows of a table, uint8[n, row_bytes]."""

    def stored_layer(self, layer: str, position: int) -> Mapping[str, Tensor]:
        """What is stored of a module of a layer, as `stored_linear` has it."""


def open_implementation(
    session: Session, where: AnyPath, *, any_checkpoint: bool = False
) -> tuple[Session, Implementation]:
    """The plan of a `plan.json`, or the exported folder, that `where` is; and the session with its ranges and forms.

    any_checkpoint: a plan may have been made for another one. Raises `PlanError` or `ExportError` where it does not fit
    the session's model and checkpoint.
    """
    folder = Location.of(where).local
    if folder is not None and folder.is_dir():
        if not (folder / MANIFEST).exists():
            raise ExportError(
                f"{folder}: is a folder without {MANIFEST}; give a plan.json, or what lowprec export wrote"
            )
        manifest = read_manifest(folder)
        _, file = read_config_and_plan(folder, manifest)
        if manifest.checkpoint_sha256 != session.checkpoint_sha256:
            raise PlanError(
                f"export {folder}: was made of checkpoint {manifest.checkpoint_sha256[:12]}, the model's is "
                f"{session.checkpoint_sha256[:12]}; point model.checkpoint at the file that it was made of"
            )
        planned = session.as_planned(file)
        return planned, ServedModel(planned, folder, manifest, file)
    file = read_planned(session, where, any_checkpoint=any_checkpoint)
    planned = session.as_planned(file)
    return planned, PlannedModel(planned, file, str(where))


class PlannedModel:
    """A plan, by the kernels of the evaluation."""

    def __init__(self, session: Session, file: PlanFile, label: str) -> None:
        """Of a session with the ranges of rows and the forms of the plan."""
        self.label, self.file = label, file
        self._session, self._adapter = session, session.adapter
        self._tables = evaluator_of(session.spec, session.adapter).tables
        self._weights = session.adapter.weights
        self._stored_layers: dict[tuple[str, int, Precision], Mapping[str, Tensor]] = {}

    def with_precision(self, unit: str, precision: Precision | None) -> PlannedModel:
        """The same with one unit at another precision; None for the same."""
        if precision is None:
            return self
        other = copy(self)
        other.file = replace(self.file, plan=self.file.plan.replace({unit: precision}))
        return other

    def pooled(self, call: BagCall) -> Tensor:
        """As the evaluation looks it up; a row beyond its precision is what serving would make of it."""
        precision = self.file.plan[call.table]
        try:
            with torch.inference_mode():
                return self._tables.pooled([call], [{precision}])[0][precision]
        except WeightError:
            ids, where = np.unique(call.indices.numpy(), return_inverse=True)
            rows = ops.dequantize(self.stored(call.table, ids), precision, self._weights[call.table].shape[1])
            return _pooled(call, torch.from_numpy(where.astype(np.int64)), torch.from_numpy(rows))

    def layers(self) -> Mapping[nn.Module, Layer]:
        """Those below fp32."""
        found: dict[nn.Module, Layer] = {}
        for layer, modules in self._low_layers():
            precision, form = self.file.plan[layer], self.file.layer_forms.get(layer)
            for position, module in enumerate(modules):
                found[module] = self._adapter.layers.low(layer, position, precision, form)
        return found

    def stored(self, table: str, ids: Ids) -> NDArray[np.uint8]:
        """As `ops.quantize` makes them."""
        return ops.quantize(
            self._weights[table].numpy(),
            self.file.plan[table],
            row_range=self.file.row_range(table),
            ids=ids,
            num_threads=torch.get_num_threads(),
        )

    def stored_layer(self, layer: str, position: int) -> Mapping[str, Tensor]:
        """As `stored_linear` makes it, once for each precision."""
        precision = self.file.plan.get(layer, Precision.FP32)
        key = layer, position, precision
        if key not in self._stored_layers:
            module = self._adapter.layers.modules(layer)[position]
            form = self.file.layer_forms.get(layer)
            self._stored_layers[key] = stored_linear(module.weight, module.bias, precision, form)
        return self._stored_layers[key]

    def _low_layers(self) -> list[tuple[str, tuple[nn.Linear, ...]]]:
        low = [u.name for u in self._adapter.layers.units if self.file.plan.get(u.name, Precision.FP32) != "fp32"]
        return [(layer, tuple(self._adapter.layers.modules(layer))) for layer in low]


class ServedModel:
    """An exported folder, by the modules that serve it."""

    def __init__(self, session: Session, folder: Path, manifest: Manifest, file: PlanFile) -> None:
        """Load it without looking at hashes: what is wrong with it is to be found."""
        self.label, self.file, self.folder, self.manifest = str(folder), file, folder, manifest
        self._adapter = session.adapter
        self.module = load(folder, verify=False)
        self._tables = {table.unit: table for table in manifest.tables}
        self._low = {layer.unit: layer for layer in manifest.layers}
        self.dense = dense_tensors(folder)
        self._rows = {
            table.unit: stored_rows(folder, table).view(torch.uint8).view(table.num_rows, table.row_bytes)
            for table in manifest.tables
        }

    def pooled(self, call: BagCall) -> Tensor:
        """By FBGEMM's operator over the rows of the file."""
        table, rows = self._tables[call.table], self._rows[call.table]
        if table.precision != Precision.FP32:
            precision = Precision(table.precision)
            return ops.pooled_lookup(
                rows, precision, table.dim, call.indices, call.offsets, mode=call.mode, weights=call.weights
            )
        with torch.inference_mode():
            return _pooled(call, call.indices, rows.view(torch.float32))

    def layers(self) -> Mapping[nn.Module, Layer]:
        """All of them: also a layer at fp32 may be another one here."""
        found: dict[nn.Module, Layer] = {}
        for unit in self._adapter.layers.units:
            for module, path in zip(self._adapter.layers.modules(unit.name), self._paths(unit.name), strict=True):
                served = self.module.get_submodule(path)
                found[module] = served.low if isinstance(served, ServedLinear) else served
        return found

    def stored(self, table: str, ids: Ids) -> NDArray[np.uint8]:
        """From the file."""
        return self._rows[table][torch.from_numpy(ids)].numpy()

    def stored_layer(self, layer: str, position: int) -> Mapping[str, Tensor]:
        """From the file of the dense part."""
        path = self._paths(layer)[position]
        return {n[len(path) + 1 :]: t for n, t in self.dense.items() if n.rpartition(".")[0] == path}

    def _paths(self, layer: str) -> list[str]:
        """Of the modules of a layer, in the order in which the adapter has them."""
        of_module = {module: path for path, module in self._adapter.model.named_modules()}
        return [of_module[module] for module in self._adapter.layers.modules(layer)]


def _pooled(call: BagCall, ids: Tensor, rows: Tensor) -> Tensor:
    """What a call returns of rows float32[n, dim], by these ids."""
    return embedding_bag(
        ids,
        rows,
        call.offsets,
        mode=call.mode,
        per_sample_weights=call.weights,
        include_last_offset=True,
    )
