"""Workers that die, hang and fail: real signals to real processes. What is lost is done again, and counted once."""

import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from lowprec.config import load_config
from lowprec.core.errors import PoisonedWorkError, WorkerError
from lowprec.evaluation.workers.memory import MemoryUse
from lowprec.evaluation.workers.ray import RayWorkers, Timeouts
from lowprec.evaluation.workers.ray import liveness as watch
from lowprec.evaluation.workers.ray.actor import Pulse, start_actor
from lowprec.evaluation.workers.worker import ExactTask, LocalWorkers
from lowprec.plan import Plan, Precision
from lowprec.search.job import open_job

# Tasks of this file go to processes that cannot import it.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def job(small_config):
    return open_job(small_config())


@dataclass(frozen=True)
class Doomed:
    """An exact task to which something happens at one of its batches, so many times, counted in a folder."""

    task: ExactTask
    batch: int
    times: int
    folder: Path
    how: str

    @property
    def batches(self):
        return self.task.batches

    keep = None

    @property
    def forms(self):
        return self.task.forms

    def sums(self, evaluator, batch):
        if batch.index == self.batch and len(list(self.folder.iterdir())) < self.times:
            (self.folder / str(time.monotonic_ns())).write_text(str(os.getpid()))
            if self.how == "raise":
                raise ZeroDivisionError("by a user's hand")
            if self.how == "memory":
                raise MemoryError("cannot allocate 12 GB")
            if self.how != "sleep":
                os.kill(os.getpid(), getattr(signal, self.how))
            time.sleep(1000)  # a signal takes its time
        return self.task.sums(evaluator, batch)


@pytest.fixture(scope="module")
def one_ray():
    """A Ray on this machine for most of the tests; started by RayWorkers it would take seconds each time."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def tasks_of(job):
    plans = (Plan.uniform(job.units, Precision.INT4), Plan.uniform(job.units, Precision.INT2))
    return [ExactTask(plans, (k,)) for k in range(job.window("search").num_batches)]


def doomed(job, folder, how, times, batch=2):
    folder.mkdir()
    return [Doomed(task, batch, times, folder, how) for task in tasks_of(job)]


def is_alive(pid):
    """Whether a process is there, and not only its entry, which stays until somebody asks how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def bits(chunks):
    return [chunk.sums.moments.tobytes() for chunk in chunks]


@contextmanager
def on_ray(spec, num_workers, address=None, **options):
    told: list[str] = []

    def note(line: str) -> None:
        # On a busy machine workers take long to start, and that is said.
        if not line.startswith("Ray has started"):
            told.append(line)

    workers = RayWorkers(spec, num_workers=num_workers, address=address, note=note, **options)
    try:
        yield workers, told
    finally:
        workers.close()


@pytest.fixture(scope="module")
def two_workers(one_ray, small_folder):
    """Workers for most tests, and what is told of them: to start two takes longer than a test. They end with Ray."""
    told: list[str] = []
    spec = open_job(load_config(small_folder / "runs" / "config.yaml")).spec
    return RayWorkers(spec, num_workers=2, address=None, note=told.append), told


@pytest.fixture
def shared(two_workers):
    """The workers as if nothing had happened to them: losses are counted until one finishes something."""
    workers, told = two_workers
    for worker in range(2):
        workers._watch.finished(worker)
    told.clear()
    return workers, told


@pytest.fixture
def undisturbed(job):
    return bits(LocalWorkers(job.spec, job.adapter).run(job.window("search"), tasks_of(job)))


@pytest.mark.parametrize(
    ("how", "said"), [("raise", "ZeroDivisionError"), ("SIGKILL", r"worker \d \(process \d+ on node \w+\) died at")]
)
def test_work_that_fails_twice_is_done_again_and_changes_no_bit(shared, job, tmp_path, undisturbed, how, said):
    workers, told = shared
    found = bits(workers.run(job.window("search"), doomed(job, tmp_path / "tries", how, times=2)))
    assert found == undisturbed
    assert len(list((tmp_path / "tries").iterdir())) == 2
    first, second = told
    assert "Doomed of batches 2 to 2" in first and "Doomed of batches 2 to 2" in second
    assert re.search(said, first)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("SIGSEGV", r"worker \d .* died; .*most often for want of memory \(it was last seen with \d\.\d\d GB"),
        ("raise", "by a user's hand"),
        ("memory", "MemoryError.*want of memory .*: give workers more of it .*evaluation.worker_memory"),
    ],
)
def test_poisoned_work_is_set_aside_after_three_tries(shared, job, tmp_path, undisturbed, how, said):
    workers, _ = shared
    chunks = workers.run(job.window("search"), doomed(job, tmp_path / "tries", how, times=100))
    assert bits([next(chunks), next(chunks)]) == undisturbed[:2]
    with pytest.raises(PoisonedWorkError, match=f"batches 2 to 2 came to nothing 3 times.*{said}") as found:
        next(chunks)
    assert len(found.value.tries) == 3
    assert len(list((tmp_path / "tries").iterdir())) == 3
    # The workers are as good as before.
    assert bits(workers.run(job.window("search"), tasks_of(job))) == undisturbed


def test_a_stopped_worker_is_killed_and_its_work_done_again(shared, job, tmp_path, undisturbed, monkeypatch):
    workers, told = shared
    monkeypatch.setattr(watch, "PULSE_EVERY_S", 0.3)
    monkeypatch.setattr(workers._watch, "_timeouts", Timeouts(hung_s=4.0))
    found = bits(workers.run(job.window("search"), doomed(job, tmp_path / "tries", "SIGSTOP", times=1)))
    (attempt,) = (tmp_path / "tries").iterdir()
    stopped = int(attempt.read_text())
    deadline = time.monotonic() + 60
    while is_alive(stopped):
        assert time.monotonic() < deadline, "the stopped process is still there"
        time.sleep(0.1)
    assert found == undisturbed
    stopped_worker = rf"worker \d \(process {stopped} on node \w+\)"
    assert any(re.match(f"{stopped_worker} has not answered for 4 s .evaluation.hung_after_s", line) for line in told)


def test_a_worker_that_rays_memory_monitor_killed_is_a_lost_worker(one_ray, job, undisturbed, monkeypatch):
    """Only the task that it was at counts as tried, whatever else it was given."""
    get, raised = ray.get, []

    def killed_once(reference, **options):
        found = get(reference, **options)
        if type(found).__name__ == "Chunk" and not raised:
            raised.append(reference)
            raise ray.exceptions.OutOfMemoryError("killed")
        return found

    monkeypatch.setattr(ray, "get", killed_once)
    with on_ray(job.spec, 2) as (workers, told):
        assert bits(workers.run(job.window("search"), tasks_of(job))) == undisturbed
    assert len(raised) == 1 and [" died at ExactTask of batches" in line for line in told] == [True]


def test_a_worker_that_is_stopped_before_it_first_answers_is_killed(one_ray, monkeypatch):
    """Then nobody has heard of it, and the driver waits for it to be started. Ray may lose that it is to be killed."""
    actors = tuple(start_actor(1, None) for _ in range(2))
    stopped = [pulse.process_id for pulse in ray.get([actor.pulse.remote() for actor in actors])]
    for process in stopped:
        os.kill(process, signal.SIGSTOP)
    told, kill, lost = [], ray.kill, []

    def lose_the_first_of_worker_1(actor, **how):
        if actor == actors[1] and not lost:
            lost.append(actor)
        else:
            kill(actor, **how)

    monkeypatch.setattr(ray, "kill", lose_the_first_of_worker_1)
    try:
        found = watch.Watch(actors, lambda *_: None, Timeouts(hung_s=2.0, start_s=120.0), told.append)
        found.start("1 CPU")
        for worker, (process, least) in enumerate(zip(stopped, (1, 2), strict=True)):
            assert found.pulse(worker).process_id != process and not is_alive(process)
            assert sum(f"worker {worker} has not answered for 2 s" in line for line in told) >= least
    finally:
        for actor in actors:
            kill(actor)


@ray.remote(max_restarts=-1)
class SlowToStart:
    """A worker whose machine has to find its libraries first."""

    def __init__(self):
        time.sleep(5)

    def pulse(self):
        return Pulse(os.getpid(), "", MemoryUse(0, None, 0))


def test_a_worker_that_is_long_in_starting_is_not_taken_for_hung(one_ray):
    """It is asked from the beginning, and could answer from when it has a process."""
    actor, told = SlowToStart.remote(), []
    try:
        watch.Watch((actor,), lambda *_: None, Timeouts(hung_s=3.0, start_s=120.0), told.append).start("1 CPU")
        assert not [line for line in told if "has not answered" in line]
    finally:
        ray.kill(actor)


def test_work_that_does_not_end_is_stopped(shared, job, tmp_path, undisturbed, monkeypatch):
    workers, told = shared
    # The first task of a worker that was started again takes seconds on a busy machine.
    monkeypatch.setattr(workers, "_timeouts", Timeouts(task_s=6.0))
    found = bits(workers.run(job.window("search"), doomed(job, tmp_path / "tries", "sleep", times=1)))
    assert found == undisturbed
    assert any("has been at Doomed of batches 2 to 2 for 6 s (evaluation.task_timeout_s)" in line for line in told)


def test_a_worker_that_dies_while_it_loads_ends_the_run(one_ray, job, tmp_path):
    (tmp_path / "deadly.py").write_text(
        "import os, signal\ndef build(schema, **args):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    spec = replace(job.spec, factory="deadly:build", import_paths=(str(tmp_path),))
    with (
        on_ray(spec, 1) as (workers, _),
        pytest.raises(WorkerError, match=r"died 3 times in a row without finishing anything, most often for want of"),
    ):
        list(workers.run(job.window("search"), tasks_of(job)))


def test_rows_are_checked_by_workers_as_in_one_process(one_ray, small_config, small_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(small_folder / "model.safetensors")
    tensors["tables.c5.weight"][700, 3] = 1e30
    save_file(tensors, tmp_path / "wide.safetensors")
    job = open_job(small_config(f"model.checkpoint={tmp_path / 'wide.safetensors'}"))
    plan = Plan.uniform(job.units, Precision.INT4)
    expected = job.rows_without_form(LocalWorkers(job.spec, job.adapter), plan)
    assert len(expected) == 1 and '"table:c5": row 700 spans' in expected[0]
    with on_ray(job.spec, 2) as (workers, _):
        assert job.rows_without_form(workers, plan) == expected


# After the tests with a Ray of their own: Ray starts no other one beside a cluster in the same process.
@pytest.fixture
def machines():
    ray.shutdown()
    cluster = Cluster()
    # A node is given up after five checks in vain.
    head = cluster.add_node(num_cpus=1, include_dashboard=False, _system_config={"health_check_period_ms": 500})
    nodes = [head, *(cluster.add_node(num_cpus=1, include_dashboard=False) for _ in range(2))]
    try:
        yield cluster, {node.node_id: node for node in nodes}
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_machine_that_goes_away_costs_its_worker_its_place_only(job, undisturbed, machines, monkeypatch):
    """With room elsewhere the worker moves there; without, the run says so."""
    cluster, nodes = machines
    with on_ray(job.spec, 2, cluster.address) as (workers, _):
        chunks = workers.run(job.window("search"), tasks_of(job))
        found = [next(chunks)]
        # The first node is the head.
        lost, place = next((w, n) for w, n in enumerate(workers.node_ids()) if nodes[n] is not cluster.head_node)
        cluster.remove_node(nodes[place], allow_graceful=False)
        found += list(chunks)
        assert bits(found) == undisturbed
        deadline = time.monotonic() + 120
        while workers.node_ids()[lost] == place:
            assert time.monotonic() < deadline, "the worker has not moved"
            list(workers.run(job.window("search"), tasks_of(job)))

        # From here on there is no room to wait for.
        monkeypatch.setattr(workers._watch, "_timeouts", Timeouts(start_s=2.0))
        for node in list(cluster.worker_nodes):
            cluster.remove_node(node, allow_graceful=False)
        with pytest.raises(WorkerError, match=r"is gone and was not started again in 2 s.*resume with fewer workers"):
            for _ in range(1000):
                list(workers.run(job.window("search"), tasks_of(job)))
