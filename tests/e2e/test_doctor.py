"""`lowprec doctor` says what is there, and what to do about what is not."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowprec.core.errors import WorkerError
from lowprec.ops.linear import has_bf16_instructions, safe_input_bits

NAMES = ["python", "cpu", "kernels", "fbgemm", "layers", "libraries", "threads", "memory", "gpu", "ray"]


def findings(done):
    document = json.loads(done.out)
    return document, {finding["name"]: finding for finding in document["findings"]}


def test_a_machine_that_is_well(lowprec, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("LOWPREC_CPU_PATH", raising=False)
    done = lowprec("doctor", "--json")
    document, found = findings(done)
    assert (done.code, document["state"]) == (0, "ok")
    assert list(found) == NAMES
    facts = found["kernels"]["facts"]
    assert facts["cpu_path"] == facts["cpu_paths"][0] and facts["cpu_paths"][-1] == "portable"
    assert min(found["memory"]["facts"]["copy_gb_per_s"].values()) > 0.1
    assert found["memory"]["facts"]["available_bytes"] <= found["memory"]["facts"]["total_bytes"]
    layers = found["layers"]
    assert layers["facts"]["int8_input_bits"] == safe_input_bits() and f"{safe_input_bits()} bits" in layers["summary"]
    assert layers["facts"]["has_bf16_instructions"] is has_bf16_instructions()
    assert found["libraries"]["facts"]["versions"]["ray"].startswith("2.")
    assert found["gpu"]["state"] in ("ok", "absent") and found["ray"]["state"] in ("ok", "absent")


def test_text_has_a_line_for_each_finding_and_names_the_path_that_was_asked_for(lowprec, monkeypatch):
    monkeypatch.setenv("LOWPREC_CPU_PATH", "portable")
    done = lowprec("doctor")
    assert done.code == 0
    assert [line.split()[1] for line in done.out.splitlines()] == NAMES
    assert "portable (asked for by LOWPREC_CPU_PATH" in done.out


def test_what_is_broken_is_said_and_the_rest_is_still_looked_at(lowprec, monkeypatch):
    monkeypatch.setenv("LOWPREC_CPU_PATH", "sse9")
    done = lowprec("doctor", "--address", "127.0.0.1:9", "--json")
    document, found = findings(done)
    assert (done.code, document["state"]) == (3, "broken")
    assert "LOWPREC_CPU_PATH: this CPU has" in found["kernels"]["summary"]
    assert found["ray"]["state"] == "broken" and "127.0.0.1:9: cannot be reached" in found["ray"]["summary"]
    assert found["memory"]["state"] == "ok"


def test_a_cluster_that_was_killed_and_left_its_address_is_not_waited_for(monkeypatch):
    connect = importlib.import_module("lowprec.evaluation.workers.ray.connect")
    monkeypatch.setattr(connect, "get_ray_address_from_environment", lambda *_: "127.0.0.1:9")

    def waits(*_, **__):
        raise AssertionError("Ray was to join the cluster, for which it waits")

    monkeypatch.setattr(connect.ray, "init", waits)
    with pytest.raises(WorkerError, match="cannot be reached"):
        connect.cluster_resources("auto")


def test_a_ray_that_takes_too_long_to_start_is_one_sentence(monkeypatch):
    """Ray raises a plain Exception then, as on a machine that is busy with other things."""
    connect = importlib.import_module("lowprec.evaluation.workers.ray.connect")

    def fails(**_kwargs):
        raise Exception("The current node timed out during startup. This could happen because of load.")

    monkeypatch.setattr(connect.ray, "init", fails)
    with pytest.raises(
        WorkerError, match="cannot be started on this machine: The current node timed out during startup"
    ):
        connect.init_ray(1, None)


@pytest.fixture
def cluster(tmp_path):
    """A Ray cluster of one node with five CPUs, started as a user would, and stopped without those of other tests."""
    ray = str(Path(sys.executable).with_name("ray"))
    start = [ray, "start", "--head", "--block", "--num-cpus=5", "--port=0", "--include-dashboard=false"]
    log = tmp_path / "start.log"
    with log.open("w") as out:
        process = subprocess.Popen(start, stdout=out, stderr=out)
    deadline = time.monotonic() + 120
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    yield
    process.terminate()
    process.wait(60)


@pytest.mark.slow  # finds the latest Ray of the machine, which may be another test's
def test_a_cluster_on_this_machine_is_found(lowprec, cluster, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    _, found = findings(lowprec("doctor", "--json"))
    assert found["ray"]["state"] == "ok"
    assert (found["ray"]["facts"]["num_nodes"], found["ray"]["facts"]["num_cpus"]) == (1, 5)
