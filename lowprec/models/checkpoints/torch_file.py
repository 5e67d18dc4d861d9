"""Files of `torch.save` that hold a state dict."""

from __future__ import annotations

import errno
import pickle
import re
import zipfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowprec.core.errors import CheckpointError
from lowprec.storage import FileState, Location, local_copy

__all__ = ["NESTING_KEYS", "TorchFile"]

# Under which of its keys a checkpoint has the state dict, by the habits of PyTorch's own examples.
NESTING_KEYS = ("state_dict", "model", "model_state_dict")

_ZIP = b"PK\x03\x04"
# A pickled magic number, with which files of PyTorch before 1.6 begin.
_OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_GIT_LFS = b"version https://git-lfs"


class TorchFile:
    """What `torch.save` wrote: a state dict, alone or under one of `NESTING_KEYS`."""

    is_mapped = True

    def __init__(self, path: Location) -> None:
        """Map the file; raises `CheckpointError` where it holds anything but a state dict."""
        self.root = path.parent
        self.files: tuple[Location, ...] = (path,)
        document, state = _load(path)
        self.states: Mapping[Location, FileState] = {path: state}
        self._tensors = _tensors_of(document, path)
        self.shapes: Mapping[str, tuple[int, ...]] = {n: tuple(tensor.shape) for n, tensor in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, memory-mapped."""
        return self._tensors[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor."""
        return self._tensors[name][start:stop]


def _load(path: Location) -> tuple[Any, FileState]:
    try:
        state = path.state()
        local = local_copy(path, state)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read: {error.strerror or error}") from None
    try:
        with torch.serialization.safe_globals(_numpy_values()):
            return torch.load(local, map_location="cpu", weights_only=True, mmap=True), state
    except pickle.UnpicklingError as error:
        # PyTorch's own advice is to allow the class, or to run what the file says.
        found = re.search(r"GLOBAL (\S+)|(?:class|function) (\S+)", str(error))
        named = f" ({found[1] or found[2]})" if found else ""
        raise CheckpointError(
            f"checkpoint {path}: holds Python objects, which are not run{named}; save model.state_dict() instead"
        ) from None
    except OSError as error:
        # What PyTorch says of a zip archive whose end is missing.
        if error.errno != errno.EINVAL:
            raise CheckpointError(f"checkpoint {path}: cannot be read: {error.strerror or error}") from None
        raise CheckpointError(f"checkpoint {path}: {_defect(local)}") from None
    except (RuntimeError, EOFError, ValueError):
        raise CheckpointError(f"checkpoint {path}: {_defect(local)}") from None


def _defect(path: Path) -> str:
    """Why a file cannot be loaded, by its first and last bytes."""
    with path.open("rb") as file:
        head = file.read(64)
    size = path.stat().st_size
    # The list of what is in a zip archive stands at its end.
    if not head or _ZIP.startswith(head) or (head.startswith(_ZIP) and not zipfile.is_zipfile(path)):
        return f"is truncated: it ends after {size:,} bytes; copy or save it again"
    if head.startswith(_GIT_LFS):
        return "is a pointer of Git LFS, not the file itself; run git lfs pull"
    if head.startswith(_OLD_FORMAT):
        return "is in the format of PyTorch before 1.6, which cannot be mapped; load it and save it again"
    return "is not a torch.save file in zip format, or is truncated; save it again"


def _numpy_values() -> list[Any]:
    """What pickles of NumPy's numbers and arrays of them refer to; none of it runs code. (Objects are left out.)"""
    multiarray = import_module("numpy._core.multiarray")
    dtypes = [kind for name in np.dtypes.__all__ if (kind := getattr(np.dtypes, name)) is not np.dtypes.ObjectDType]
    functions = [multiarray.scalar, multiarray._reconstruct]
    # NumPy 1 wrote them under another name.
    named = [(function, f"numpy.core.multiarray.{function.__name__}") for function in functions]
    return [np.dtype, np.ndarray, *functions, *named, *dtypes]


def _tensors_of(document: Any, path: Location) -> dict[str, Tensor]:
    found = document
    for key in NESTING_KEYS:
        if isinstance(document, Mapping) and isinstance(document.get(key), Mapping):
            found = document[key]
            break
    if not _is_state_dict(found):
        others = [str(k) for k, v in document.items() if _is_state_dict(v)] if isinstance(document, Mapping) else []
        advice = f'; save what its key "{others[0]}" holds alone' if others else ""
        raise CheckpointError(
            f"checkpoint {path}: must hold a state dict (name -> tensor), alone or under the key "
            f"{', '.join(NESTING_KEYS[:-1])} or {NESTING_KEYS[-1]}{advice}"
        )
    # A transposed weight is stored as it lies in memory; rows are needed one after the other.
    return {str(name): tensor.contiguous() for name, tensor in found.items()}


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(entry, Tensor) for entry in value.values())
