"""One table in this process, answering pooled lookups at any precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowprec import ops
from lowprec.errors import WeightError
from lowprec.ops.bags import BagCall
from lowprec.plan import Precision

__all__ = ["TableShard"]

Floats = NDArray[np.float32]


class TableShard:
    """The fp32 rows of a table, and low-precision copies of those rows only that traffic has touched.

    A touched row gets a slot once; its quantized forms are kept slot by slot for every precision that was asked for.
    `cache_bytes` bounds them: when they would grow beyond, all slots are given up and those of the batch at hand are
    made anew. Results do not depend on it. A further 4 bytes for each row of the table map rows to slots.
    """

    def __init__(self, name: str, weight: Tensor, *, cache_bytes: int) -> None:
        """Take `weight` float32[num_rows, dim] without a copy (it may be a mapped file)."""
        self.name = name
        self._rows: NDArray[np.float32] = weight.detach().numpy()
        self._slot_of_row = np.full(len(self._rows), -1, dtype=np.int32)
        self._row_of_slot = np.empty(0, dtype=np.int64)
        self._num_slots = 0
        self._quantized: dict[Precision, NDArray[np.uint8]] = {}
        self._cache_bytes = cache_bytes

    @property
    def dim(self) -> int:
        """Values in a row."""
        return int(self._rows.shape[1])

    @property
    def cached_bytes(self) -> int:
        """Bytes of low-precision rows held now."""
        return sum(store.nbytes for store in self._quantized.values())

    def pooled(self, call: BagCall, precisions: Sequence[Precision]) -> dict[Precision, Tensor]:
        """What `call` returns, float32[B, dim], when this table has each of `precisions`; fp32 is what it did return.

        Raises `WeightError` for a touched row that has no low-precision form.
        """
        outputs: dict[Precision, Tensor] = {p: call.output for p in precisions if p == Precision.FP32}
        low: list[Precision] = [p for p in precisions if p != Precision.FP32]
        if not low:
            return outputs
        slots = torch.from_numpy(self._slots(call.indices.numpy(), low))
        for precision in low:
            outputs[precision] = ops.pooled_lookup(
                self._quantized[precision],
                precision,
                self.dim,
                slots,
                call.offsets,
                mode=call.mode,
                weights=call.weights,
            )
        return outputs

    def dots(self, call: BagCall, precisions: Sequence[Precision], gradient: Tensor) -> dict[Precision, Floats]:
        """`gradient[b] . pooled[b]`, float32[B], of what `pooled` returns for each of `precisions`, none of them fp32.

        gradient: float32[B, dim]. No pooled vector is made. Raises `WeightError` as `pooled` does.
        """
        low = list(precisions)
        if not low:
            return {}
        slots = self._slots(call.indices.numpy(), low)
        offsets, gradients = call.offsets.contiguous().numpy(), gradient.contiguous().numpy()
        weights = None if call.weights is None else call.weights.detach().contiguous().numpy()
        return {
            precision: ops.pooled_dots(
                self._quantized[precision], precision, slots, offsets, gradients, mode=call.mode, weights=weights
            )
            for precision in low
        }

    def check_finite(self, call: BagCall) -> None:
        """Raise `WeightError` naming the first row of the call that holds NaN or Inf."""
        rows = np.unique(call.indices.numpy())
        wrong = ~np.isfinite(self._rows[rows]).all(axis=1)
        if wrong.any():
            row = int(rows[np.argmax(wrong)])
            column = int(np.argmax(~np.isfinite(self._rows[row])))
            value = self._rows[row, column]
            raise WeightError(f'"{self.name}": row {row}, column {column} is {value}; repair the checkpoint')

    def _slots(self, ids: NDArray[np.int64], precisions: list[Precision]) -> NDArray[np.int64]:
        """The slot of every id, after making those that are missing."""
        self._add_precisions([p for p in precisions if p not in self._quantized])
        slots = self._slot_of_row[ids]
        missing = slots < 0
        if missing.any():
            new = np.unique(ids[missing])
            if self._num_slots and (self._num_slots + len(new)) * self._slot_bytes > self._cache_bytes:
                self._give_up()
                new = np.unique(ids)
            self._add_rows(new)
            slots = self._slot_of_row[ids]
        return slots.astype(np.int64)

    @property
    def _slot_bytes(self) -> int:
        return self._row_of_slot.itemsize + sum(ops.row_bytes(self.dim, p) for p in self._quantized)

    def _give_up(self) -> None:
        self._slot_of_row[self._row_of_slot[: self._num_slots]] = -1
        self._row_of_slot = self._row_of_slot[:0].copy()
        self._num_slots = 0
        self._quantized = {p: store[:0].copy() for p, store in self._quantized.items()}

    def _add_precisions(self, new: list[Precision]) -> None:
        added_bytes = sum(ops.row_bytes(self.dim, p) for p in new)
        if len(self._row_of_slot) * (self._slot_bytes + added_bytes) > self._cache_bytes:
            self._give_up()
        for precision in new:
            store = np.zeros((len(self._row_of_slot), ops.row_bytes(self.dim, precision)), dtype=np.uint8)
            self._quantize(self._row_of_slot[: self._num_slots], precision, store[: self._num_slots])
            self._quantized[precision] = store

    def _add_rows(self, new: NDArray[np.int64]) -> None:
        first, end = self._num_slots, self._num_slots + len(new)
        if end > len(self._row_of_slot):
            self._grow(max(end, min(2 * end, self._cache_bytes // self._slot_bytes)))
        for precision, store in self._quantized.items():
            self._quantize(new, precision, store[first:end])
        self._row_of_slot[first:end] = new
        self._slot_of_row[new] = np.arange(first, end, dtype=np.int32)
        self._num_slots = end

    def _grow(self, capacity: int) -> None:
        """Room for `capacity` slots; doubling, so that adding rows batch by batch copies each of them about once."""
        capacity = min(capacity, len(self._rows))
        row_of_slot = np.empty(capacity, dtype=np.int64)
        row_of_slot[: self._num_slots] = self._row_of_slot[: self._num_slots]
        self._row_of_slot = row_of_slot
        for precision, store in self._quantized.items():
            grown = np.zeros((capacity, store.shape[1]), dtype=np.uint8)
            grown[: self._num_slots] = store[: self._num_slots]
            self._quantized[precision] = grown

    def _quantize(self, ids: NDArray[np.int64], precision: Precision, out: NDArray[np.uint8]) -> None:
        try:
            ops.quantize_gathered(self._rows, ids, precision, out=out)
        except WeightError as error:
            raise WeightError(f'"{self.name}": {error}; repair the checkpoint') from None
        overflowed = ops.first_overflow(out, precision)
        if overflowed >= 0:
            row = int(ids[overflowed])
            values = self._rows[row]
            raise WeightError(
                f'"{self.name}": row {row} spans {values.min():g} to {values.max():g}, which {precision} cannot '
                "hold (its fp16 parts overflow); repair the checkpoint, or leave this table more exact in space.units"
            )
