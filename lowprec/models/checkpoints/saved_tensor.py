"""Locates the values of a tensor in the output of `torch.save`, so that row ranges can be read."""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowprec.storage import OpenFile

__all__ = ["SavedTensor", "find_tensor"]

_LOCAL_HEADER_BYTES = 30
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class SavedTensor:
    """Values in row-major order from byte `start` of a file on."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def rows(self, file: OpenFile, first: int, end: int) -> Tensor:
        """Rows [first, end), read from the file that it is in."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        rows = torch.empty((end - first, *self.shape[1:]), dtype=self.dtype)
        if rows.numel():
            file.read_into(rows.view(-1).view(torch.uint8).numpy(), self.start + first * row_bytes)
        return rows


def find_tensor(file: OpenFile, start: int, stop: int) -> SavedTensor | None:
    """The tensor that bytes [start, stop) of a file are; None where its values do not lie there row by row.

    Of the values nothing is read. Raises what `zipfile` raises for bytes that are something else.
    """
    with zipfile.ZipFile(io.BufferedReader(_Part(file, start, stop))) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        try:
            found = _TensorUnpickler(io.BytesIO(archive.read(entries["data.pkl"]))).load()
        except pickle.UnpicklingError:
            return None
        if not isinstance(found, _Pickled) or not found.is_plain or archive.read(entries["byteorder"]) != b"little":
            return None
        values = entries[f"data/{found.key}"]
    if values.compress_type != zipfile.ZIP_STORED or values.file_size != math.prod(found.shape) * found.dtype.itemsize:
        return None
    header = file.read(start + values.header_offset, start + values.header_offset + _LOCAL_HEADER_BYTES)
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    begin = start + values.header_offset + _LOCAL_HEADER_BYTES + lengths
    return SavedTensor(begin, found.shape, found.dtype) if begin + values.file_size <= stop else None


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype


@dataclass(frozen=True)
class _Pickled:
    """What PyTorch calls to make a tensor of its storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def key(self) -> str:
        return self.storage.key

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def is_plain(self) -> bool:
        return self.offset == 0 and self.stride == torch.empty(self.shape, device="meta").stride()


class _TensorUnpickler(pickle.Unpickler):
    """Reads the pickle of a plain tensor without making it, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: _Pickled(storage, offset, tuple(shape), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, *_ = pid
        return _Storage(str(key), dtype)


class _Part(io.RawIOBase):
    """Bytes [start, stop) of a file, as a file."""

    def __init__(self, file: OpenFile, start: int, stop: int) -> None:
        self._file, self._start, self._size, self._at = file, start, stop - start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence] + offset
        if self._at < 0:
            raise OSError("before the beginning")
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._at))
        if size:
            self._file.read_into(np.frombuffer(buffer, np.uint8)[:size], self._start + self._at)
        self._at += size
        return size
