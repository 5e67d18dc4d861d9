"""What the monitor costs: passes over a window, and memory for windows of any size and number.

The demo model with 250,000 examples in its window, one thread, in process, and a plan of int4. Prints one JSON object
as its last line: `passes`, the CPU time of measuring a window (everything that a window without a breach takes: plan
beside reference, attribution, inputs, tests) over that of one fp32 pass, both reading it, in turn, median; `peak_mb`
above the start of the process for a quarter of the window, all of it, and both in turn eight times; `proposal_passes`,
what a breach takes beside that.
"""

import json
import resource
import statistics
import subprocess
import sys

import torch
from demo_model import large_demo_config
from passes import cpu_seconds, fp32_pass

from lowprec.evaluation.evaluate import NUM_BLOCKS
from lowprec.evaluation.worker import LocalWorkers
from lowprec.monitor.certified import Certified, CertifiedCounts
from lowprec.monitor.drift import DriftRule
from lowprec.monitor.measure import MeasuredWindow, measure_window, precisions_of
from lowprec.monitor.observe import observe
from lowprec.monitor.proposal import propose
from lowprec.plan import Plan, Precision
from lowprec.search import Job, open_job
from lowprec.storage import Location
from lowprec.traffic import TrafficWindow, Window

REPEATS = 5
RULE = DriftRule(0.01, 0.1)


class Watched:
    """The demo model with its certified window measured."""

    def __init__(self) -> None:
        self.job: Job = open_job(large_demo_config())
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
        assert found is not None and found.added_bytes > 0


def peak_mb(shares: list[float]) -> float:
    """Peak memory that windows of these shares take in a process of their own, above what it takes to begin."""
    command = [sys.executable, __file__, *map(str, shares)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def one_process(shares: list[float]) -> None:
    watched = Watched()
    watched.measure(0.05)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for share in shares:
        watched.measure(share)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


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
    peaks = {"quarter": peak_mb([0.25]), "whole": peak_mb([1.0]), "eight_of_both": peak_mb([0.25, 1.0] * 8)}
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
    one_process([float(share) for share in sys.argv[1:]]) if sys.argv[1:] else main()
