"""Where the tables of a job lie on a cluster, and what that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowprec.core.errors import ConfigError
from lowprec.core.sizes import bytes_text, bytes_text_above
from lowprec.evaluation.workers.loads import measure_loads, row_overhead
from lowprec.latency.calibration import Calibration
from lowprec.latency.calibration_file import read_calibration
from lowprec.models.adapter import ModelAdapter
from lowprec.plan import TABLE_PRECISIONS, Precision, RowRange
from lowprec.shards import hot_bytes
from lowprec.shards.estimate import WorkerNeeds, limits_of, network_load
from lowprec.shards.planner import Cuts, Placement, TableLoad, place_tables
from lowprec.shards.spec import read_tables_spec
from lowprec.traffic import TrafficWindow

__all__ = ["Demand", "Machines", "demand_of", "describe_placement", "place", "place_spec"]

# What workers do beside an fp32 lookup, in such lookups (of cold tables, `make bench NAME=kernels`).
_SCORES_OVER_LOOKUP, _LOW_OVER_LOOKUP = 1.6, 1.4
_LOW = tuple(p for p in TABLE_PRECISIONS if p is not Precision.FP32)


@dataclass(frozen=True)
class Machines:
    """Workers, alike, and the network between them."""

    num_workers: int
    worker_memory: int
    network_bytes_per_s: float
    calibration: Path | None = None


@dataclass(frozen=True)
class Demand:
    """What is asked of the cluster. num_examples: of the window, None where it is not known."""

    tables: tuple[TableLoad, ...]
    dense_bytes: int
    batch_size: int
    num_examples: float | None
    num_low: int


def demand_of(
    adapter: ModelAdapter, window: TrafficWindow, row_ranges: Mapping[str, RowRange], *, batch_size: int, num_low: int
) -> Demand:
    """What a job asks of a cluster, with lookups counted on a window. num_low: low precisions of its space."""
    tables = {id(parameter) for parameter in adapter.table_parameters}
    dense = [p for p in adapter.model.parameters() if id(p) not in tables]
    return Demand(
        tables=measure_loads(adapter, window, row_ranges),
        dense_bytes=sum(p.numel() * p.element_size() for p in dense),
        batch_size=batch_size,
        num_examples=window.num_rows,
        num_low=num_low,
    )


def place_spec(path: Path, machines: Machines, *, row_range: RowRange = RowRange.MSE) -> dict[str, Any]:
    """The placement of tables that were only written down."""
    spec = read_tables_spec(path, row_overhead=row_overhead(row_range))
    return describe_placement(
        Demand(spec.tables, spec.dense_bytes, spec.batch_size, spec.num_examples, len(_LOW)), machines
    )


def place(
    demand: Demand, num_workers: int, worker_memory: int, cuts: Cuts | None = None
) -> tuple[WorkerNeeds, Placement]:
    """What each worker needs for itself, and which rows it holds in the rest of its memory.

    cuts: where tables are cut, if that is decided. Raises `ConfigError` where the tables do not fit.
    """
    needs = _needs(demand, worker_memory)
    own_bytes, enough = _enough(demand, num_workers)
    if needs.total >= worker_memory:
        raise ConfigError(
            f"workers of {bytes_text(worker_memory)} have no room for tables: they need {bytes_text(needs.total)} for "
            f"themselves ({bytes_text(needs.process)} process, {bytes_text(needs.dense)} dense part, "
            f"{bytes_text(needs.batch)} batches of {demand.batch_size}, {bytes_text(needs.caches)} caches); give each "
            f"{bytes_text_above(enough)} ({bytes_text(own_bytes)} of it for itself), or lower traffic.batch_size"
        )
    capacities = [worker_memory - needs.total] * num_workers
    return needs, place_tables(demand.tables, capacities, cuts, own_bytes=max(own_bytes, needs.total))


def _enough(demand: Demand, num_workers: int) -> tuple[int, int]:
    """What each worker needs for itself and in all where they share the tables; what it keeps grows with its memory."""
    share = -(-sum(table.num_bytes for table in demand.tables) // num_workers)
    # What is left beside the last row of a worker's may be less than a row.
    share += max((table.row_bytes for table in demand.tables), default=0)
    own_bytes = 0
    for _ in range(8):  # each comes closer by a factor of 50
        own_bytes = _needs(demand, share + own_bytes).total
    return own_bytes, share + own_bytes


def _needs(demand: Demand, worker_memory: int) -> WorkerNeeds:
    return WorkerNeeds.of(
        worker_memory,
        dense_bytes=demand.dense_bytes,
        hot_bytes=hot_bytes({table.name: (table.num_rows, table.dim) for table in demand.tables}),
        batch_size=demand.batch_size,
        ids=sum(table.ids for table in demand.tables),
        values=sum(table.bags * table.dim for table in demand.tables),
        precisions=demand.num_low + 1,
    )


def describe_placement(demand: Demand, machines: Machines) -> dict[str, Any]:
    """Shards, memory, network, time and limits. Raises `ConfigError` where the tables do not fit."""
    needs, placement = place(demand, machines.num_workers, machines.worker_memory)
    network = network_load(placement, profile_precisions=demand.num_low, exact_precisions=demand.num_low + 1)
    calibration = read_calibration(machines.calibration) if machines.calibration else None
    lookup_ns = _lookup_ns(placement, calibration) if calibration else None
    limits = limits_of(
        placement,
        [needs] * machines.num_workers,
        network,
        lookup_ns=lookup_ns.__getitem__ if lookup_ns else None,
        network_bytes_per_s=machines.network_bytes_per_s,
    )
    return {
        "num_workers": machines.num_workers,
        "worker_memory": machines.worker_memory,
        "table_bytes": sum(table.num_rows * table.dim * 4 for table in demand.tables),
        "needs": {**vars(needs), "total": needs.total},
        "replicated": list(placement.replicated),
        "shards": [vars(shard) for shard in placement.shards],
        "workers": [
            {"held_bytes": held, "memory": held + needs.total, "ids_per_example": ids}
            for held, ids in zip(placement.held_bytes, placement.lookups, strict=True)
        ],
        "network": {
            "profile_bytes_per_example": network.profile_bytes,
            "exact_bytes_per_example": network.exact_bytes,
            "bytes_per_s": machines.network_bytes_per_s,
        },
        "time": _times(demand, machines, lookup_ns, network.profile_bytes, network.exact_bytes),
        "limits": [vars(limit) for limit in limits],
    }


def _lookup_ns(placement: Placement, calibration: Calibration) -> list[float]:
    """Nanoseconds of fp32 lookups of each worker for one example of each, on one thread."""

    def of_table(table: TableLoad) -> float:
        length = table.ids / table.bags if table.bags else 0.0
        return table.bags * calibration.ns_per_bag(Precision.FP32, table.dim, table.num_rows, length)

    copies = sum(of_table(placement.table[name]) for name in placement.replicated)
    found = [copies] * placement.num_workers
    for shard in placement.shards:
        table = placement.table[shard.table]
        found[shard.worker] += placement.num_workers * of_table(table) * table.share(shard.first_row, shard.end_row)
    return found


def _times(
    demand: Demand, machines: Machines, lookup_ns: Sequence[float] | None, profile_bytes: float, exact_bytes: float
) -> dict[str, float] | None:
    """Seconds of lookups and of sending for the window; None where lookups were not calibrated."""
    if lookup_ns is None or demand.num_examples is None:
        return None
    reads = demand.num_examples / machines.num_workers * max(lookup_ns) / 1e9
    sent = demand.num_examples / machines.num_workers * 2 / machines.network_bytes_per_s
    return {
        "num_examples": demand.num_examples,
        "profile_lookup_s": reads * (1 + _SCORES_OVER_LOOKUP),
        "exact_lookup_s": reads * (1 + demand.num_low * _LOW_OVER_LOOKUP),
        "profile_network_s": sent * profile_bytes,
        "exact_network_s": sent * exact_bytes,
    }
