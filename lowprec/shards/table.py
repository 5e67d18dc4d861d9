"""One table in this process, answering pooled lookups at any precision from its fp32 rows alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowprec import ops
from lowprec.errors import WeightError
from lowprec.ops.bags import BagCall
from lowprec.plan import Precision, RowRange

__all__ = ["TableShard"]

Floats = NDArray[np.float32]


class TableShard:
    """The fp32 rows of a table. Low-precision values are made from them in every lookup and never kept.

    Only the scale and bias of `mse` ranges, which cost far more to find than to use, are kept for rows that traffic has
    touched: 4 bytes a row and precision.
    """

    def __init__(self, name: str, weight: Tensor, *, row_range: RowRange = RowRange.MINMAX) -> None:
        """Take `weight` float32[num_rows, dim] without a copy (it may be a mapped file)."""
        self.name = name
        self._rows: Floats = weight.detach().numpy()
        self._row_range = row_range
        self._kept_ranges: dict[Precision, NDArray[np.uint16]] = {}

    @property
    def dim(self) -> int:
        """Values in a row."""
        return int(self._rows.shape[1])

    def pooled(self, call: BagCall, precisions: Sequence[Precision]) -> dict[Precision, Tensor]:
        """What `call` returns, float32[B, dim], when this table has each of `precisions`; fp32 is what it did return.

        Raises `WeightError` for a touched row that has no low-precision form.
        """
        outputs: dict[Precision, Tensor] = {p: call.output for p in precisions if p == Precision.FP32}
        low = [p for p in precisions if p != Precision.FP32]
        if not low:
            return outputs
        bags = _Bags(call)
        for precision in low:
            pooled = ops.pooled_as(
                self._rows,
                precision,
                bags.ids,
                bags.offsets,
                mode=call.mode,
                weights=bags.weights,
                ranges=self._ranges(bags.ids, precision),
                num_threads=torch.get_num_threads(),
            )
            self._check(pooled, bags.ids, precision)
            outputs[precision] = torch.from_numpy(pooled)
        return outputs

    def scores(self, call: BagCall, precisions: Sequence[Precision], gradient: Tensor) -> dict[Precision, Floats]:
        """`gradient[b] . (pooled[b] - call.output[b])`, float32[B], with `pooled` at each of `precisions`, none fp32.

        gradient: float32[B, dim]. No pooled vector is made. Raises `WeightError` as `pooled` does.
        """
        if not precisions:
            return {}
        bags = _Bags(call)
        given = {p: ranges for p in precisions if (ranges := self._ranges(bags.ids, p)) is not None}
        found = ops.scores(
            self._rows,
            precisions,
            bags.ids,
            bags.offsets,
            gradient.contiguous().numpy(),
            mode=call.mode,
            weights=bags.weights,
            ranges=given,
            num_threads=torch.get_num_threads(),
        )
        for precision, score in found.items():
            self._check(score, bags.ids, precision)
        return found

    def check_finite(self, call: BagCall) -> None:
        """Raise `WeightError` naming the first row of the call that holds NaN or Inf."""
        rows = np.unique(call.indices.numpy())
        wrong = ~np.isfinite(self._rows[rows]).all(axis=1)
        if wrong.any():
            raise self._named(ops.not_finite(self._rows, int(rows[np.argmax(wrong)])))

    def _ranges(self, ids: NDArray[np.int64], precision: Precision) -> NDArray[np.uint16] | None:
        """uint16[num_ids, 2], or None where the kernels make them on the way."""
        if self._row_range is RowRange.MINMAX or not precision.is_rowwise:
            return None
        kept = self._kept_ranges.get(precision)
        if kept is None:
            # Zero pages, which take no memory until they are written to. No range has scale 0.
            kept = self._kept_ranges[precision] = np.zeros((len(self._rows), 2), dtype=np.uint16)
        found: NDArray[np.uint16] = kept[ids]
        missing = found[:, 0] == 0
        if missing.any():
            new = np.unique(ids[missing])
            try:
                kept[new] = ops.row_ranges(
                    self._rows, precision, self._row_range, ids=new, num_threads=torch.get_num_threads()
                )
            except WeightError as error:
                raise self._named(error) from None
            found = kept[ids]
        return found

    def _check(self, values: Floats, ids: NDArray[np.int64], precision: Precision) -> None:
        """Find the row that made a value infinite or NaN."""
        if np.isfinite(values).all():
            return
        touched = np.unique(ids)
        try:
            stored = ops.quantize(self._rows, precision, row_range=self._row_range, ids=touched)
        except WeightError as error:
            raise self._named(error) from None
        overflowed = ops.first_overflow(stored, precision)
        if overflowed >= 0:
            raise self._named(ops.overflow(self._rows, int(touched[overflowed]), precision))
        raise WeightError(
            f'"{self.name}": rows are finite at {precision}, but their sums are not: weights of ids, gradients or long '
            "bags overflow fp32; look at the traffic's weights and at the model"
        )

    def _named(self, error: WeightError) -> WeightError:
        return WeightError(f'"{self.name}": {error}')


class _Bags:
    """The ids of a call as the kernels take them: contiguous NumPy arrays, as they are where they already are."""

    def __init__(self, call: BagCall) -> None:
        self.ids = np.ascontiguousarray(call.indices.numpy())
        self.offsets = np.ascontiguousarray(call.offsets.numpy())
        self.weights = None if call.weights is None else np.ascontiguousarray(call.weights.detach().numpy())
