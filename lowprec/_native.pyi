"""Types of the compiled module; see kernels/bindings.cc and the headers beside it."""

import numpy as np
from numpy.typing import NDArray

SOURCE_DIGEST: str

def quantize_rows(rows: NDArray[np.float32], bits: int, out: NDArray[np.uint8], num_threads: int = 1) -> int: ...
def quantize_gathered(
    table: NDArray[np.float32], ids: NDArray[np.int64], bits: int, out: NDArray[np.uint8], num_threads: int = 1
) -> int: ...
def dequantize_rows(codes: NDArray[np.uint8], bits: int, out: NDArray[np.float32], num_threads: int = 1) -> None: ...
def pooled_dots(
    stored: NDArray[np.uint8],
    bits: int,
    ids: NDArray[np.int64],
    offsets: NDArray[np.int64],
    gradients: NDArray[np.float32],
    out: NDArray[np.float32],
    mean: bool,
    weights: NDArray[np.float32] | None = None,
) -> None: ...
