"""Quantization errors of the rows of a small table, and scores from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lowprec.core.errors import TrafficError
from lowprec.ops.fbgemm import Pooling
from lowprec.ops.native import kernels
from lowprec.ops.pooled import SCORED, Floats, Ids, Ranges, check_bags, check_gradients, score_outputs
from lowprec.ops.rows import check_matrix
from lowprec.plan import Precision

__all__ = ["RowChanges"]

_LANES, _LINE = 16, 64


class RowChanges:
    """Restored less fp32, for every row and each precision of `SCORED`, in 16 bits a value: 8 bytes for all four.

    Scores from it cost a fraction of those from fp32 rows, where rows come back and stay in the caches of the CPU. A
    change is kept to half a step, 1 / 65,534 of the largest one of its row; `lowprec.ops.reference` defines the bits.
    """

    def __init__(
        self, table: Floats, *, ranges: Mapping[Precision, Ranges] | None = None, num_threads: int = 1
    ) -> None:
        """Find the changes of float32[num_rows, dim], which is not looked at again.

        ranges: uint16[num_rows, 2] for each precision that is not minmax, as `row_ranges` gives them. A row that holds
        NaN or Inf, or overflows fp16, makes the scores of its bags NaN. Raises `TypeError` for arrays of another form.
        """
        check_matrix(table, np.float32, "rows")
        self.num_rows, self.dim = table.shape
        self._words = _aligned_words(self.num_rows, self.dim)
        self._steps = np.empty((self.num_rows, len(SCORED)), np.float32)
        given = ranges or {}
        kernels().row_changes(table, [given.get(p) for p in SCORED[1:]], self._words, self._steps, num_threads)

    @property
    def num_bytes(self) -> int:
        """What they take in memory."""
        return self._words.nbytes + self._steps.nbytes

    @staticmethod
    def bytes_for(num_rows: int, dim: int) -> int:
        """What those of float32[num_rows, dim] take in memory."""
        return num_rows * (_words_of(dim) + len(SCORED)) * 4

    def scores(
        self,
        precisions: Sequence[Precision],
        ids: Ids,
        offsets: Ids,
        gradients: Floats,
        *,
        mode: Pooling,
        weights: Floats | None = None,
        num_threads: int = 1,
    ) -> dict[Precision, Floats]:
        """As `lowprec.ops.scores`, with changes in place of rows. Raises what it raises."""
        check_bags(ids, offsets, weights, mode)
        check_gradients(gradients, len(offsets) - 1, self.dim)
        found, outputs = score_outputs(precisions, len(gradients))
        try:
            kernels().scores_of_changes(
                self._words, self._steps, ids, offsets, gradients, outputs, mode == "mean", weights, num_threads
            )
        except (IndexError, ValueError) as error:
            raise TrafficError(str(error)) from None
        return found


def _words_of(dim: int) -> int:
    return -(-dim // _LANES) * _LANES * 2


def _aligned_words(num_rows: int, dim: int) -> NDArray[np.int32]:
    """int32[num_rows, words of dim] that begins with a line of the cache, so that no load crosses one."""
    num_bytes = num_rows * _words_of(dim) * 4
    memory = np.empty(num_bytes + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + num_bytes].view(np.int32).reshape(num_rows, -1 if num_rows else _words_of(dim))
