"""Model weights in files or on an object store: load strictly, read row ranges, save, hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lowprec.core.errors import CheckpointError, WeightError
from lowprec.models.checkpoints.tensor_files import open_tensors
from lowprec.models.checkpoints.tensor_source import TensorSource
from lowprec.models.checkpoints.wrapper_names import wrapper_hint
from lowprec.storage import AnyPath, FileState, Location, file_sha256

__all__ = [
    "LoadedCheckpoint",
    "TableRows",
    "checkpoint_sha256",
    "checkpoint_stamp",
    "is_mapped",
    "load_checkpoint",
    "load_dense",
    "read_rows",
    "save_checkpoint",
]


# Files hashed at once: one thread each, which on an object store waits more than it works.
_FILES_AT_ONCE = 4
_FITTING = "; give model.args as it was trained with, or the checkpoint of this model"
# Blocks of each local file, for the stamp.
_NUM_SAMPLED, _SAMPLED_BYTES = 16, 4096


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What was loaded. `cast` maps a tensor that was stored in another format than the model's to that format."""

    path: Location
    num_tensors: int
    cast: Mapping[str, str] = field(default_factory=dict)


def load_checkpoint(model: nn.Module, path: AnyPath, *, stamp: str | None = None) -> LoadedCheckpoint:
    """Load every parameter and buffer of `model`, memory-mapped where the format allows it.

    Formats: safetensors (one file, or several with or without an index), `.pt` of `torch.save` (never running pickled
    code), folders of `torch.distributed.checkpoint` (read into memory). A floating-point tensor stored in another
    format is cast to the model's, fp32 as a rule, which takes memory and is reported in `cast`. Afterwards no
    parameter requires a gradient. While the model lives its file may be replaced, but not changed in place.

    path: also a URL; its files are copied to this machine first, once for all processes (`lowprec.storage.local_copy`).
    stamp: what `checkpoint_stamp` said; another checkpoint that was put there since is refused.

    Raises `CheckpointError` on missing, unexpected or mis-shaped tensors and unreadable files, `WeightError` on NaN or
    Inf outside the embedding tables (tables are checked row by row where they are quantized).
    """
    where, expected = Location.of(path), model.state_dict(keep_vars=True)
    return _load(model, where, _stamped(where, open_tensors(where, expected, whole=True), stamp), with_tables=True)


def is_mapped(path: AnyPath) -> bool:
    """Whether rows of a checkpoint are mapped from files of this machine, and not read into memory."""
    return open_tensors(Location.of(path)).is_mapped


def load_dense(model: nn.Module, path: AnyPath, *, stamp: str | None = None) -> TableRows:
    """Load all but the tables, whose weights become tensors of the same shape on the meta device; returns their rows.

    Formats, errors and stamp are those of `load_checkpoint`. For a model whose tables no process can hold: of a URL,
    nothing but what is asked for is read.
    """
    where, expected = Location.of(path), model.state_dict(keep_vars=True)
    source = _stamped(where, open_tensors(where, expected), stamp)
    _load(model, where, source, with_tables=False)
    return TableRows(where, source, _tied(expected, source))


class TableRows:
    """The rows of tables in a checkpoint, read by range: memory-mapped where the format allows it."""

    def __init__(self, path: Location, source: TensorSource, tied: Mapping[str, str]) -> None:
        """Of an opened checkpoint; tied: each further name of a tensor -> the name that it is stored by."""
        self._path, self._source, self._tied = path, source, tied

    @property
    def is_mapped(self) -> bool:
        """Whether rows are mapped from files and not read into memory (fp32 ones, that is)."""
        return self._source.is_mapped

    def rows(self, tensor_name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a table, float32[stop - start, dim]. Raises `CheckpointError` where they are not."""
        name = self._tied.get(tensor_name, tensor_name)
        shape = self._source.shapes.get(name)
        if shape is None or not 0 <= start <= stop <= shape[0]:
            what = "it has no such tensor" if shape is None else f"it is {_text(shape)}"
            raise CheckpointError(f'checkpoint {self._path}: rows {start} to {stop} of "{name}" are wanted, but {what}')
        return self._source.rows(name, start, stop).to(torch.float32)


def _load(model: nn.Module, path: Location, source: TensorSource, *, with_tables: bool) -> LoadedCheckpoint:
    expected = model.state_dict(keep_vars=True)
    tied = _tied(expected, source)
    _check_fit(expected, tied, source, path)
    tables, looked_up = _weights_of(model, nn.EmbeddingBag), _weights_of(model, nn.Embedding)
    state: dict[str, Tensor] = {}
    cast: dict[str, str] = {}
    for name, wanted in expected.items():
        if name in tied:
            continue
        if name in tables and not with_tables:
            state[name] = torch.empty_like(wanted, device="meta")
            continue
        tensor = source.tensor(name)
        if tensor.dtype != wanted.dtype:
            cast[name] = str(tensor.dtype).removeprefix("torch.")
            tensor = _cast(tensor, wanted.dtype, f'checkpoint {path}: "{name}"')
        if name not in tables:
            _check_finite(tensor, f'checkpoint {path}: "{name}"')
            if name not in looked_up:
                # Products of matrices and vectors differ in their last bits with the alignment of memory, and where a
                # tensor lies in a file must not decide them.
                tensor = tensor.clone(memory_format=torch.contiguous_format)
        state[name] = tensor
    for name, twin in tied.items():
        if state[twin].is_meta:
            pass
        elif name in source.shapes and not torch.equal(source.tensor(name).to(state[twin].dtype), state[twin]):
            raise CheckpointError(
                f'checkpoint {path}: the model ties "{name}" to "{twin}", but they are stored different'
            )
        state[name] = state[twin]
    model.load_state_dict(state, strict=True, assign=True)
    _tie(model, tied)
    model.requires_grad_(False)
    return LoadedCheckpoint(path, len(state), cast)


def read_rows(path: AnyPath, tensor_name: str, start: int, stop: int) -> NDArray[np.float32]:
    """Rows [start, stop) of one tensor, float32[stop - start, ...], without loading the tensor.

    Of a URL only the bytes of the rows are asked for; a `.pt` file is copied to this machine.
    """
    source = open_tensors(Location.of(path), [tensor_name])
    shape = source.shapes.get(tensor_name)
    if shape is None:
        raise CheckpointError(f'checkpoint {path}: has no tensor "{tensor_name}"; it has {_preview(source.shapes)}')
    if not shape or not 0 <= start <= stop <= shape[0]:
        raise CheckpointError(f'checkpoint {path}: "{tensor_name}" is {_text(shape)}; asked for rows {start} to {stop}')
    rows = source.rows(tensor_name, start, stop)
    return np.array(rows.to(torch.float32).numpy())


def save_checkpoint(model: nn.Module, path: AnyPath, metadata: Mapping[str, str] | None = None) -> None:
    """Write the model's state as one safetensors file, whole or not at all.

    `metadata` goes into the header, as one JSON entry called lowprec: several entries come in an order that changes
    from run to run, and the same model must give the same bytes.
    """
    path = Location.of(path)
    if not path.name.endswith(".safetensors"):
        raise CheckpointError(f"checkpoint {path}: is written as safetensors; give it a name that ends in .safetensors")
    header = {"lowprec": json.dumps(dict(metadata or {}), sort_keys=True)}
    try:
        with path.whole_file() as partial:
            save_file(_unshared(model.state_dict()), partial, metadata=header)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"checkpoint {path}: cannot be written: {reason}") from None


def checkpoint_stamp(path: AnyPath) -> str:
    """A word that is another one when another checkpoint is put in the place of this one; no tensor is read for it.

    Sizes of the files tell, on an object store their versions, and of local ones a few blocks of each. (Times do not:
    machines of a cluster may have copies of their own.)
    """
    where = Location.of(path)
    return _stamp(open_tensors(where))


def checkpoint_sha256(path: AnyPath, *, stamp: str | None = None) -> str:
    """The identity of a checkpoint: SHA-256 of its file, the same wherever it lies.

    Of several files: SHA-256 over the lines "relative name, space, SHA-256 of the file", sorted by name. Raises
    `CheckpointError` where a file changes meanwhile, or `checkpoint_stamp` said another stamp.
    """
    path = Location.of(path)
    source = _stamped(path, open_tensors(path), stamp)
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        hashes = list(pool.map(_file_sha256, source.files, map(source.states.get, source.files)))
    if source.files == (path,):
        return hashes[0]
    root = f"{source.root}/"
    lines = (f"{str(file).removeprefix(root)} {found}\n" for file, found in zip(source.files, hashes, strict=True))
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _tied(expected: Mapping[str, Tensor], source: TensorSource) -> dict[str, str]:
    """Names of one and the same tensor: each further name -> the name that it is loaded by."""
    names: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        names.setdefault(id(tensor), []).append(name)
    tied = {}
    for same in names.values():
        first = next((name for name in same if name in source.shapes), same[0])
        tied.update({name: first for name in same if name != first})
    return tied


def _tie(model: nn.Module, tied: Mapping[str, str]) -> None:
    for name, twin in tied.items():
        (module, attribute), (other, source) = (_place(model, n) for n in (name, twin))
        setattr(module, attribute, getattr(other, source))


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _check_fit(expected: Mapping[str, Tensor], tied: Mapping[str, str], source: TensorSource, path: Location) -> None:
    problems = []
    if missing := [name for name in expected if name not in source.shapes and name not in tied]:
        problems.append(f"the checkpoint has no {_preview(missing)}")
    if unexpected := [name for name in source.shapes if name not in expected]:
        problems.append(f"the model has no {_preview(unexpected)}")
    if problems:
        hint = f"; {wrapped}" if (wrapped := wrapper_hint(missing, unexpected)) else _FITTING
        raise CheckpointError(f"checkpoint {path}: does not fit the model: {'; '.join(problems)}{hint}")
    misshapen = [
        f"{name}: checkpoint has {_text(source.shapes[name])}, model has {_text(tuple(wanted.shape))}"
        for name, wanted in expected.items()
        if source.shapes.get(name, wanted.shape) != wanted.shape
    ]
    if misshapen:
        more = f"; and {len(misshapen) - 3} more" if len(misshapen) > 3 else ""
        raise CheckpointError(f"checkpoint {path}: does not fit the model: {'; '.join(misshapen[:3])}{more}{_FITTING}")


def _weights_of(model: nn.Module, kind: type[nn.Module]) -> frozenset[str]:
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, kind))
    return frozenset(f"{name}.weight" if name else "weight" for name, _ in found)


def _cast(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    if not (tensor.dtype.is_floating_point and dtype.is_floating_point):
        raise CheckpointError(f"{where}: is {tensor.dtype}, model has {dtype}")
    return tensor.to(dtype)


def _check_finite(tensor: Tensor, where: str) -> None:
    if tensor.dtype.is_floating_point and not torch.isfinite(tensor).all():
        place = (~torch.isfinite(tensor)).nonzero()[0].tolist()
        value = tensor[tuple(place)].item()
        raise WeightError(f"{where}: holds {value} at {place}; repair or retrain the model")


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that safetensors takes: contiguous, each with memory of its own (tied weights are written twice)."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage().data_ptr()
        out[name] = tensor.detach().clone() if storage in seen and tensor.numel() else tensor.detach().contiguous()
        seen.add(storage)
    return out


def _stamp(source: TensorSource) -> str:
    states = sorted(source.states.items(), key=lambda item: str(item[0]))
    words = [(file.name, s.size, s.version if file.is_url else _sample(file, s.size)) for file, s in states]
    return hashlib.sha256(repr(words).encode()).hexdigest()[:16]


def _sample(where: Location, size: int) -> bytes:
    """Blocks at equal distances, the first and the last of the file among them: training changes nearly all of them."""
    last = max(0, size - _SAMPLED_BYTES)
    digest = hashlib.sha256()
    try:
        with where.open() as file:
            for k in range(_NUM_SAMPLED):
                start = last * k // (_NUM_SAMPLED - 1)
                digest.update(file.read(start, min(start + _SAMPLED_BYTES, size)))
    except OSError as error:
        raise CheckpointError(f"checkpoint {where}: cannot be read: {error.strerror or error}") from None
    return digest.digest()


def _stamped(path: Location, source: TensorSource, stamp: str | None) -> TensorSource:
    """The source, which has that stamp if one is given."""
    if stamp is not None and _stamp(source) != stamp:
        raise CheckpointError(
            f"checkpoint {path}: was replaced by another one since this began; put it back and resume, or begin anew"
        )
    return source


def _file_sha256(where: Location, opened: FileState | None) -> str:
    try:
        return file_sha256(where, opened or where.state())
    except OSError as error:
        raise CheckpointError(f"checkpoint {where}: cannot be read: {error.strerror or error}") from None


def _preview(names: Mapping[str, object] | list[str], limit: int = 3) -> str:
    quoted = [f'"{name}"' for name in _first(names, limit)]
    return ", ".join(quoted) + (f", and {len(names) - limit} more" if len(names) > limit else "")


def _first(names: Mapping[str, object] | list[str], limit: int) -> Iterator[str]:
    for _, name in zip(range(limit), names, strict=False):
        yield name


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) if shape else "a scalar"
