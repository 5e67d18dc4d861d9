"""Types of the compiled module; see kernels/bindings.cc and kernels/kernels.h."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
Ranges = NDArray[np.uint16]

SOURCE_DIGEST: str

def cpu_paths() -> list[str]: ...
def cpu_path() -> str: ...
def use_cpu_path(name: str) -> None: ...
def quantize(
    table: Floats, ids: Ids | None, bits: int, range: str, out: NDArray[np.uint8], num_threads: int = 1
) -> int: ...
def row_ranges(table: Floats, ids: Ids | None, bits: int, range: str, out: Ranges, num_threads: int = 1) -> int: ...
def dequantize(stored: NDArray[np.uint8], bits: int, out: Floats, num_threads: int = 1) -> None: ...
def pooled(
    table: Floats,
    bits: int,
    ids: Ids,
    offsets: Ids,
    out: Floats,
    mean: bool,
    weights: Floats | None = None,
    ranges: Ranges | None = None,
    num_threads: int = 1,
) -> None: ...
def scores(
    table: Floats,
    ids: Ids,
    offsets: Ids,
    gradients: Floats,
    out: Sequence[Floats | None],
    mean: bool,
    weights: Floats | None,
    ranges: Sequence[Ranges | None],
    num_threads: int = 1,
) -> None: ...
def row_changes(
    table: Floats,
    ranges: Sequence[Ranges | None],
    words: NDArray[np.int32],
    steps: Floats,
    num_threads: int = 1,
) -> None: ...
def scores_of_changes(
    words: NDArray[np.int32],
    steps: Floats,
    ids: Ids,
    offsets: Ids,
    gradients: Floats,
    out: Sequence[Floats | None],
    mean: bool,
    weights: Floats | None = None,
    num_threads: int = 1,
) -> None: ...
