"""Bytes that cross between workers for one example, as planned and as counted by the kernel.

The demo model on three Ray nodes of this machine, its tables shared so that no worker holds much more than a third: a
profile, and an exact evaluation of 8 plans that use every precision. Counted are the bytes on the loopback interface,
less what an idle cluster of the same size sends in the same time: requests, answers and all that frames them. Prints
one JSON object as its last line: `predicted_over_measured` of both together.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from sizes import sized

os.environ["RAY_AUTH_MODE"] = "disabled"
import ray
from demo_model import demo_config
from ray.cluster_utils import Cluster

from lowprec.evaluation.workers.ray import RayWorkers
from lowprec.plan import TABLE_PRECISIONS, Plan
from lowprec.search import open_job
from lowprec.shards.estimate import network_load
from lowprec.shards.planner import Placement, Shard, place_tables
from lowprec.storage import Location

NUM_WORKERS, REPEATS, IDLE_S = sized((3, 5, 10.0), (2, 1, 0.5))
# Of the bytes of all tables, at each worker.
SHARE = 0.36


def bytes_on_loopback() -> int:
    """Bytes that this machine has sent to itself."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[8])


def counted(work: Callable[[], object], idle_per_s: float) -> float:
    """Bytes that a piece of work sends."""
    before, began = bytes_on_loopback(), time.monotonic()
    work()
    return bytes_on_loopback() - before - idle_per_s * (time.monotonic() - began)


def with_cuts(placement: Placement) -> Placement:
    """The same, with the largest shared table cut into three: the demo has none that needs it."""
    largest = max(placement.shards, key=lambda shard: shard.num_rows)
    cuts = [largest.end_row * k // NUM_WORKERS for k in range(NUM_WORKERS + 1)]
    pieces = [Shard(largest.table, a, b, worker) for worker, (a, b) in enumerate(pairwise(cuts))]
    return replace(placement, shards=tuple(sorted({*placement.shards, *pieces} - {largest})))


def main() -> None:
    job = open_job(demo_config("evaluation.num_workers=0"))
    demand = job.demand()
    capacity = int(SHARE * sum(table.num_bytes for table in demand.tables))
    placement = with_cuts(place_tables(demand.tables, [capacity] * NUM_WORKERS))
    assert any(len(shards) > 1 for shards in placement.shards_of.values()), "no table is cut"
    window = job.window("search")
    plans = [Plan({u.name: TABLE_PRECISIONS[(k + n) % 5] for n, u in enumerate(job.units)}) for k in range(8)]
    predicted = network_load(placement, profile_precisions=demand.num_low, exact_precisions=len(TABLE_PRECISIONS))
    expected = {"profile": predicted.profile_bytes, "exact": predicted.exact_bytes}
    cluster = Cluster()
    try:
        for _ in range(NUM_WORKERS):
            cluster.add_node(num_cpus=1, include_dashboard=False)
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        workers = RayWorkers(job.spec, num_workers=NUM_WORKERS, address=None, placement=placement)
        assert len(set(workers.node_ids())) == NUM_WORKERS

        def profile() -> None:
            job.measure_profile(workers, "search", window, quarantine=Location.of("unused"))

        def exact() -> None:
            job.evaluate(workers, "search", window, plans, quarantine=Location.of("unused"))

        for work in (profile, exact):  # what is loaded and sent once
            work()
        idle = counted(lambda: time.sleep(IDLE_S), 0.0) / IDLE_S
        found: dict[str, list[float]] = {"profile": [], "exact": []}
        for _ in range(REPEATS):
            for name, work in (("profile", profile), ("exact", exact)):
                found[name].append(counted(work, idle) / window.num_rows)
            print({name: round(values[-1]) for name, values in found.items()}, flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()
    measured = {name: statistics.median(values) for name, values in found.items()}
    print(
        json.dumps(
            {
                "predicted_over_measured": round(sum(expected.values()) / sum(measured.values()), 3),
                "by_kind": {name: round(expected[name] / measured[name], 3) for name in measured},
                "range": {
                    name: [round(expected[name] / f(values), 3) for f in (max, min)] for name, values in found.items()
                },
                "bytes_per_example": {name: round(value) for name, value in measured.items()},
                "predicted": {name: round(value) for name, value in expected.items()},
                "idle_bytes_per_s": round(idle),
                "num_examples": window.num_rows,
                "num_workers": NUM_WORKERS,
                "replicated": len(placement.replicated),
                "num_shards": len(placement.shards),
                "repeats": REPEATS,
            }
        )
    )


if __name__ == "__main__":
    main()
