"""`TensorSource`, the interface of all checkpoint formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from lowprec.storage import FileState, Location

__all__ = ["METADATA_FILE", "TensorSource"]

# What makes a folder one of torch.distributed.checkpoint.
METADATA_FILE = ".metadata"


class TensorSource(Protocol):
    """Named tensors of a checkpoint. `files` are the files that hold them, all below `root`.

    is_mapped: tensors and rows are mapped from files of this machine, which commits no memory. states: how those of the
    files were when they were opened that tell this checkpoint from one that is saved in its place.
    """

    is_mapped: bool
    root: Location
    files: tuple[Location, ...]
    states: Mapping[Location, FileState]
    shapes: Mapping[str, tuple[int, ...]]

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, memory-mapped where the format allows it (then writes stay private to the process)."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, without reading the others."""
