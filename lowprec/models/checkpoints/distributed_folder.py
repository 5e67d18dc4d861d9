"""Folders of `torch.distributed.checkpoint`, read by rows without a process group."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from enum import EnumType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from lowprec.core.errors import CheckpointError, first_line
from lowprec.models.checkpoints.saved_tensor import SavedTensor, find_tensor
from lowprec.models.checkpoints.tensor_source import METADATA_FILE
from lowprec.storage import FileState, Location, OpenFile, local_copy

__all__ = ["DistributedFolder"]


class DistributedFolder:
    """What `torch.distributed.checkpoint.save` wrote. Of the chunks of a tensor, rows are read by their bytes; a chunk
    that is not stored row by row (a transposed one) is read whole, and kept until the next one.

    Of a remote one, they come from copies of its files on this machine if `is_copied`, else by ranges of bytes.
    """

    is_mapped = False

    def __init__(self, path: Location, wanted: Collection[str], nesting_keys: Collection[str], *, is_copied: bool):
        """Read the metadata. Raises `CheckpointError` where it is none, or a file is missing.

        wanted, nesting_keys: names may all begin with one of the keys; `wanted` tells whether that belongs to them.
        """
        self.root = path
        self._is_copied = is_copied
        self._metadata, state = _read_metadata(path / METADATA_FILE)
        self._entries = {
            name: entry
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        nested = next((f"{k}." for k in nesting_keys if all(n.startswith(f"{k}.") for n in self._entries)), "")
        self._prefix = "" if wanted and all(name in self._entries for name in wanted) else nested
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name.removeprefix(self._prefix): tuple(entry.size) for name, entry in self._entries.items()
        }
        stored = sorted({str(info.relative_path) for info in self._metadata.storage_data.values()})
        try:
            missing = path.missing(stored)
        except OSError as error:
            raise CheckpointError(f"checkpoint {path}: cannot be listed: {error.strerror or error}") from None
        if missing:
            raise CheckpointError(f"checkpoint {path}: file {missing[0]} is missing; copy the whole checkpoint again")
        self.files: tuple[Location, ...] = (path / METADATA_FILE, *(path / name for name in stored))
        # The metadata is another one after every save.
        self.states: Mapping[Location, FileState] = {path / METADATA_FILE: state}
        self._states = dict(self.states)
        # Where the values of a chunk lie, once that was looked up.
        self._found: dict[MetadataIndex, SavedTensor | None] = {}
        self._whole: tuple[MetadataIndex, Tensor] | None = None

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, put together from its chunks."""
        shape = self.shapes[name]
        return self._read(name, 0, shape[0] if shape else 1)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop)."""
        return self._read(name, start, stop)

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        entry = self._entries[self._prefix + name]
        if not entry.size:
            return self._chunk_rows(name, entry.chunks[0].offsets, None)
        out = torch.empty((stop - start, *entry.size[1:]), dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            top = chunk.offsets[0]
            first, last = max(start, top), min(stop, top + chunk.sizes[0])
            if first < last:
                columns = tuple(slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True))
                rows = self._chunk_rows(name, chunk.offsets, (first - top, last - top))
                out[(slice(first - start, last - start), *columns)] = rows
        return out

    def _chunk_rows(self, name: str, offsets: torch.Size, rows: tuple[int, int] | None) -> Tensor:
        """Rows of a chunk, or all of it."""
        index = MetadataIndex(self._prefix + name, offsets)
        info = self._metadata.storage_data[index]
        where = self.root / info.relative_path
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(f'checkpoint {where}: "{name}" is stored transformed; save it without compression')
        start, stop = info.offset, info.offset + info.length
        try:
            with self._open(where) as file:
                if rows is None:
                    return _loaded(file.read(start, stop))
                if index not in self._found:
                    self._found[index] = find_tensor(file, start, stop)
                if found := self._found[index]:
                    return found.rows(file, *rows)
                if self._whole is None or self._whole[0] != index:
                    self._whole = None  # never two of them
                    self._whole = index, _loaded(file.read(start, stop))
                return self._whole[1][slice(*rows)]
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(
                f'checkpoint {where}: cannot read "{name}": {error.strerror or first_line(error)}'
            ) from None
        except zipfile.BadZipFile:
            raise CheckpointError(
                f'checkpoint {where}: "{name}" is not where the metadata says; the file is cut short or another one; '
                "copy or save the checkpoint again"
            ) from None
        except (
            RuntimeError,
            LookupError,
            TypeError,
            ValueError,
            EOFError,
            pickle.UnpicklingError,
        ) as error:
            raise CheckpointError(f'checkpoint {where}: cannot read "{name}": {first_line(error)}') from None

    @contextmanager
    def _open(self, where: Location) -> Iterator[OpenFile]:
        state = self._same(where)
        # A checkpoint that is saved again while it is read changes its metadata too.
        self._same(self.root / METADATA_FILE)
        with Location.of(local_copy(where, state) if self._is_copied else where).open() as file:
            yield file

    def _same(self, where: Location) -> FileState:
        state = where.state()
        if self._states.setdefault(where, state) != state:
            raise CheckpointError(f"checkpoint {where}: was changed while it was read; start again")
        return state


class _MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata`, which is a pickle, and refuses every class that a checkpoint does not need."""

    _ALLOWED: Mapping[str, frozenset[str]] = {
        "torch": frozenset({"Size"}),
        "torch.serialization": frozenset({"_get_layout"}),
        "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo", "_StoragePrefix"}),
        "torch.distributed.checkpoint.metadata": frozenset(metadata.__all__) | {"_MEM_FORMAT_ENCODING"},
        "collections": frozenset({"OrderedDict"}),
        "pathlib": frozenset({"PosixPath"}),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member  # so some versions of Python, 3.11.2 for one, pickle the members of an enum
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self._ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _member(kind: Any, name: Any) -> Any:
    """Of an enum, and of nothing else: by attributes a pickle could reach whatever there is."""
    if not (isinstance(kind, EnumType) and isinstance(name, str) and name in kind.__members__):
        raise pickle.UnpicklingError(f"it refers to an attribute of {kind}")
    return kind[name]


def _loaded(stored: bytes) -> Tensor:
    tensor: Tensor = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
    return tensor


def _read_metadata(path: Location) -> tuple[Metadata, FileState]:
    try:
        with path.open() as file:
            document, state = _MetadataUnpickler(io.BytesIO(file.read())).load(), file.state
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read: {error.strerror or error}") from None
    except (EOFError, pickle.UnpicklingError, AttributeError, ValueError, TypeError, ImportError) as error:
        raise CheckpointError(
            f"checkpoint {path}: is not that of torch.distributed.checkpoint: {first_line(error)}"
        ) from None
    if not isinstance(document, Metadata) or not isinstance(document.storage_data, dict):
        raise CheckpointError(f"checkpoint {path}: holds no torch.distributed.checkpoint metadata")
    return document, state
