"""Processes that write at once, or are killed while they write."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from threading import Condition

import numpy as np
import pytest

from lowprec.results import ResultsStore
from lowprec.storage import Location


def keys(store, table="trials"):
    return store.read(table)["row_key"].to_pylist()


WRITER = """
import json, sys, time
from lowprec.results import ResultsStore
root, name, num_appends = sys.argv[1], sys.argv[2], int(sys.argv[3])
sample = json.loads(sys.stdin.readline())
store = ResultsStore(root)
print("ready", flush=True)
sys.stdin.readline()
for i in range(num_appends):
    keys = [f"{name}-{i}-{j}" for j in range(3)]
    store.append("trials", [{**sample, "row_key": key} for key in keys])
    print(*keys, flush=True)
"""


def start_writer(root, name, num_appends, sample):
    import json

    arguments = [sys.executable, "-c", WRITER, str(root), name, str(num_appends)]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdin.write(json.dumps(sample) + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == "ready\n"
    return process


def start_two_writers(root, row):
    return [start_writer(root, f"w{i}", 8, row("trials", "")) for i in range(2)]


def check_that_nothing_is_lost(writers, root):
    """Both begin at once."""
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    acknowledged = [key for writer in writers for key in writer.communicate(timeout=300)[0].split()]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert len(acknowledged) == 2 * 8 * 3
    assert sorted(keys(ResultsStore(root))) == sorted(acknowledged)
    assert ResultsStore(root).dataset("trials").count_rows() == len(acknowledged)


def test_commits_that_meet_at_an_object_store_are_both_kept(row, bucket, s3):
    """What one writer commits waits at the server for the other to try the same version, or to end."""
    arrived, met, changed = Counter(), Counter(), Condition()
    writers = start_two_writers(bucket, row)

    def meet(environ):
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] == "PUT" and "_delta_log" in path:
            with changed:
                arrived[path] += 1
                changed.notify_all()
                while arrived[path] < 2 and all(writer.poll() is None for writer in writers):
                    changed.wait(0.05)
                met[path] += arrived[path] > 1

    s3.answer = meet
    check_that_nothing_is_lost(writers, bucket)
    # Every commit of the writer that ended first was met by one of the other.
    assert sum(met.values()) >= 2 * 8


@pytest.mark.parametrize("place", ["folder", "folder", "folder"], indirect=True)
def test_processes_that_start_at_once_lose_nothing(row, place):
    """They race for the table's creation too."""
    check_that_nothing_is_lost(start_two_writers(place, row), place)


def test_sigkill_loses_nothing_acknowledged_and_a_repetition_completes(row, place):
    rng = np.random.default_rng(0)
    for attempt in range(3 if Location.of(place).is_url else 5):
        root = f"{place}/{attempt}"
        writer = start_writer(root, "w", 10_000, row("trials", ""))
        writer.stdin.write("go\n")
        writer.stdin.flush()
        writer.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.15))
        os.kill(writer.pid, signal.SIGKILL)
        acknowledged = [
            key for line in writer.communicate()[0].splitlines() for key in line.split() if len(line.split()) == 3
        ]
        found = keys(ResultsStore(root))
        assert set(acknowledged) <= set(found)
        assert len(found) % 3 == 0  # a commit is there whole or not at all
        assert (
            len(found) <= len(acknowledged) + 6
        )  # the first line was read above, the last commit may be unacknowledged
        again = ResultsStore(root)
        last = max(int(key.split("-")[1]) for key in found)
        rows = [row("trials", f"w-{i}-{j}") for i in range(last + 2) for j in range(3)]
        assert again.append("trials", rows) == 3
        assert again.dataset("trials").count_rows() == len(rows)
