"""How traffic uses tables: which rows, how often; counted on a sample of a window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lowprec.models.adapter import ModelAdapter, inputs_of
from lowprec.plan import RowRange
from lowprec.shards.planner import TableLoad
from lowprec.traffic import TrafficWindow

__all__ = ["RANGE_BYTES", "measure_loads", "row_overhead"]

SAMPLED_EXAMPLES = 65_536
# Equal ranges of rows in which lookups are counted.
NUM_RANGES = 1024
# Scale and bias of a row, for each of three precisions, where they are searched and kept.
RANGE_BYTES = 12


@dataclass
class _Count:
    ids: int = 0
    bags: int = 0
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


def row_overhead(row_range: RowRange) -> int:
    """Bytes that a worker keeps for a row that traffic touches, beside its values."""
    return RANGE_BYTES if row_range is RowRange.MSE else 0


def measure_loads(
    adapter: ModelAdapter, window: TrafficWindow, row_ranges: Mapping[str, RowRange]
) -> tuple[TableLoad, ...]:
    """The load of every table, from batches spread over the window, in the order of units."""
    units = {unit.name: unit for unit in adapter.units}
    counts = {name: _Count(rows=np.zeros(min(NUM_RANGES, u.num_rows), np.int64)) for name, u in units.items()}
    num_examples = 0
    for k in _spread(window):
        batch = window.batch(k)
        if batch.num_rows == 0:
            continue
        num_examples += batch.num_rows
        inputs = inputs_of(batch)
        for call in adapter.reference(inputs).calls if adapter.has_rows else adapter.trace_lookups(inputs):
            count, num_rows = counts[call.table], units[call.table].num_rows
            count.ids += len(call.indices)
            count.bags += len(call.offsets) - 1
            ranges = call.indices.numpy() * len(count.rows) // num_rows
            count.rows += np.bincount(ranges, minlength=len(count.rows))
    found = []
    for name, unit in units.items():
        count = counts[name]
        lookups = tuple((count.rows / count.ids).tolist()) if count.ids else ()
        found.append(
            TableLoad(
                name,
                unit.num_rows,
                unit.dim,
                ids=count.ids / max(num_examples, 1),
                bags=count.bags / max(num_examples, 1),
                lookups=lookups,
                row_overhead=row_overhead(row_ranges.get(name, RowRange.MINMAX)),
            )
        )
    return tuple(found)


def _spread(window: TrafficWindow) -> list[int]:
    """Batches that hold about as many examples as are sampled, at equal distances."""
    average = max(1, window.num_rows // window.num_batches)
    wanted = min(window.num_batches, -(-SAMPLED_EXAMPLES // average))
    return sorted({k * window.num_batches // wanted for k in range(wanted)})
