"""A table, or a range of its rows, in this process: pooled lookups at any precision from its fp32 rows alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from threading import RLock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowprec import ops
from lowprec.core.errors import WeightError
from lowprec.ops.bags import BagCall
from lowprec.plan import Precision, RowRange

__all__ = ["TableShard", "hot_bytes", "hot_tables"]

Floats = NDArray[np.float32]

_HOT_TABLE_BYTES = 512 << 10
_KEPT_CHANGES_BYTES = 64 << 20


def hot_tables(shapes: Mapping[str, tuple[int, int]]) -> frozenset[str]:
    """The tables so small that they stay in a cache of the CPU: the changes of their rows are worth keeping.

    shapes: (num_rows, dim) of each table. Those of at most 512 KiB, the smallest first, until what is kept reaches
    64 MiB. It depends on the model alone, so that every worker chooses the same ones and adds up the same numbers.
    """
    small = [(4 * num_rows * dim, name) for name, (num_rows, dim) in shapes.items()]
    chosen, left = set(), _KEPT_CHANGES_BYTES
    for num_bytes, name in sorted(small):
        left -= ops.RowChanges.bytes_for(*shapes[name])
        if num_bytes > _HOT_TABLE_BYTES or left < 0:
            break
        chosen.add(name)
    return frozenset(chosen)


def hot_bytes(shapes: Mapping[str, tuple[int, int]]) -> int:
    """What is kept of them."""
    return sum(ops.RowChanges.bytes_for(*shapes[name]) for name in hot_tables(shapes))


class TableShard:
    """Some fp32 rows of a table. Low-precision values are made from them in every lookup and never kept.

    Only the scale and bias of `mse` ranges, which cost far more to find than to use, are kept for rows that traffic has
    touched: 4 bytes a row and precision. A hot table (`hot_tables`) also keeps the changes of its rows for its scores.
    """

    def __init__(
        self,
        name: str,
        weight: Tensor,
        *,
        row_range: RowRange = RowRange.MINMAX,
        is_hot: bool = False,
        first_row: int = 0,
    ) -> None:
        """Take `weight` float32[num_rows, dim] without a copy (it may be a mapped file).

        first_row: where these rows stand in the whole table, for errors; ids count from it.
        """
        self.name = name
        self.first_row = first_row
        self._rows: Floats = weight.detach().numpy()
        self._row_range = row_range
        self._kept_ranges: dict[Precision, NDArray[np.uint16]] = {}
        # Threads of a worker share its shards, and what is kept must not be read while it is half written.
        self._keeping = RLock()
        self._is_hot = is_hot
        self._changes: tuple[frozenset[Precision], ops.RowChanges] | None = None

    @property
    def dim(self) -> int:
        """Values in a row."""
        return int(self._rows.shape[1])

    def fp32(self, call: BagCall) -> Tensor:
        """What the model's own lookup returns, float32[B, dim]."""
        with torch.inference_mode():
            return torch.nn.functional.embedding_bag(
                call.indices,
                torch.from_numpy(self._rows),
                call.offsets,
                mode=call.mode,
                per_sample_weights=call.weights,
                include_last_offset=True,
            )

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

        gradient: float32[B, dim]. No pooled vector is made. From a hot table a change of a value is exact to 16 bits of
        the largest one in its row. Raises `WeightError` as `pooled` does.
        """
        if not precisions:
            return {}
        bags = _Bags(call)
        g, threads = gradient.contiguous().numpy(), torch.get_num_threads()
        if self._is_hot:
            found = self._row_changes(precisions).scores(
                precisions, bags.ids, bags.offsets, g, mode=call.mode, weights=bags.weights, num_threads=threads
            )
        else:
            found = ops.scores(
                self._rows,
                precisions,
                bags.ids,
                bags.offsets,
                g,
                mode=call.mode,
                weights=bags.weights,
                ranges={p: ranges for p in precisions if (ranges := self._ranges(bags.ids, p)) is not None},
                num_threads=threads,
            )
        for precision, score in found.items():
            self._check(score, bags.ids, precision)
        return found

    def check_finite(self, call: BagCall) -> None:
        """Raise `WeightError` naming the first row of the call that holds NaN or Inf."""
        rows = np.unique(call.indices.numpy())
        wrong = ~np.isfinite(self._rows[rows]).all(axis=1)
        if wrong.any():
            raise self._named(ops.not_finite(self._rows, int(rows[np.argmax(wrong)]), first_row=self.first_row))

    def _row_changes(self, precisions: Collection[Precision]) -> ops.RowChanges:
        """Those of all rows, right at `precisions` at least."""
        with self._keeping:
            known = self._changes
            if known is None or not known[0].issuperset(precisions):
                wanted = frozenset(precisions).union(known[0] if known else ())
                # A row that holds NaN or Inf has no range, and shows when it is touched.
                finite = np.flatnonzero(np.isfinite(self._rows).all(axis=1))
                ranges = {p: self._kept_ranges[p] for p in wanted if self._ranges(finite, p) is not None}
                self._changes = known = (
                    wanted,
                    ops.RowChanges(self._rows, ranges=ranges, num_threads=torch.get_num_threads()),
                )
            return known[1]

    def _ranges(self, ids: NDArray[np.int64], precision: Precision) -> NDArray[np.uint16] | None:
        """uint16[num_ids, 2], or None where the kernels make them on the way."""
        if self._row_range is RowRange.MINMAX or not precision.is_rowwise:
            return None
        with self._keeping:
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
                        self._rows,
                        precision,
                        self._row_range,
                        ids=new,
                        num_threads=torch.get_num_threads(),
                        first_row=self.first_row,
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
            stored = ops.quantize(
                self._rows, precision, row_range=self._row_range, ids=touched, first_row=self.first_row
            )
        except WeightError as error:
            raise self._named(error) from None
        overflowed = ops.first_overflow(stored, precision)
        if overflowed >= 0:
            raise self._named(ops.overflow(self._rows, int(touched[overflowed]), precision, first_row=self.first_row))
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
