"""Opens a checkpoint of any supported format as a `TensorSource`."""

from __future__ import annotations

from collections.abc import Collection

from lowprec.core.errors import CheckpointError
from lowprec.models.checkpoints.safetensors_files import Safetensors, read_headers, read_index
from lowprec.models.checkpoints.tensor_source import METADATA_FILE, TensorSource
from lowprec.models.checkpoints.torch_file import NESTING_KEYS, TorchFile
from lowprec.storage import Location

__all__ = ["open_tensors"]

_SUFFIXES = (
    ".safetensors, .safetensors.index.json, .pt, .pth, or a folder of safetensors or torch.distributed.checkpoint files"
)


def open_tensors(path: Location, wanted: Collection[str] = (), *, whole: bool = False) -> TensorSource:
    """The tensors of a checkpoint, in whatever known format it is; raises `CheckpointError` where it is in none.

    whole: all of it will be read, so files of an object store are copied to this machine, once for all processes, and
    used as local ones are. Without it rows and tensors are read by ranges of bytes (a `.pt` file, which has no order
    that is known from outside, is copied either way).

    A `torch.distributed.checkpoint` whose names all begin with "model." may hold {"model": ...} or a model whose only
    child is called so: names in `wanted` tell.
    """
    try:
        kind = path.kind()
        if kind == "folder":
            return _open_folder(path, path.names(), wanted, whole)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read: {error.strerror or error}") from None
    if kind is None:
        raise CheckpointError(
            f"checkpoint {path}: no such file or folder{path.looked_from}; train a model, or set model.checkpoint"
        )
    if path.name.endswith(".index.json"):
        file_of = read_index(path)
        return Safetensors(path.parent, file_of, read_headers(file_of.values()), is_copied=whole, extra_files=(path,))
    if path.name.endswith(".safetensors"):
        headers = read_headers([path])
        return Safetensors(path.parent, dict.fromkeys(headers[path].entries, path), headers, is_copied=whole)
    if path.name.endswith((".pt", ".pth")):
        return TorchFile(path)
    raise CheckpointError(f"checkpoint {path}: unknown format; known: {_SUFFIXES}")


def _open_folder(path: Location, names: Collection[str], wanted: Collection[str], whole: bool) -> TensorSource:
    if METADATA_FILE in names:
        # PyTorch's part of it takes 50 MB and a second, in every worker.
        from lowprec.models.checkpoints.distributed_folder import DistributedFolder

        return DistributedFolder(path, wanted, NESTING_KEYS, is_copied=whole)
    indexes = [name for name in names if name.endswith(".index.json")]
    if len(indexes) == 1:
        return open_tensors(path / indexes[0], whole=whole)
    files = [path / name for name in names if name.endswith(".safetensors")]
    if indexes or not files:
        found = f"{len(indexes)} index files" if indexes else "neither"
        raise CheckpointError(
            f"checkpoint {path}: a folder needs safetensors files (with one *.index.json at most) or the .metadata of "
            f"torch.distributed.checkpoint; found {found}"
        )
    headers = read_headers(files)
    file_of: dict[str, Location] = {}
    for file, header in headers.items():
        for name in header.entries:
            if name in file_of:
                raise CheckpointError(f'checkpoint {path}: "{name}" is in both {file_of[name].name} and {file.name}')
            file_of[name] = file
    return Safetensors(path, file_of, headers, is_copied=whole)
