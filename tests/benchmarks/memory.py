"""A model with 8 GB of tables on four workers that may use 2.5 GB each: a profile and an exact evaluation of 32 plans.

Four Ray nodes on this machine, a worker on each, so that nobody maps the rows of another one. The caps are real: each
worker is in a memory cgroup of its own (version 1 or 2) from its birth, with the checkpoint's files dropped from the
page cache, so that the pages of tables count as the worker's that reads them. Without permission to make cgroups
there is no benchmark. Ids are uniform: nearly every page of every table is read. Prints one JSON object as its last
line: `completed` (1 where no worker was killed), the peak PSS of each worker and of the driver, and their sum.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from large_model import (
    DIM,
    GB,
    NUM_EXAMPLES,
    TABLE_BYTES,
    Peaks,
    drop_from_page_cache,
    make_config,
    rows_of_tables,
    write_model,
    write_traffic,
)

os.environ["RAY_AUTH_MODE"] = "disabled"
import ray
from ray.cluster_utils import Cluster

from lowprec.evaluation.workers.ray import RayWorkers
from lowprec.plan import TABLE_PRECISIONS, Plan
from lowprec.search.job import open_job
from lowprec.session import open_workers
from lowprec.storage import Location

NUM_WORKERS, WORKER_BYTES, NUM_PLANS = 4, 2_500_000_000, 32


class Caps:
    """A memory cgroup for each node, which the node's workers are moved to when they are born."""

    def __init__(self, raylets: list[int], num_bytes: int) -> None:
        root = Path("/sys/fs/cgroup")
        self._is_v2 = (root / "cgroup.controllers").exists()
        self._folders = []
        self.members: list[set[int]] = [set() for _ in raylets]
        for raylet in raylets:
            folder = (root if self._is_v2 else root / "memory") / f"lowprec-{os.getpid()}-{raylet}"
            folder.mkdir()
            (folder / ("memory.max" if self._is_v2 else "memory.limit_in_bytes")).write_text(str(num_bytes))
            self._folders.append(folder)
        self._raylets = raylets
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def peaks(self) -> list[int]:
        """The most that each of them used, as the kernel counted."""
        name = "memory.peak" if self._is_v2 else "memory.max_usage_in_bytes"
        return [int((folder / name).read_text()) for folder in self._folders]

    def reclaims(self) -> list[int]:
        """How often each of them ran into its cap, so that pages of files were dropped."""
        if self._is_v2:
            events = [
                dict(line.split() for line in (f / "memory.events").read_text().splitlines()) for f in self._folders
            ]
            return [int(e["max"]) for e in events]
        return [int((folder / "memory.failcnt").read_text()) for folder in self._folders]

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        for folder in self._folders:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _watch(self) -> None:
        while not self._is_over.wait(0.02):
            for raylet, folder, members in zip(self._raylets, self._folders, self.members, strict=True):
                with contextlib.suppress(OSError):
                    for pid in Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split():
                        # Agents of the node are children of the raylet too, and no workers.
                        is_worker = "default_worker" in (title := Path(f"/proc/{pid}/cmdline").read_text())
                        if int(pid) not in members and (is_worker or title.startswith("ray::")):
                            members.add(int(pid))
                            (folder / "cgroup.procs").write_text(pid)


def run(folder: Path, cap_bytes: int) -> dict[str, Any]:
    config = make_config(folder, num_workers=NUM_WORKERS, worker_memory=WORKER_BYTES, batches_per_task=2)
    write_traffic(folder / "traffic.parquet")
    write_model(config)
    job = open_job(config)
    assert job.placement is not None and not job.adapter.has_rows
    drop_from_page_cache(Path(config.model.checkpoint))
    cluster = Cluster()
    notes: list[str] = []
    nodes = [cluster.add_node(num_cpus=1, include_dashboard=False) for _ in range(NUM_WORKERS)]
    caps = Caps([node.all_processes["raylet"][0].process.pid for node in nodes], cap_bytes)
    try:
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        with open_workers(job, job.search_work(), notes.append) as workers:
            assert isinstance(workers, RayWorkers)
            pids = workers.process_ids()
            notes.clear()  # that they took a while to start
            assert len(set(workers.node_ids())) == NUM_WORKERS
            assert set(pids) <= set().union(*caps.members), "a worker is not capped"
            peaks = Peaks([*pids, os.getpid()])
            times = {}
            began = time.monotonic()
            window = job.window("search")
            profile = job.measure_profile(workers, "search", window, quarantine=Location.of(folder)).profile
            times["profile_s"] = time.monotonic() - began
            assert profile.num_rows == NUM_EXAMPLES // 2
            rng = np.random.default_rng(0)
            plans = [
                Plan(
                    {
                        u.name: TABLE_PRECISIONS[k]
                        for u, k in zip(job.units, rng.integers(0, 5, len(job.units)), strict=True)
                    }
                )
                for _ in range(NUM_PLANS)
            ]
            began = time.monotonic()
            evaluation = job.evaluate(workers, "confirm", job.window("confirm"), plans, quarantine=Location.of(folder))
            times["exact_s"] = time.monotonic() - began
            assert len(evaluation.metrics) == NUM_PLANS and evaluation.rows.num_bad == 0
            peaks.close()
            completed = int(workers.process_ids() == pids and not notes)
            driver = peaks.found["Pss"].pop(os.getpid())
            per_worker = [round(value / GB, 3) for value in peaks.found["Pss"].values()]
            return {
                "completed": completed,
                "table_gb": round(sum(rows_of_tables()) * DIM * 4 / GB, 3),
                "cap_gb": cap_bytes / GB,
                "peak_pss_gb": per_worker,
                "peak_pss_without_files_gb": [round(peaks.found["Pss_Anon"][pid] / GB, 3) for pid in pids],
                "sum_of_peaks_gb": round(sum(per_worker), 3),
                "within": int(sum(per_worker) <= TABLE_BYTES / GB + 3.0),
                "peak_cgroup_gb": [round(value / GB, 3) for value in caps.peaks()],
                "times_at_cap": caps.reclaims(),
                "driver_peak_pss_gb": round(driver / GB, 3),
                "planned_gb": [
                    round((held + WORKER_BYTES - capacity) / GB, 3)
                    for held, capacity in zip(job.placement.held_bytes, job.placement.capacities, strict=True)
                ],
                "num_examples": NUM_EXAMPLES,
                "notes": notes,
                **{name: round(value, 1) for name, value in times.items()},
            }
    finally:
        ray.shutdown()
        cluster.shutdown()
        caps.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(Path(folder), int(sys.argv[1]) if len(sys.argv) > 1 else WORKER_BYTES)))


if __name__ == "__main__":
    main()
