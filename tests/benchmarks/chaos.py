"""Searches on a Ray cluster of three nodes, whose workers, nodes and drivers are killed at random moments.

Tables lie at three workers, the largest ones cut. In every run two workers get SIGKILL and one SIGSTOP, a node that a
worker is on goes away (and another one comes), and the driver gets SIGKILL and is resumed, in random order at random
moments. What is left afterwards must be what an undisturbed run leaves: no trial is lost or there twice, and every
number is the same to the bit. Prints one JSON object as its last line.

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
from dataclasses import dataclass, field
from pathlib import Path

import yaml

# Ray asks for no token: the cluster is of this machine, and the driver is another process.
os.environ["RAY_AUTH_MODE"] = "disabled"
import ray
from ray.cluster_utils import Cluster

import lowprec
from lowprec.config import load_config
from lowprec.search import open_job
from lowprec.traffic import SyntheticSpec, generate

NUM_SEEDS = 20
NUM_ROWS, MAX_TRIALS = 60_000, 40
EVENTS = ("kill", "kill", "stop", "node", "driver")
# Of the time that an undisturbed search takes from its first row of results, between two events.
GAPS = (0.02, 0.15)
TABLE_ROWS = (1_500_000, 1_000_000, 600_000, 40_000, 300, 20)
DIM = 32
TIMEOUT_S = 600.0

RUNS = "SELECT run_id, status FROM runs ORDER BY version"
TRIALS = "SELECT * FROM trials ORDER BY evaluation, number"
SENSITIVITIES = "SELECT * FROM sensitivities ORDER BY unit, precision"


def make_job(folder: Path, num_rows: int, max_trials: int) -> Path:
    """Traffic, a model of 400 MB whose tables do not fit on one worker, and the config of their search."""
    import torch

    from lowprec.models.checkpoint import save_checkpoint
    from lowprec.models.factory import build_model

    names = [f"c{k}" for k in range(len(TABLE_ROWS))]
    spec = SyntheticSpec(
        num_rows=num_rows,
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
        "search": {"budget": 0.5, "max_trials": max_trials, "wave_size": 8, "sensitivity_examples": 2048},
        "evaluation": {"num_workers": 3, "worker_memory": "590MB", "batches_per_task": 2, "hung_after_s": 3.0},
        "results": {"root": str(folder / "unused")},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(document))
    config = load_config(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(config.model.factory, config.model.args, config.traffic.schema_of_columns())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith("tables."):
                    parameter.normal_(0, 0.3)
    save_checkpoint(model, folder / "model.safetensors", {})
    placement = open_job(config).placement
    assert placement is not None and any(len(shards) > 1 for shards in placement.shards_of.values()), (
        "nothing is shared"
    )
    return path


class Machines:
    """A cluster of three nodes on this machine, one of which can go away; a new one comes in its place."""

    def __init__(self) -> None:
        self._cluster = Cluster()
        self._nodes = [self._add() for _ in range(3)]

    @property
    def address(self) -> str:
        """For `evaluation.address`."""
        return str(self._cluster.address)

    def workers(self) -> list[int]:
        """The processes of all workers of searches."""
        raylets = {node.all_processes["raylet"][0].process.pid for node in self._nodes}
        return [pid for pid, parent, title in processes() if parent in raylets and title.startswith("ray::WorkerActor")]

    def remove_one(self, rng: random.Random) -> bool:
        """Take away a node with a worker, not the head; False where there is none now."""
        busy = {parent for _, parent, title in processes() if title.startswith("ray::WorkerActor")}
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

    def _add(self):
        return self._cluster.add_node(num_cpus=2, include_dashboard=False)


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


# Table -> key of a row -> the rows with that key, as text.
Rows = dict[str, dict[str, list[str]]]


@dataclass
class Run:
    """One search, however often its driver was killed."""

    config: Path
    root: Path
    address: str
    process: subprocess.Popen[str] | None = None
    events: Counter[str] = field(default_factory=Counter)

    def go_on(self) -> None:
        """Start the driver, or start it again where it left off."""
        run = self.run_id()
        settings = {"results.root": self.root, "evaluation.address": self.address}
        command = [sys.executable, "-c", "from lowprec.cli import main; main()", "search", str(self.config), "--json"]
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

    def wait(self) -> dict:
        """The document of the driver when it ends by itself."""
        assert self.process is not None
        out, _ = self.process.communicate(timeout=TIMEOUT_S)
        assert self.process.returncode in (0, 2, 4), self.root.with_suffix(".log").read_text()
        return json.loads(out)

    def rows(self) -> Rows:
        """What readers find in the results, without what a repetition may change."""
        found: Rows = {}
        for name, sql in {"trials": TRIALS, "sensitivities": SENSITIVITIES}.items():
            frame = lowprec.query(sql, root=str(self.root)).drop(columns=["run_id", "committed_at"])
            frame["row_key"] = frame["row_key"].str.partition("/")[2]
            found[name] = {}
            for row in frame.to_dict("records"):
                # As text, in which every bit of a float counts and NaN equals itself.
                found[name].setdefault(row["row_key"], []).append(json.dumps(row, default=str, sort_keys=True))
        return found

    def num_written(self) -> int:
        """Rows as they lie in the tables, repetitions included."""
        from lowprec.results import ResultsStore

        return sum(ResultsStore(self.root).dataset(name).count_rows() for name in ("trials", "sensitivities"))


def disturbed(run: Run, machines: Machines, seed: int, usual_s: float) -> dict:
    """The document of a run to which all events happen, if it lasts long enough."""
    rng = random.Random(seed)
    events = list(EVENTS)
    rng.shuffle(events)
    run.go_on()
    while events:
        wait_for(lambda: ended(run) or (run.run_id() and machines.workers()))
        time.sleep(rng.uniform(*GAPS) * usual_s)
        if ended(run):
            break
        event = events[0]
        workers = sorted(machines.workers())
        if event == "node":
            if not machines.remove_one(rng):
                continue
        elif event == "driver":
            run.process.send_signal(signal.SIGKILL)
            run.process.communicate()
            run.go_on()
        elif workers:
            os.kill(rng.choice(workers), signal.SIGKILL if event == "kill" else signal.SIGSTOP)
        else:
            continue
        run.events[event] += 1
        events.pop(0)
    return run.wait()


def ended(run: Run) -> bool:
    return run.process is not None and run.process.poll() is not None


def wait_for(condition) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happens any more"
        time.sleep(0.1)


def compare(found: Rows, expected: Rows) -> dict[str, int]:
    """How many rows are lost, there twice, or have other numbers."""
    lost = duplicated = unequal = 0
    for name, rows in expected.items():
        here = found[name]
        lost += len(set(rows) - set(here))
        duplicated += sum(len(same) - 1 for same in here.values())
        unequal += sum(here[key] != rows.get(key) for key in here)
    return {"lost": lost, "duplicated": duplicated, "unequal": unequal}


DOCUMENT = ("plan", "bytes", "search", "confirm", "front", "verdict", "num_trials")


def play(folder: Path, seeds: range, *, num_rows: int = NUM_ROWS, max_trials: int = MAX_TRIALS) -> dict:
    """All seeds; the JSON object of this benchmark."""
    config = make_job(folder, num_rows, max_trials)
    machines = Machines()
    total: Counter[str] = Counter()
    events: Counter[str] = Counter()
    lost_s = []
    try:
        alone = Run(config, folder / "alone", machines.address)
        began = time.monotonic()
        alone.go_on()
        wait_for(lambda: ended(alone) or alone.run_id())
        first_row = time.monotonic()
        document = alone.wait()
        usual_s, search_s = time.monotonic() - began, time.monotonic() - first_row
        expected, written = alone.rows(), alone.num_written()
        assert document["num_trials"] == max_trials < len(expected["trials"]) and written > len(expected["trials"])
        print({"undisturbed_s": round(usual_s, 1), "rows": {k: len(v) for k, v in expected.items()}}, flush=True)
        for seed in seeds:
            run = Run(config, folder / f"seed-{seed}", machines.address)
            began = time.monotonic()
            found = disturbed(run, machines, seed, search_s)
            seconds = time.monotonic() - began
            one = compare(run.rows(), expected)
            one["duplicated"] += run.num_written() - written if run.num_written() > written else 0
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
