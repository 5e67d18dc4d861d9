"""One profile and 32 exact plans on 1 and on 2 workers, and with tables shared between them.

The demo model on a search window of 250,000 examples, workers warm, one thread each. On two Ray nodes of this machine:
1 worker with all tables, 2 workers with all tables, and 2 workers of which each holds half of the bytes and asks the
other for the rest. All three give the same profile and the same metrics (asserted to the bit before anything is timed).
Timed in turn, round by round. Prints one JSON object as its last line: `speedup` (1 worker / 2 workers),
`sharded_over_local` (2 workers with shared tables / with all tables: what it costs to ask), `machine_limit` (what two
processes gain that have nothing to do with each other, nor with Ray: each does all of the work, alone and then both at
once; cores of one machine share caches, memory and their host), medians over rounds.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import time

from sizes import sized

os.environ["RAY_AUTH_MODE"] = "disabled"
import numpy as np
import ray
import torch
from demo_model import large_demo_config
from ray.cluster_utils import Cluster

from lowprec.evaluation.workers.memory import keep_freed
from lowprec.evaluation.workers.ray import RayWorkers
from lowprec.evaluation.workers.worker import LocalWorkers, Workers
from lowprec.plan import TABLE_PRECISIONS, Plan
from lowprec.search import SearchJob, open_job
from lowprec.shards.planner import place_tables
from lowprec.storage import Location

NUM_PLANS, REPEATS = sized((32, 5), (4, 1))


def the_job() -> SearchJob:
    return open_job(large_demo_config())


def work(job: SearchJob, workers: Workers) -> tuple[float, float, tuple[bytes, bytes]]:
    """Seconds of the profile and of the plans, and what came out."""
    rng = np.random.default_rng(0)
    plans = [
        Plan({u.name: TABLE_PRECISIONS[k] for u, k in zip(job.units, rng.integers(0, 5, len(job.units)), strict=True)})
        for _ in range(NUM_PLANS)
    ]
    window = job.window("search")
    began = time.perf_counter()
    profile = job.measure_profile(workers, "search", window, quarantine=Location.of("unused")).profile
    middle = time.perf_counter()
    evaluation = job.evaluate(workers, "search", window, plans, quarantine=Location.of("unused"))
    bits = profile.first.tobytes(), evaluation.sums.moments.tobytes()
    return middle - began, time.perf_counter() - middle, bits


def alone() -> None:
    """A process by itself: does the work for every line that it is given, and says how long it took."""
    torch.set_num_threads(1)
    keep_freed()  # as workers do
    job = the_job()
    workers = LocalWorkers(job.spec, job.adapter)
    for _ in sys.stdin:
        print(sum(work(job, workers)[:2]), flush=True)


def seconds_of(processes: list[subprocess.Popen[str]]) -> float:
    """The longest of processes that begin at once."""
    ends = [(p.stdin, p.stdout) for p in processes]
    for stdin, _ in ends:
        assert stdin is not None
        stdin.write("go\n")
        stdin.flush()
    return max(float(stdout.readline()) for _, stdout in ends if stdout is not None)


def main() -> None:
    job = the_job()
    demand = job.demand()
    # Room for half of the bytes: nothing is held by both.
    placement = place_tables(demand.tables, [int(0.51 * sum(table.num_bytes for table in demand.tables))] * 2)
    pair = [
        subprocess.Popen([sys.executable, __file__, "alone"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    cluster = Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=3, include_dashboard=False)
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        sides = {
            "one": RayWorkers(job.spec, num_workers=1, address=None),
            "two": RayWorkers(job.spec, num_workers=2, address=None),
            "sharded": RayWorkers(job.spec, num_workers=2, address=None, placement=placement),
        }
        assert len(set(sides["sharded"].node_ids())) == 2, "rows of the other worker would be mapped"
        found = {name: work(job, workers)[2] for name, workers in sides.items()}
        assert len(set(found.values())) == 1, "the same work must give the same bits, wherever tables are"
        seconds_of(pair)
        rounds, limits = [], []
        for _ in range(REPEATS):
            rounds.append({name: work(job, workers)[:2] for name, workers in sides.items()})
            limits.append(2 * seconds_of(pair[:1]) / seconds_of(pair))
            said = {name: [round(s, 2) for s in seconds] for name, seconds in rounds[-1].items()}
            print(said, round(limits[-1], 2), flush=True)
    finally:
        for process in pair:
            process.kill()
        ray.shutdown()
        cluster.shutdown()

    def ratios(top: str, bottom: str) -> list[float]:
        return [sum(r[top]) / sum(r[bottom]) for r in rounds]

    def spread(values: list[float]) -> list[float]:
        return [round(min(values), 3), round(max(values), 3)]

    speedups, overheads = ratios("one", "two"), ratios("sharded", "two")
    print(
        json.dumps(
            {
                "speedup": round(statistics.median(speedups), 3),
                "speedup_range": spread(speedups),
                "machine_limit": round(statistics.median(limits), 3),
                "machine_limit_range": spread(limits),
                "sharded_over_local": round(statistics.median(overheads), 3),
                "sharded_over_local_range": spread(overheads),
                "profile_sharded_over_local": round(
                    statistics.median(r["sharded"][0] / r["two"][0] for r in rounds), 3
                ),
                "exact_sharded_over_local": round(statistics.median(r["sharded"][1] / r["two"][1] for r in rounds), 3),
                "seconds": {name: round(statistics.median(sum(r[name]) for r in rounds), 2) for name in rounds[0]},
                "num_examples": job.window("search").num_rows,
                "num_plans": NUM_PLANS,
                "num_cores": os.cpu_count(),
                "repeats": REPEATS,
            }
        )
    )


if __name__ == "__main__":
    alone() if sys.argv[1:] == ["alone"] else main()
