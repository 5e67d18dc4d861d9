"""Searches on a Ray cluster of three nodes, whose workers, nodes and drivers are killed at random moments.

Tables lie at three workers, the largest ones cut. In every run two workers get SIGKILL and one SIGSTOP, a node that a
worker is on goes away (and another one comes), and the driver gets SIGKILL and is resumed, in random order at random
moments, which are counted in commits: a slow machine has them too. What is left afterwards must be what an undisturbed
run leaves: no trial is lost or there twice, and every number is the same to the bit. Prints one JSON object as its last
line.

    make bench NAME=chaos              20 seeds
    python tests/benchmarks/chaos.py 3 [first seed]
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

# Ray asks for no token: the cluster is of this machine, and the driver is another process.
os.environ["RAY_AUTH_MODE"] = "disabled"
# What benchmarks and tests have in common.
sys.path.append(str(Path(__file__).parents[1] / "support"))
import ray
from ray.cluster_utils import Cluster
from rough_model import save_rough_model

import lowprec
from lowprec.config import load_config
from lowprec.results import ResultsStore
from lowprec.search import open_job
from lowprec.traffic import SyntheticSpec, generate

NUM_SEEDS = 20
# Enough commits for all events to happen long before the last.
NUM_ROWS, MAX_TRIALS = 20_000, 17
EVENTS = ("kill", "kill", "stop", "node", "driver")
# An event comes within so long of what it waits for.
JITTER_S = 0.5
TABLE_ROWS = (1_500_000, 1_000_000, 600_000, 40_000, 300, 20)
DIM = 32
TIMEOUT_S = 600.0

# `lowprec`, which asks workers more often whether they live: one that is stopped is missed sooner.
LOWPREC = (
    "from lowprec.evaluation.workers.ray import liveness; liveness.PULSE_EVERY_S = 0.5; "
    "from lowprec.cli.main import main; main()"
)

RUNS = "SELECT run_id, status FROM runs ORDER BY version"
ROWS = {
    "trials": "SELECT * FROM trials ORDER BY evaluation, number",
    "sensitivities": "SELECT * FROM sensitivities ORDER BY unit, precision",
}


def make_job(folder: Path) -> Path:
    """Traffic, a model of 400 MB whose tables do not fit on one worker, and the config of their search."""
    names = [f"c{k}" for k in range(len(TABLE_ROWS))]
    spec = SyntheticSpec(
        num_rows=NUM_ROWS,
        num_sparse=len(TABLE_ROWS),
        table_sizes=TABLE_ROWS,
        num_multi_hot=2,
        num_dense=3,
        num_users=300,
    )
    generate(spec, folder / "traffic")
    document = {
        "name": "chaos",
        "traffic": {
            "path": str(folder / "traffic"),
            "time": "ts",
            "dense": ["d0", "d1", "d2"],
            "sparse": [{"name": name, "num_embeddings": n} for name, n in zip(names, TABLE_ROWS, strict=True)],
            "batch_size": 1024,
        },
        "windows": {"search": {"end": "2026-01-06"}, "confirm": {"start": "2026-01-06"}},
        "model": {
            "args": {"embedding_dim": DIM, "bottom": [DIM], "top": [32]},
            "checkpoint": str(folder / "model.safetensors"),
        },
        "search": {"budget": 0.5, "max_trials": MAX_TRIALS, "wave_size": 3, "sensitivity_examples": 2048},
        "evaluation": {"num_workers": 3, "worker_memory": "590MB", "batches_per_task": 2, "hung_after_s": 10.0},
        "results": {"root": str(folder / "unused")},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(document))
    config = load_config(path)
    save_rough_model(config)
    placement = open_job(config).placement
    assert placement is not None and any(len(shards) > 1 for shards in placement.shards_of.values()), (
        "nothing is shared"
    )
    return path


class Machines:
    """A cluster of three nodes on this machine, one of which can go away; a new one comes in its place."""

    def __init__(self) -> None:
        self._cluster = Cluster()
        # Left alone, Ray gives a node up after 15 s (five checks in vain), and waits 5 s for a process that it has told
        # to end before it kills it.
        hurry = {"health_check_period_ms": 500, "kill_worker_timeout_milliseconds": 500}
        head = self._add(_system_config=hurry)
        self._nodes = [head, self._add(), self._add()]

    @property
    def address(self) -> str:
        """For `evaluation.address`."""
        return str(self._cluster.address)

    def workers(self) -> list[int]:
        """The processes of all workers of searches."""
        raylets = {node.all_processes["raylet"][0].process.pid for node in self._nodes}
        return [pid for pid, parent, title in processes() if parent in raylets and title.startswith("ray::WorkerActor")]

    def remove_one(self, workers: list[int], rng: random.Random) -> bool:
        """Take away a node with one of these workers, not the head; False where there is none now."""
        busy = {parent for pid, parent, _ in processes() if pid in workers}
        others = [n for n in self._nodes[1:] if n.all_processes["raylet"][0].process.pid in busy]
        if not others:
            return False
        node = rng.choice(others)
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)
        self._nodes.append(self._add())
        return True

    def close(self) -> None:
        """Stop everything."""
        ray.shutdown()
        self._cluster.shutdown()

    def _add(self, **options: Any) -> Any:
        return self._cluster.add_node(num_cpus=2, include_dashboard=False, **options)


def processes() -> list[tuple[int, int, str]]:
    """(process, its parent, its title) of everything that runs here."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                title = (folder / "cmdline").read_text().rstrip("\0")
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ProcessLookupError):
                continue
            found.append((int(folder.name), parent, title))
    return found


# Table -> key of a row -> that row as text.
Rows = dict[str, dict[str, str]]


@dataclass
class Run:
    """One search, however often its driver was killed."""

    config: Path
    root: Path
    address: str
    process: subprocess.Popen[str] | None = None
    # Workers of drivers that were killed: for a moment they outlive them.
    orphans: list[int] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)

    def go_on(self) -> None:
        """Start the driver, or start it again where it left off."""
        run = self.run_id()
        settings = {"results.root": self.root, "evaluation.address": self.address}
        command = [sys.executable, "-c", LOWPREC, "search", str(self.config), "--json"]
        command += [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
        command += ["--resume", run] if run else []
        log = (self.root.with_suffix(".log")).open("a")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)

    def run_id(self) -> str | None:
        """The run, once it is known to the results."""
        if not (self.root / "runs" / "_delta_log").is_dir():
            return None
        found = lowprec.query(RUNS, root=str(self.root))["run_id"]
        assert len(set(found)) <= 1, "a resumed run must not begin another one"
        return str(found.iloc[0]) if len(found) else None

    def wait(self) -> dict[str, Any]:
        """The document of the driver when it ends by itself."""
        assert self.process is not None
        out, _ = self.process.communicate(timeout=TIMEOUT_S)
        assert self.process.returncode in (0, 2, 4), self.root.with_suffix(".log").read_text()
        return json.loads(out)

    def rows(self) -> Rows:
        """What readers find in the results, without what a repetition may change."""
        found: Rows = {}
        for name, sql in ROWS.items():
            frame = lowprec.query(sql, root=str(self.root)).drop(columns=["run_id", "committed_at"])
            frame["row_key"] = frame["row_key"].str.partition("/")[2]
            # As text, in which every bit of a float counts and NaN equals itself.
            rows = frame.to_dict("records")
            found[name] = {row["row_key"]: json.dumps(row, default=str, sort_keys=True) for row in rows}
        return found

    def num_repeated(self) -> int:
        """Rows whose key the tables hold already; readers see one of each."""
        keys = [ResultsStore(self.root).dataset(name).to_table()["row_key"].to_pylist() for name in ROWS]
        return sum(len(of_table) - len(set(of_table)) for of_table in keys)

    def num_commits(self) -> int:
        """How often rows were committed so far; the first commit of a table makes it."""
        logs = [list((self.root / name / "_delta_log").glob("*.json")) for name in ROWS]
        return sum(max(0, len(log) - 1) for log in logs)


def disturbed(run: Run, machines: Machines, seed: int, num_commits: int) -> dict[str, Any]:
    """The document of a run to which all events happen, long before the last of its `num_commits`.

    A piece of work that is lost with three workers ends a run. So there are two commits between a worker's loss and
    the next but one: all that was being done at the first is done by then.
    """
    rng, spread = random.Random(seed), num_commits // 3
    due = rng.randrange(spread)
    losses: list[int] = []
    run.go_on()
    for event in rng.sample(EVENTS, len(EVENTS)):
        if event != "driver" and len(losses) > 1:
            due = losses[-2] + 2 + rng.randrange(spread - 1)
        wait_for(partial(_is_ready, run, machines, due))
        time.sleep(rng.uniform(0, JITTER_S))
        wait_for(partial(_ended_or_happens, event, run, machines, rng))
        if event != "driver":
            losses.append(run.num_commits())
    return run.wait()


def happens(event: str, run: Run, machines: Machines, rng: random.Random) -> bool:
    """Let it happen; False where there is nobody for it to happen to just now."""
    workers = workers_of(run, machines)
    if event == "driver":
        assert run.process is not None
        run.process.send_signal(signal.SIGKILL)
        run.process.communicate()
        run.orphans += workers
        run.go_on()
    elif not workers or (event == "node" and not machines.remove_one(workers, rng)):
        return False
    elif event != "node":
        try:
            os.kill(rng.choice(workers), signal.SIGKILL if event == "kill" else signal.SIGSTOP)
        except ProcessLookupError:
            return False
    run.events[event] += 1
    return True


def workers_of(run: Run, machines: Machines) -> list[int]:
    return sorted(pid for pid in machines.workers() if pid not in run.orphans)


def ended(run: Run) -> bool:
    return run.process is not None and run.process.poll() is not None


def _is_ready(run: Run, machines: Machines, due: int) -> bool:
    return ended(run) or bool(run.num_commits() >= due and workers_of(run, machines))


def _ended_or_happens(event: str, run: Run, machines: Machines, rng: random.Random) -> bool:
    return ended(run) or happens(event, run, machines, rng)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happens any more"
        time.sleep(0.1)


def compare(found: Rows, expected: Rows) -> dict[str, int]:
    """How many rows are lost, or have other numbers."""
    lost = sum(len(set(rows) - set(found[name])) for name, rows in expected.items())
    unequal = sum(row != expected[name].get(key) for name, rows in found.items() for key, row in rows.items())
    return {"lost": lost, "unequal": unequal}


DOCUMENT = ("plan", "bytes", "search", "confirm", "front", "verdict", "num_trials")


def play(folder: Path, seeds: range) -> dict[str, Any]:
    """All seeds; the JSON object of this benchmark."""
    config = make_job(folder)
    machines = Machines()
    total: Counter[str] = Counter()
    events: Counter[str] = Counter()
    lost_s = []
    try:
        alone = Run(config, folder / "alone", machines.address)
        began = time.monotonic()
        alone.go_on()
        document = alone.wait()
        usual_s = time.monotonic() - began
        expected = alone.rows()
        assert document["num_trials"] == MAX_TRIALS < len(expected["trials"]) and expected["sensitivities"]
        assert alone.num_repeated() == 0 and alone.num_commits() >= 6
        print({"undisturbed_s": round(usual_s, 1), "rows": {k: len(v) for k, v in expected.items()}}, flush=True)
        for seed in seeds:
            run = Run(config, folder / f"seed-{seed}", machines.address)
            began = time.monotonic()
            found = disturbed(run, machines, seed, alone.num_commits())
            seconds = time.monotonic() - began
            one = compare(run.rows(), expected)
            one["duplicated"] = run.num_repeated()
            one["documents_differ"] = sum(found[key] != document[key] for key in DOCUMENT)
            total.update(one)
            events.update(run.events)
            lost_s.append((seconds - usual_s) / max(1, run.events.total()))
            print({"seed": seed, "events": dict(run.events), "seconds": round(seconds, 1), **one}, flush=True)
    finally:
        machines.close()
    return {
        "runs": len(seeds),
        "events": dict(events),
        "lost": total["lost"],
        "duplicated": total["duplicated"],
        "metrics_equal": int(total["unequal"] == 0 and total["documents_differ"] == 0),
        "seconds_undisturbed": round(usual_s, 1),
        "seconds_lost_per_event": round(statistics.median(lost_s), 1),
        "seconds_lost_per_event_range": [round(min(lost_s), 1), round(max(lost_s), 1)],
        "num_trials": document["num_trials"],
    }


def main() -> None:
    num_seeds = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_SEEDS
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(play(Path(folder), range(first, first + num_seeds))))


if __name__ == "__main__":
    main()
