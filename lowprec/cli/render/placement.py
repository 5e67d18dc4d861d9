"""Prints the placement of tables on a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from lowprec.cli.console import stdout
from lowprec.core.sizes import bytes_text, counted

__all__ = ["render_placement"]

_MOST_LINES = 24


def render_placement(document: Mapping[str, Any]) -> None:
    """Shards, workers, network, time and limits."""
    shards, workers, needs = document["shards"], document["workers"], document["needs"]
    _render_shards(shards)
    table = Table("worker", "tables", "with its own needs", "of memory", "ids an example", title="workers")
    for number, worker in enumerate(workers[:_MOST_LINES]):
        table.add_row(
            str(number),
            bytes_text(worker["held_bytes"]),
            bytes_text(worker["memory"]),
            f"{worker['memory'] / document['worker_memory']:.0%}",
            f"{worker['ids_per_example']:.4g}",
        )
    stdout.print(table)
    if len(workers) > _MOST_LINES:
        stdout.print(f"and {len(workers) - _MOST_LINES} workers more (--json has all)")
    stdout.print(
        f"tables: {bytes_text(document['table_bytes'])} on {document['num_workers']} workers of "
        f"{bytes_text(document['worker_memory'])}; {counted(len(document['replicated']), 'table')} at every worker, "
        f"{counted(len({shard['table'] for shard in shards}), 'table')} in {counted(len(shards), 'shard')}"
    )
    stdout.print(
        f"a worker needs {bytes_text(needs['total'])} for itself: {bytes_text(needs['process'])} process, "
        f"{bytes_text(needs['dense'])} dense part, {bytes_text(needs['batch'])} batches, "
        f"{bytes_text(needs['caches'])} caches"
    )
    network = document["network"]
    stdout.print(
        f"network: {bytes_text(network['profile_bytes_per_example'])} an example for the profile, "
        f"{bytes_text(network['exact_bytes_per_example'])} for plans that use every precision"
    )
    _render_time(document["time"])
    first, *others = document["limits"]
    stdout.print(f"breaks first: {first['name']}: {first['says']}")
    for limit in others:
        stdout.print(f"        then: {limit['name']}: {limit['says']}")


def _render_shards(shards: list[Mapping[str, Any]]) -> None:
    if not shards:
        return
    table = Table("table", "rows", "worker", title="shards" if len(shards) <= _MOST_LINES else "largest shards")
    largest = sorted(shards, key=lambda shard: shard["first_row"] - shard["end_row"])[:_MOST_LINES]
    for shard in sorted(largest, key=lambda shard: (shard["table"], shard["first_row"])):
        table.add_row(shard["table"], f"{shard['first_row']:,} to {shard['end_row'] - 1:,}", str(shard["worker"]))
    stdout.print(table)
    if len(shards) > _MOST_LINES:
        stdout.print(f"and {len(shards) - _MOST_LINES} shards more (--json has all)")


def _render_time(time: Mapping[str, float] | None) -> None:
    if time is None:
        stdout.print("time: unknown; --calibration FILE, which `lowprec calibrate` writes, tells how long lookups take")
        return
    parts = [
        f"{name} {time[f'{kind}_lookup_s']:,.3g} s of lookups and {time[f'{kind}_network_s']:,.3g} s of sending"
        for kind, name in (("profile", "the profile"), ("exact", "plans with every precision"))
    ]
    stdout.print(f"time of {time['num_examples']:,.0f} examples, without the dense part: {'; '.join(parts)}")
