"""What the monitor costs: passes over a window, and memory for windows of any size and number.

The demo model with 250,000 examples in its window, one thread, in process, and a plan of int4. Prints one JSON object
as its last line: `passes`, the CPU time of measuring a window (everything that a window without a breach takes: plan
beside reference, attribution, inputs, tests) over that of one fp32 pass, both reading it, in turn, median;
`proposal_passes`, what a breach takes beside that; `peak_mb`, the peak memory of whole runs of the monitor, each in a
process of its own that has judged an hour before, above what it has then: for one window of an hour (4,200 examples),
72 of them, one of a day and one of five days (500,000 examples). Linux only.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
from demo_model import large_demo_config
from passes import cpu_seconds, fp32_pass
from sizes import IS_SMOKE, sized

from lowprec.evaluation.evaluate import NUM_BLOCKS
from lowprec.evaluation.workers.memory import give_back_now
from lowprec.evaluation.workers.worker import LocalWorkers
from lowprec.monitor import run_monitor
from lowprec.monitor.certified import Certified, CertifiedCounts
from lowprec.monitor.inputs.drift import DriftRule
from lowprec.monitor.inputs.normal_drift import History
from lowprec.monitor.observe import observe
from lowprec.monitor.proposal import propose
from lowprec.monitor.window_evidence import MeasuredWindow, measure_window, precisions_of
from lowprec.plan import Plan, PlanFile, Precision, write_plan
from lowprec.search import SearchJob, open_job
from lowprec.storage import Location
from lowprec.traffic import TrafficWindow, Window

REPEATS = sized(5, 1)
LENGTHS = {"1h": timedelta(hours=1), "1d": timedelta(days=1), "5d": timedelta(days=5)}
RUNS = sized([("1h", 1), ("1h", 72), ("1d", 1), ("5d", 1)], [("1h", 1)])
RULE = DriftRule(0.01, 0.1)


class Watched:
    """The demo model with its certified window measured."""

    def __init__(self) -> None:
        self.job: SearchJob = open_job(large_demo_config())
        self.workers = LocalWorkers(self.job.spec, self.job.adapter)
        self.plan = Plan.uniform(self.job.units, Precision.INT4)
        torch.set_num_threads(1)
        window = self.job.window("confirm")
        counts = CertifiedCounts(window.schema)
        observation = observe(self.workers, window, self.plan, on_inputs=counts.add)
        self.certified = Certified.of(counts, observation, precisions_of(self.plan), "confirm")

    def window(self, share: float) -> TrafficWindow:
        """The first part of the search window."""
        whole = self.job.window("search").window
        assert whole.start is not None and whole.end is not None
        return self.job.reader.window(Window(whole.start, whole.start + int(share * (whole.end - whole.start))))

    def measure(self, share: float = 1.0) -> MeasuredWindow:
        """Everything that is measured of a window."""
        window = self.window(share)
        return measure_window(
            self.job,
            self.workers,
            self.plan,
            window,
            self.certified,
            RULE,
            History([], self.certified.inputs),
            num_labels=window.count_labels(),
            quarantine=Location.of("runs/quarantine"),
            name="cost",
        )

    def propose(self) -> None:
        """What a breach takes as well."""
        found = propose(
            self.job,
            self.workers,
            self.window(1.0),
            self.plan,
            budget_pct=0.01,
            gap_pct=0.02,
            confidence=0.95,
            label_free=False,
        )
        assert IS_SMOKE or (found is not None and found.added_bytes > 0)


def peak_mb(length: str, num_windows: int) -> float:
    """Peak memory of a run of the monitor over so many windows of that length, above what the process begins with."""
    command = [sys.executable, __file__, length, str(num_windows)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def one_run(length: str, num_windows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = large_demo_config(
            f"results.root={folder}",
            "monitor.start=2026-01-02",
            "monitor.certified={start: 2026-01-01, end: 2026-01-01T06:00}",
        )
        job = open_job(config)
        plan = Plan.uniform(job.units, Precision.INT4)
        path = Path(folder) / "plan.json"
        file = PlanFile(
            plan=plan,
            model=config.model.factory,
            checkpoint_sha256=job.checkpoint_sha256,
            size_bytes=job.space.size_bytes(plan),
            row_ranges=dict.fromkeys(plan, config.space.row_range),
            evidence={"budget_pct": 5.0},
        )
        write_plan(file, path)
        torch.set_num_threads(1)
        since = datetime(2026, 1, 2, tzinfo=UTC)

        def run(length: str, num_windows: int, until: datetime) -> None:
            watched = config.with_(monitor={"window": length})
            outcome = run_monitor(
                watched, path, since=since.isoformat(), until=until.isoformat(), now=datetime(2026, 2, 1, tzinfo=UTC)
            )
            assert len(outcome.windows) == num_windows and not outcome.notes, outcome

        run("2h", 1, since + timedelta(hours=2))
        give_back_now()
        Path("/proc/self/clear_refs").write_text("5")  # begin the peak anew
        before = peak_kb()
        run(length, num_windows, since + num_windows * LENGTHS[length])
        print((peak_kb() - before) / 1024)


def peak_kb() -> int:
    """The most memory that this process had at once."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))


def main() -> None:
    watched = Watched()
    found = watched.measure()
    assert found.metrics is not None and found.metrics.num_examples == watched.window(1.0).num_rows
    assert len(found.drift) == len(watched.certified.inputs.sparse) + len(watched.certified.inputs.dense)
    assert all(len(blocks) == NUM_BLOCKS for blocks in watched.certified.inputs.coarse.values())
    rounds = []
    for _ in range(REPEATS):
        one = cpu_seconds(lambda: fp32_pass(watched.job))
        rounds.append(
            {"pass": one, "passes": cpu_seconds(watched.measure) / one, "proposal": cpu_seconds(watched.propose) / one}
        )
        print({k: round(v, 2) for k, v in rounds[-1].items()}, flush=True)
    peaks = {f"{count} of {length}": peak_mb(length, count) for length, count in RUNS}
    print(
        json.dumps(
            {
                "passes": round(statistics.median(r["passes"] for r in rounds), 2),
                "passes_range": [round(f(r["passes"] for r in rounds), 2) for f in (min, max)],
                "proposal_passes": round(statistics.median(r["proposal"] for r in rounds), 2),
                "peak_mb": {name: round(value, 1) for name, value in peaks.items()},
                "examples": found.metrics.num_examples,
            }
        )
    )


if __name__ == "__main__":
    one_run(sys.argv[1], int(sys.argv[2])) if sys.argv[1:] else main()
