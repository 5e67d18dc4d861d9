"""Safetensors files: headers, memory-mapped tensors, row ranges."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowprec.core.errors import CheckpointError, first_line
from lowprec.storage import FileState, Location, OpenFile, local_copy

__all__ = ["Safetensors", "read_headers", "read_index"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
# What safetensors itself accepts, and what is asked for at once: most headers come with the first request.
_MAX_HEADER_BYTES = 100_000_000
_FIRST_READ_BYTES = 1 << 16
# Headers of a sharded checkpoint on an object store are asked for together: each takes two round trips.
_HEADERS_AT_ONCE = 8


@dataclass(frozen=True)
class _Entry:
    """A tensor: where its bytes [start, stop) are in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a file holds, and the state of the file that said so."""

    state: FileState
    entries: Mapping[str, _Entry]


class Safetensors:
    """One or several files. Local ones are mapped.

    Of remote ones, whole tensors come from a mapped copy on this machine if `is_copied`; everything else is read by
    the ranges of its bytes.
    """

    def __init__(
        self,
        root: Location,
        file_of: Mapping[str, Location],
        headers: Mapping[Location, Header],
        *,
        is_copied: bool,
        extra_files: tuple[Location, ...] = (),
    ) -> None:
        """Take where each tensor is, and the header of every file. Raises `CheckpointError` where they disagree."""
        self.root = root
        self.files: tuple[Location, ...] = (*extra_files, *headers)
        self.states: Mapping[Location, FileState] = {file: header.state for file, header in headers.items()}
        self.is_mapped = is_copied or not root.is_url
        self._file_of, self._headers = file_of, headers
        for name, file in file_of.items():
            if name not in headers[file].entries:
                raise CheckpointError(
                    f'checkpoint {file}: the index says that it holds "{name}", but it does not: they are not of one '
                    "checkpoint; copy or save it whole again"
                )
        self.shapes: Mapping[str, tuple[int, ...]] = {name: self._entry(name).shape for name in file_of}

    def tensor(self, name: str) -> Tensor:
        """The whole tensor."""
        if not self.is_mapped:
            return self._read(name, 0, None)
        with self._mapped(name) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop)."""
        if not self.is_mapped:
            return self._read(name, start, stop)
        with self._mapped(name) as file:
            rows: Tensor = file.get_slice(name)[start:stop]
        return rows

    def _entry(self, name: str) -> _Entry:
        return self._headers[self._file_of[name]].entries[name]

    def _mapped(self, name: str) -> Any:
        where = self._file_of[name]
        try:
            path = local_copy(where, self._headers[where].state)
            if not where.is_url:
                _check_same(where, self._headers[where].state, where.state())
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise _not_safetensors(where, first_line(error)) from None
        except OSError as error:
            raise CheckpointError(f"checkpoint {where}: cannot be read: {error.strerror or error}") from None

    def _read(self, name: str, start: int, stop: int | None) -> Tensor:
        """Rows [start, stop), all of them without a stop, by the ranges of their bytes."""
        where, entry = self._file_of[name], self._entry(name)
        num_rows, rest = (entry.shape[0], entry.shape[1:]) if entry.shape else (1, ())
        stop = num_rows if stop is None else stop
        row_bytes = math.prod(rest) * entry.dtype.itemsize
        tensor = torch.empty((stop - start, *rest) if entry.shape else (), dtype=entry.dtype)
        if not tensor.numel():
            return tensor
        out = tensor.view(-1).view(torch.uint8).numpy()
        state = self._headers[where].state
        try:
            with where.open() as file:
                _check_same(where, state, file.state)
                file.read_into(out, entry.start + start * row_bytes)
            _check_same(where, state, where.state())
        except OSError as error:
            raise CheckpointError(f"checkpoint {where}: cannot be read: {error.strerror or error}") from None
        return tensor


def read_headers(files: Iterable[Location]) -> dict[Location, Header]:
    """The header of every file, in the order of their names; raises `CheckpointError` for one that is none."""
    ordered = sorted(set(files), key=str)
    if len(ordered) < 2 or not ordered[0].is_url:
        return {file: _read_header(file) for file in ordered}
    with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
        return dict(zip(ordered, pool.map(_read_header, ordered), strict=True))


def read_index(path: Location) -> dict[str, Location]:
    """Which file holds each tensor, by an index; raises `CheckpointError` where one of them is missing."""
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        file_of = {str(name): path.parent / file for name, file in weight_map.items()}
        missing = path.parent.missing(map(str, weight_map.values()))
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f'checkpoint {path}: is not an index of safetensors (JSON with a "weight_map")') from None
    if missing:
        raise CheckpointError(f"checkpoint {path}: shard {missing[0]} is missing; copy the whole checkpoint again")
    return file_of


def _read_header(where: Location) -> Header:
    try:
        with where.open() as file:
            return Header(file.state, _entries(file))
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {where}: is missing") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {where}: cannot be read: {error.strerror or error}") from None


def _entries(file: OpenFile) -> dict[str, _Entry]:
    """What the header says: its length in 8 bytes, JSON, then the bytes of the tensors."""
    where, size = file.location, file.state.size
    begin = file.read(0, min(_FIRST_READ_BYTES, size))
    num_bytes = int.from_bytes(begin[:8], "little")
    if size < 8 or num_bytes > _MAX_HEADER_BYTES:
        raise _not_safetensors(where, "it has no header")
    data = 8 + num_bytes
    if data > size:
        raise CheckpointError(f"checkpoint {where}: is cut short, or no safetensors file: its header ends beyond it")
    text = begin[8:data] if data <= len(begin) else begin[8:] + file.read(len(begin), data)
    try:
        document = json.loads(text)
        entries = {str(name): _entry(entry, data) for name, entry in document.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _not_safetensors(where, f"its header is broken ({type(error).__name__})") from None
    if (end := max((entry.stop for entry in entries.values()), default=data)) > size:
        raise CheckpointError(
            f"checkpoint {where}: is cut short: it has {size:,} of {end:,} bytes; copy or save it again"
        )
    return entries


def _entry(entry: Mapping[str, Any], data: int) -> _Entry:
    shape = tuple(int(n) for n in entry["shape"])
    start, stop = (data + int(k) for k in entry["data_offsets"])
    found = _Entry(_DTYPES[entry["dtype"]], shape, start, stop)
    if start < data or min(shape, default=0) < 0 or stop - start != math.prod(shape) * found.dtype.itemsize:
        raise ValueError("offsets and shape do not fit")
    return found


def _check_same(where: Location, before: FileState, now: FileState) -> None:
    if now != before:
        raise CheckpointError(f"checkpoint {where}: was changed while it was read; start again")


def _not_safetensors(where: Location, reason: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {where}: is not a safetensors file, or is truncated: {reason}")
