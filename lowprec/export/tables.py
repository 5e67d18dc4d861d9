"""Writes a table of a checkpoint as stored rows, block by block, in bounded memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lowprec import ops
from lowprec.core.errors import CheckpointError, ExportError, WeightError
from lowprec.core.progress import Progress, Silent
from lowprec.models.checkpoints.tensor_files import open_tensors
from lowprec.models.checkpoints.tensor_source import TensorSource
from lowprec.plan import Precision, RowRange
from lowprec.storage import AnyPath, Location
from lowprec.storage.whole_file import whole_file

__all__ = ["StoredTable", "write_table", "write_table_tensor"]

_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class StoredTable:
    """A file of `num_rows` rows of `row_bytes` bytes, one after the other, and nothing else but a header if it has one.

    A row is what FBGEMM serves: fp16 scale, fp16 bias and packed codes (low-order bits first), or plain fp16 or fp32
    values. `sha256` is that of the file.
    """

    path: Path
    precision: Precision
    row_range: RowRange
    num_rows: int
    dim: int
    row_bytes: int
    sha256: str


def write_table(
    checkpoint: AnyPath,
    tensor: str,
    out: str | Path,
    precision: Precision | str,
    *,
    row_range: RowRange | str,
    num_threads: int = 1,
    block_bytes: int = _BLOCK_BYTES,
    progress: Progress | None = None,
) -> StoredTable:
    """Quantize the table `tensor`, float[num_rows, dim], of a checkpoint into the file `out`, whole or not at all.

    Rows are read, quantized and written `block_bytes` of fp32 at a time, and memory does not grow with the table (a
    `torch.distributed.checkpoint` folder is read by its own chunks). The bytes depend on neither `num_threads` nor the
    CPU. `row_range` is that of the plan (`PlanFile.row_range`); it does nothing to fp32 and fp16. The checkpoint may be
    a URL, `out` not.

    Raises `CheckpointError` where the checkpoint has no such table, `WeightError` naming the first row that holds NaN
    or Inf or that `precision` cannot hold, `ExportError` where the file cannot be written or is part of the checkpoint,
    `PlanError` for an unknown precision or range.
    """
    return _write(
        checkpoint,
        tensor,
        out,
        Precision.parse(str(precision), where="export"),
        RowRange.parse(str(row_range), where="export"),
        header=lambda *_: b"",
        num_threads=num_threads,
        block_bytes=block_bytes,
        progress=progress,
    )


def write_table_tensor(
    checkpoint: AnyPath,
    tensor: str,
    out: str | Path,
    precision: Precision,
    *,
    name: str,
    row_range: RowRange,
    num_threads: int = 1,
    progress: Progress | None = None,
) -> StoredTable:
    """As `write_table`, as a safetensors file of one tensor called `name`.

    It is uint8[num_rows, row_bytes] for row-wise precisions, float16 or float32[num_rows, dim] for the others.
    """

    def header(num_rows: int, dim: int, row_bytes: int) -> bytes:
        kind, size = {Precision.FP32: ("F32", 4), Precision.FP16: ("F16", 2)}.get(precision, ("U8", 1))
        shape = [num_rows, row_bytes // size]
        entry = {"dtype": kind, "shape": shape, "data_offsets": [0, num_rows * row_bytes]}
        about = {"precision": str(precision), "dim": str(dim)}
        text = json.dumps({"__metadata__": about, name: entry}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    return _write(
        checkpoint,
        tensor,
        out,
        precision,
        row_range,
        header=header,
        num_threads=num_threads,
        block_bytes=_BLOCK_BYTES,
        progress=progress,
    )


def _write(
    checkpoint: AnyPath,
    tensor: str,
    out: str | Path,
    precision: Precision,
    row_range: RowRange,
    *,
    header: Callable[[int, int, int], bytes],
    num_threads: int,
    block_bytes: int,
    progress: Progress | None,
) -> StoredTable:
    checkpoint, target = Location.of(checkpoint), Location.of(out).local
    if target is None:
        raise ExportError(f"export {out}: rows are written to a file of this machine; give a path and copy it there")
    source = open_tensors(checkpoint, [tensor])
    num_rows, dim = _shape(source, tensor, checkpoint)
    if any(target.exists() and file.local is not None and target.samefile(file.local) for file in source.files):
        raise ExportError(f"export {out}: is a file of the checkpoint that is read; write to another one")
    row_bytes = ops.row_bytes(dim, precision)
    block_rows = max(1, block_bytes // (4 * dim))
    progress = progress or Silent()
    progress.stage(tensor, num_rows)
    begin = header(num_rows, dim, row_bytes)
    digest = hashlib.sha256(begin)
    try:
        with whole_file(target) as partial, partial.open("wb") as file:
            file.write(begin)
            for start, rows in _blocks(source, tensor, num_rows, block_rows):
                stored = _stored(rows, start, tensor, precision, row_range, num_threads)
                digest.update(stored.data)
                file.write(stored.data)
                progress.advance(len(rows))
    except OSError as error:
        raise ExportError(f"export {out}: cannot be written: {error.strerror or error}") from None
    return StoredTable(target, precision, row_range, num_rows, dim, row_bytes, digest.hexdigest())


def _shape(source: TensorSource, tensor: str, checkpoint: Location) -> tuple[int, int]:
    shape = source.shapes.get(tensor)
    if shape is None:
        tables = [name for name, found in source.shapes.items() if len(found) == 2]
        bare = tensor.removeprefix("table:")
        alike = [f'"{name}"' for name in tables if bare in name.split(".")] or [f'"{name}"' for name in tables]
        some = ", ".join(alike[:3]) + (f", and {len(alike) - 3} more" if len(alike) > 3 else "")
        raise CheckpointError(f'checkpoint {checkpoint}: has no table "{tensor}"; it has {some or "none"}')
    if len(shape) != 2 or not shape[1]:
        raise CheckpointError(f'checkpoint {checkpoint}: "{tensor}" is {list(shape)}; a table is [num_rows, dim]')
    return shape[0], shape[1]


def _blocks(
    source: TensorSource, tensor: str, num_rows: int, block_rows: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The number of the first row, and the rows, float32[n, dim]."""
    for start in range(0, num_rows, block_rows):
        rows = source.rows(tensor, start, min(start + block_rows, num_rows))
        yield start, rows.to(torch.float32).contiguous().numpy()


def _stored(
    rows: NDArray[np.float32], start: int, tensor: str, precision: Precision, row_range: RowRange, num_threads: int
) -> NDArray[np.uint8]:
    try:
        stored = ops.quantize(rows, precision, row_range=row_range, num_threads=num_threads, first_row=start)
        ops.check_overflow(rows, stored, precision, first_row=start)
    except WeightError as error:
        raise WeightError(f'"{tensor}": {error}') from None
    return stored
