"""Finds the units that a model calls, and the tables that features reach, without looking rows up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.models.adapter import ModelAdapter
from lowprec.models.inputs import ModelInputs, SparseInput, arguments_of, ids_of
from lowprec.models.layers import replaced_forwards
from lowprec.traffic.schema import Schema

__all__ = ["called_units", "layer_rows", "tables_of_features"]


def layer_rows(adapter: ModelAdapter, inputs: ModelInputs) -> dict[str, float]:
    """Rows that an example gives to each layer, by unit name; of layers that are not called none.

    Nothing is looked up: shapes do not depend on what tables return.
    """
    rows = dict.fromkeys((unit.name for unit in adapter.layers.units), 0.0)
    with adapter.layers.watched(list(rows)) as calls:
        adapter.trace_lookups(inputs)
    for call in calls:
        rows[call.layer] += call.input.numel() / call.input.shape[-1] / max(len(inputs.dense), 1)
    return rows


def called_units(adapter: ModelAdapter, inputs: ModelInputs) -> tuple[str, ...]:
    """Every unit whose module the model calls when it is served, in the order of first calls."""
    called: dict[str, None] = {}

    def noting(unit: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(*args: Any, **kwargs: Any) -> Tensor:
            called.setdefault(unit)
            return forward(*args, **kwargs)

        return noted

    # No hooks: with some, PyTorch's encoder layers take another path, on which they call more modules.
    units: dict[nn.Module, str] = {bag: unit for unit, bags in adapter.bags.items() for bag in bags}
    units |= {m: unit.name for unit in adapter.layers.units for m in adapter.layers.modules(unit.name)}
    if adapter.has_rows:
        with replaced_forwards({module: noting(unit, module.forward) for module, unit in units.items()}):
            adapter.reference(inputs)
    else:
        # Tables are answered for, so that their own calls do not show.
        layers = {m: unit for m, unit in units.items() if not isinstance(m, nn.EmbeddingBag)}
        with replaced_forwards({module: noting(unit, module.forward) for module, unit in layers.items()}):
            called = {**dict.fromkeys(call.table for call in adapter.trace_lookups(inputs)), **called}
    return tuple(called)


def tables_of_features(adapter: ModelAdapter, schema: Schema) -> dict[str, str]:
    """Which table (unit name) each feature's ids reach unchanged; features where none is seen to are left out.

    Found by one call with two made-up rows of one id: the call of a table that receives the very tensor of a
    feature. Nothing is looked up: each table returns zeros.
    """
    features: dict[str, SparseInput] = {}
    for feature in schema.sparse:
        ids, offsets = torch.zeros(2, dtype=torch.int64), torch.arange(3)
        features[feature.name] = (ids, offsets, torch.ones(2)) if feature.weights else (ids, offsets)
    arguments = arguments_of(adapter.model, ModelInputs(torch.zeros(2, len(schema.dense)), features))
    given = ids_of(arguments)
    reached: dict[int, str] = {}

    def watch(name: str, bag: nn.EmbeddingBag, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            reached.setdefault(input.data_ptr(), f"table:{name}")
            return torch.zeros(2, bag.embedding_dim)

        return watched

    try:
        with torch.inference_mode(), adapter.wrapped_forwards(watch):
            adapter.model(*arguments)
    except (
        Exception,
        SystemExit,
    ):  # a model may refuse made-up rows; what it was seen to do until then is true all the same
        pass
    return {name: reached[ids.data_ptr()] for name, ids in given.items() if ids.data_ptr() in reached}
