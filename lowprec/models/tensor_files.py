"""Checkpoint formats behind one face: names, shapes, tensors and row ranges, without loading more than is asked for."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from lowprec.errors import CheckpointError

__all__ = ["TensorSource", "open_tensors"]

_SUFFIXES = (
    ".safetensors, .safetensors.index.json, .pt, .pth, or a folder of safetensors or torch.distributed.checkpoint files"
)
_NESTING_KEYS = ("state_dict", "model")


class TensorSource(Protocol):
    """Named tensors on disk. `files` are the files that hold them, all below `root`.

    is_mapped: tensors and rows are mapped from them, which commits no memory.
    """

    is_mapped: bool
    root: Path
    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, memory-mapped where the format allows it (then writes stay private to the process)."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, without reading the others."""


def open_tensors(path: Path, wanted: Collection[str] = ()) -> TensorSource:
    """The tensors of a checkpoint, in whatever known format it is; raises `CheckpointError` where it is in none.

    A `torch.distributed.checkpoint` whose names all begin with "model." may hold {"model": ...} or a model whose only
    child is called so: names in `wanted` tell.
    """
    if not path.exists():
        raise CheckpointError(f"checkpoint {path}: no such file or folder; train a model, or set model.checkpoint")
    if path.is_dir():
        return _open_folder(path, wanted)
    if path.name.endswith(".index.json"):
        return _Safetensors(path.parent, _read_index(path), extra_files=(path,))
    if path.suffix == ".safetensors":
        return _Safetensors(path.parent, dict.fromkeys(_safetensors_shapes(path), path))
    if path.suffix in (".pt", ".pth"):
        return _TorchFile(path)
    raise CheckpointError(f"checkpoint {path}: unknown format; known: {_SUFFIXES}")


def _open_folder(path: Path, wanted: Collection[str]) -> TensorSource:
    if (path / ".metadata").exists():
        return _DistributedFolder(path, wanted)
    indexes = sorted(path.glob("*.index.json"))
    if len(indexes) == 1:
        return open_tensors(indexes[0])
    files = sorted(path.glob("*.safetensors"))
    if indexes or not files:
        found = f"{len(indexes)} index files" if indexes else "neither"
        raise CheckpointError(
            f"checkpoint {path}: a folder needs safetensors files (with one *.index.json at most) or the .metadata of "
            f"torch.distributed.checkpoint; found {found}"
        )
    file_of: dict[str, Path] = {}
    for file in files:
        for name in _safetensors_shapes(file):
            if name in file_of:
                raise CheckpointError(f'checkpoint {path}: "{name}" is in both {file_of[name].name} and {file.name}')
            file_of[name] = file
    return _Safetensors(path, file_of)


class _Safetensors:
    """One or several safetensors files."""

    is_mapped = True

    def __init__(self, root: Path, file_of: Mapping[str, Path], extra_files: tuple[Path, ...] = ()) -> None:
        self.root = root
        self._file_of = file_of
        files = sorted(set(file_of.values()))
        self.files: tuple[Path, ...] = (*extra_files, *files)
        held = {file: _safetensors_shapes(file) for file in files}
        for name, file in file_of.items():
            if name not in held[file]:
                raise CheckpointError(f'checkpoint {file}: the index says that it holds "{name}", but it does not')
        self.shapes: Mapping[str, tuple[int, ...]] = {name: held[file][name] for name, file in file_of.items()}

    def tensor(self, name: str) -> Tensor:
        with _open_safetensors(self._file_of[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        with _open_safetensors(self._file_of[name]) as file:
            rows: Tensor = file.get_slice(name)[start:stop]
        return rows


class _TorchFile:
    """What `torch.save` wrote: a state dict, alone or under the key `state_dict` or `model`."""

    is_mapped = True

    def __init__(self, path: Path) -> None:
        self.root = path.parent
        self.files: tuple[Path, ...] = (path,)
        self._tensors = _tensors_of(_load_torch_file(path), path)
        self.shapes: Mapping[str, tuple[int, ...]] = {n: tuple(tensor.shape) for n, tensor in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensors[name][start:stop]


class _DistributedFolder:
    """What `torch.distributed.checkpoint.save` wrote, read by whole chunks: `rows` reads those that it touches."""

    is_mapped = False

    def __init__(self, path: Path, wanted: Collection[str]) -> None:
        self.root = path
        self._metadata = _read_metadata(path)
        self._entries = {
            name: entry
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        nested = next((f"{k}." for k in _NESTING_KEYS if all(n.startswith(f"{k}.") for n in self._entries)), "")
        self._prefix = "" if wanted and all(name in self._entries for name in wanted) else nested
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name.removeprefix(self._prefix): tuple(entry.size) for name, entry in self._entries.items()
        }
        stored = self._metadata.storage_data.values()
        self.files: tuple[Path, ...] = (path / ".metadata", *sorted({path / info.relative_path for info in stored}))
        for file in self.files:
            if not file.is_file():
                raise CheckpointError(f"checkpoint {path}: file {file.name} is missing")
        # Those that were read last: a table that is read by row ranges comes back to its chunks.
        self._kept: dict[MetadataIndex, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        shape = self.shapes[name]
        return self._read(name, 0, shape[0] if shape else 1)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._read(name, start, stop)

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        entry = self._entries[self._prefix + name]
        if not entry.size:
            return self._chunk(name, entry.chunks[0].offsets)
        out = torch.empty((stop - start, *entry.size[1:]), dtype=entry.properties.dtype)
        touched = {}
        for chunk in entry.chunks:
            first, last = max(start, chunk.offsets[0]), min(stop, chunk.offsets[0] + chunk.sizes[0])
            if first < last:
                columns = tuple(slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True))
                index = MetadataIndex(self._prefix + name, chunk.offsets)
                touched[index] = whole = self._kept[index] if index in self._kept else self._chunk(name, chunk.offsets)
                out[(slice(first - start, last - start), *columns)] = whole[
                    first - chunk.offsets[0] : last - chunk.offsets[0]
                ]
        self._kept = touched if stop - start < entry.size[0] else {}
        return out

    def _chunk(self, name: str, offsets: torch.Size) -> Tensor:
        info = self._metadata.storage_data[MetadataIndex(self._prefix + name, offsets)]
        file = self.root / info.relative_path
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(f'checkpoint {file}: "{name}" is stored transformed; save it without compression')
        try:
            with file.open("rb") as stream:
                stream.seek(info.offset)
                chunk: Tensor = torch.load(io.BytesIO(stream.read(info.length)), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f'checkpoint {file}: cannot read "{name}": {_first_line(error)}') from None
        return chunk


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
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self._ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _read_metadata(path: Path) -> Metadata:
    try:
        with (path / ".metadata").open("rb") as stream:
            document = _MetadataUnpickler(stream).load()
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ValueError, TypeError, ImportError) as error:
        raise CheckpointError(
            f"checkpoint {path}: .metadata is not that of torch.distributed.checkpoint: {_first_line(error)}"
        ) from None
    if not isinstance(document, Metadata) or not isinstance(document.storage_data, dict):
        raise CheckpointError(f"checkpoint {path}: .metadata holds no torch.distributed.checkpoint metadata")
    return document


def _read_index(path: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        file_of = {str(name): path.parent / file for name, file in weight_map.items()}
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f'checkpoint {path}: is not an index of safetensors (JSON with a "weight_map")') from None
    for file in sorted(set(file_of.values())):
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path}: shard {file.name} is missing")
    return file_of


def _safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with _open_safetensors(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (not a mapping)


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"checkpoint {path}: is not a safetensors file, or is truncated: {_first_line(error)}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read: {error.strerror or error}") from None


def _load_torch_file(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        lines = [line for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line]
        detail = f" ({lines[0].strip()})" if lines else ""
        raise CheckpointError(
            f"checkpoint {path}: holds Python objects, which are not run{detail}; save model.state_dict() instead"
        ) from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read: {error.strerror or error}") from None
    except (RuntimeError, EOFError, ValueError):
        raise CheckpointError(
            f"checkpoint {path}: is not a torch.save file in zip format, or is truncated; save it again"
        ) from None


def _tensors_of(document: Any, path: Path) -> dict[str, Tensor]:
    for key in _NESTING_KEYS:
        if isinstance(document, Mapping) and isinstance(document.get(key), Mapping):
            document = document[key]
            break
    if not isinstance(document, Mapping) or not all(isinstance(value, Tensor) for value in document.values()):
        raise CheckpointError(
            f"checkpoint {path}: must hold a state dict (name -> tensor), alone or under the key state_dict or model"
        )
    return {str(name): tensor for name, tensor in document.items()}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
