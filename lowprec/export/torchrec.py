"""Exports for TorchRec: precisions by table for `quantize_embeddings`, and stored rows as a state dict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowprec.core.errors import ExportError
from lowprec.export.manifest import TORCHREC, ExportedTable, read_manifest
from lowprec.models.adapter import ModelAdapter

__all__ = ["is_reordered", "per_table_weight_dtype", "quantized_state_dict", "torchrec_document"]

# The names of TorchRec's own: torchrec.modules.embedding_configs, dtype_to_data_type.
_DTYPES = {"fp32": "float32", "fp16": "float16", "int8": "qint8", "int4": "quint4x2", "int2": "quint2x4"}


def torchrec_document(tables: tuple[ExportedTable, ...]) -> dict[str, Any]:
    """What `torchrec.json` holds. Every table is listed: TorchRec makes one that is missing int8."""
    return {
        "per_table_weight_dtype": {_name(table): _DTYPES[table.precision] for table in tables},
        "state_dict": {table.tensor: table.file for table in tables},
        "row_range": {_name(table): table.row_range for table in tables if table.row_range},
    }


def is_reordered(adapter: ModelAdapter) -> bool:
    """Whether tables change places in TorchRec's quantized collection, which groups them by pooling."""
    modes = [bags[0].mode for bags in adapter.bags.values()]
    return sorted(modes, key=modes.index) != modes


def per_table_weight_dtype(folder: str | Path) -> dict[str, torch.dtype]:
    """The argument of that name of TorchRec's `quantize_embeddings`, of an exported folder.

    TorchRec itself quantizes by the range of each row, so that its rows are the certified ones where the plan's
    row_range is minmax; with others, load `quantized_state_dict` afterwards.
    """
    path = Path(folder) / TORCHREC
    try:
        names = json.loads(path.read_bytes())["per_table_weight_dtype"]
        return {table: getattr(torch, dtype) for table, dtype in names.items()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ExportError(f"export {folder}: {TORCHREC} cannot be read: {error}; copy the folder again") from None


def quantized_state_dict(folder: str | Path, *, row_alignment: int = 16) -> dict[str, Tensor]:
    """The stored rows of an exported folder under the names that TorchRec's quantized modules have for them.

    uint8[num_rows, bytes of a row rounded up to row_alignment], which is 16 in TorchRec unless a module says otherwise,
    as a `UInt4Tensor` or `UInt2Tensor` where TorchRec has one; mapped from the folder where no byte has to be added.
    For `load_state_dict(..., strict=False)` of what `quantize_embeddings` made. Raises `ExportError` without TorchRec.
    """
    folder, kinds = Path(folder), _tensor_types()
    found = {}
    for table in read_manifest(folder).tables:
        try:
            with safe_open(folder / table.file, framework="pt") as file:
                rows: Tensor = file.get_tensor(table.tensor)
        except (OSError, SafetensorError) as error:
            raise ExportError(f"export {folder}: {table.file} cannot be read: {error}; copy the folder again") from None
        stored = rows.view(torch.uint8).view(table.num_rows, table.row_bytes)
        padding = -table.row_bytes % row_alignment
        stored = torch.nn.functional.pad(stored, (0, padding)) if padding else stored
        found[table.tensor] = kinds.get(table.precision, _same)(stored)
    return found


def _tensor_types() -> dict[str, Callable[[Tensor], Tensor]]:
    """TorchRec's tensors of int4 and int2, which count values where these are bytes."""
    try:
        from torchrec.tensor_types import UInt2Tensor, UInt4Tensor
    except ImportError as error:
        raise ExportError(
            f"TorchRec cannot be imported ({error}), and the names in this state dict are its own"
        ) from None
    return {"int4": UInt4Tensor, "int2": UInt2Tensor}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _name(table: ExportedTable) -> str:
    """As TorchRec calls it: the last part of the path `...embedding_bags.NAME`."""
    return table.modules[0].rpartition(".")[2]
