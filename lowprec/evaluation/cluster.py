"""Workers as Ray actors: an embedded Ray for the command, or a cluster."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from lowprec.errors import LowprecError, WorkerError
from lowprec.evaluation.exact import ExactEvaluator
from lowprec.evaluation.worker import Chunk, HeldShards, ShardLoader, Summable, Task, Worker, WorkerSpec
from lowprec.shards.planner import Placement
from lowprec.shards.server import ShardServer
from lowprec.shards.sharded import Exchange, ShardedTables
from lowprec.shards.wire import Request
from lowprec.traffic import TrafficWindow

__all__ = ["RayWorkers", "cluster_resources"]

T = TypeVar("T", bound=Summable)

_LOOKUPS = "lookups"
# Threads of a worker that answer others while it evaluates: one computes while another is waited for.
LOOKUP_THREADS = 2

MAX_RESTARTS = 3
MAX_TASK_RETRIES = 3

# Tasks queued at one worker: it never waits for the driver, and little is lost when it dies.
TASKS_IN_FLIGHT = 2
# Results wait for those before them; while one worker is slow, the others get so many tasks each ahead of it.
TASKS_AHEAD = 8

CONNECT_TIMEOUT_S = 10.0
# A cluster that grows by itself takes minutes; one that is too small would let tasks wait for ever.
START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class _Share:
    """What a worker holds of a placement."""

    placement: Placement
    worker: int


@dataclass(frozen=True)
class _Peers:
    """All workers, and the machines that they run on: rows of the same machine are mapped, others asked for."""

    actors: tuple[Any, ...]
    nodes: tuple[str, ...]


class _WorkerActor:
    """A worker in a process of its own. Errors of ours come back as values, so that the driver sees them unwrapped.

    Tasks come one at a time; meanwhile other threads look up what other workers ask of its shards. Neither keeps
    anything that would be missed: a worker that was restarted loads its rows again and goes on.
    """

    def __init__(self, spec: WorkerSpec, share: _Share | None) -> None:
        self._spec, self._share = spec, share
        self._loading = Lock()
        self._worker: Worker | None = None
        self._sharded: tuple[ShardLoader, HeldShards, ShardServer] | None = None
        self._window: tuple[Any, TrafficWindow] | None = None

    def run(self, window: list[Any], task: Task[Any], peers: _Peers) -> Chunk[Any] | LowprecError:
        """Do a task; `window` holds one reference, fetched once: a window kept open reads on where it left off."""
        try:
            if self._worker is None:
                self._worker = Worker(self._spec, self._evaluator(peers))
            if self._window is None or self._window[0] != window[0]:
                self._window = (window[0], ray.get(window[0]))
            return self._worker.run(self._window[1], task)
        except LowprecError as error:
            return error

    @ray.method(concurrency_group=_LOOKUPS)
    def answer(self, request: Request) -> NDArray[np.float32] | LowprecError:
        """Look up rows of this worker's shards for another one."""
        torch.set_num_threads(self._spec.threads)  # of this thread
        try:
            *_, server = self._load()
            return server.answer(request)
        except LowprecError as error:
            return error

    @ray.method(concurrency_group=_LOOKUPS)
    def process_id(self) -> int:
        """The process that this worker runs in."""
        return os.getpid()

    @ray.method(concurrency_group=_LOOKUPS)
    def node_id(self) -> str:
        """The machine that this worker runs on."""
        return str(ray.get_runtime_context().get_node_id())

    def _evaluator(self, peers: _Peers) -> ExactEvaluator | None:
        if self._share is None:
            return None
        loader, held, _ = self._load()
        if loader.is_mapped:
            here = peers.nodes[self._share.worker]
            held = loader.held(worker for worker, node in enumerate(peers.nodes) if node == here)
        tables = ShardedTables(self._share.placement, held, _exchange_with(peers.actors))
        return ExactEvaluator(loader.adapter, tables)

    def _load(self) -> tuple[ShardLoader, HeldShards, ShardServer]:
        with self._loading:
            if self._sharded is None:
                assert self._share is not None, "a worker without a share is not asked for rows"
                loader = ShardLoader(self._spec, self._share.placement)
                held = loader.held([self._share.worker])
                self._sharded = loader, held, ShardServer(held.values())
            return self._sharded


def _exchange_with(peers: Sequence[Any]) -> Exchange:
    """Requests to other workers, which answer at the same time."""

    def exchange(requests: Mapping[int, Request]) -> Callable[[], dict[int, NDArray[np.float32]]]:
        sent = {worker: peers[worker].answer.remote(request) for worker, request in requests.items()}
        return lambda: {worker: _answer(reference, worker) for worker, reference in sent.items()}

    return exchange


def _answer(reference: Any, worker: int) -> NDArray[np.float32]:
    try:
        answer: NDArray[np.float32] | LowprecError = ray.get(reference)
    except ray.exceptions.RayError as error:
        raise WorkerError(
            f"rows of worker {worker} cannot be looked up: {type(error).__name__}: {str(error).splitlines()[0]}; "
            "resume the run when the cluster is well"
        ) from error
    if isinstance(answer, LowprecError):
        raise answer
    return answer


class RayWorkers:
    """Evaluation workers on Ray. A worker that dies is restarted and its tasks are done again, each counted once."""

    def __init__(
        self, spec: WorkerSpec, *, num_workers: int, address: str | None, placement: Placement | None = None
    ) -> None:
        """Start `num_workers` actors; `address=None` starts Ray on this machine until `close`.

        placement: which of them holds which rows; without it, each of them holds all.
        """
        assert placement is None or placement.num_workers == num_workers
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _init_ray(num_workers * spec.threads, address)
        remote: Any = ray.remote  # whose types know no concurrency groups
        actor = remote(
            num_cpus=spec.threads,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_TASK_RETRIES,
            concurrency_groups={_LOOKUPS: LOOKUP_THREADS},
        )(_WorkerActor)
        shares = [None if placement is None else _Share(placement, worker) for worker in range(num_workers)]
        self._actors: list[Any] = [actor.remote(spec, share) for share in shares]
        started = [a.process_id.remote() for a in self._actors]
        ready, pending = ray.wait(started, num_returns=num_workers, timeout=START_TIMEOUT_S)
        if pending:
            free = ray.available_resources().get("CPU", 0)  # type: ignore[no-untyped-call]
            self.close()
            raise WorkerError(
                f"Ray started {len(ready)} of {num_workers} workers in {START_TIMEOUT_S:.0f} s, each on {spec.threads} "
                f"CPU, and has {free:g} CPU left; lower evaluation.num_workers or make the cluster larger"
            )
        try:
            nodes = ray.get([a.node_id.remote() for a in self._actors])
        except ray.exceptions.RayError as error:
            self.close()
            raise WorkerError(
                f"a worker died while it was started: {str(error).splitlines()[0]}; look at the cluster's logs, or "
                "lower evaluation.num_workers"
            ) from error
        self._peers = _Peers(tuple(self._actors), tuple(nodes))

    def run(self, window: TrafficWindow, tasks: Sequence[Task[T]]) -> Iterator[Chunk[T]]:
        """The chunk of every task, in order; a task goes to whichever worker is free."""
        shared_window = [ray.put(window)]
        free = self._actors * TASKS_IN_FLIGHT
        in_flight: dict[Any, tuple[int, Any]] = {}
        done: dict[int, Chunk[T]] = {}
        given = 0
        try:
            for wanted in range(len(tasks)):
                while wanted not in done:
                    while free and given < min(len(tasks), wanted + TASKS_AHEAD * len(self._actors)):
                        actor = free.pop(0)
                        in_flight[actor.run.remote(shared_window, tasks[given], self._peers)] = (given, actor)
                        given += 1
                    (ready,), _ = ray.wait(list(in_flight), num_returns=1)
                    number, actor = in_flight.pop(ready)
                    free.append(actor)
                    done[number] = _result(ready, tasks[number])
                yield done.pop(wanted)
        finally:
            for reference in in_flight:
                ray.cancel(reference)

    def process_ids(self) -> list[int]:
        """The process of every worker."""
        found: list[int] = ray.get([actor.process_id.remote() for actor in self._actors])
        return found

    def node_ids(self) -> list[str]:
        """The machine that each worker was started on."""
        return list(self._peers.nodes)

    def close(self) -> None:
        """Stop the actors, and Ray where it was started here."""
        for actor in self._actors:
            ray.kill(actor)
        if self._owns_ray:
            ray.shutdown()


def cluster_resources(address: str) -> dict[str, Any]:
    """Address, nodes, CPUs and GPUs of the Ray cluster at `address` ("auto": the one that runs on this machine).

    Raises `WorkerError` where none answers. Ray must not be in use by this process.
    """
    _init_ray(0, address)
    try:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        return {
            "address": ray.get_runtime_context().gcs_address,
            "num_nodes": sum(bool(node["Alive"]) for node in ray.nodes()),  # type: ignore[no-untyped-call]
            "num_cpus": resources.get("CPU", 0.0),
            "num_gpus": resources.get("GPU", 0.0),
        }
    finally:
        ray.shutdown()


def _result(reference: Any, task: Task[T]) -> Chunk[T]:
    where = f"batches {task.batches[0]} to {task.batches[-1]}"
    try:
        result: Chunk[T] | LowprecError = ray.get(reference)
    except ray.exceptions.RayActorError as error:
        raise WorkerError(
            f"evaluation of {where}: the worker died {MAX_RESTARTS + 1} times, most often for want of memory; lower "
            f"evaluation.num_workers, then resume ({str(error).splitlines()[0]})"
        ) from error
    except ray.exceptions.RayTaskError as error:
        raise WorkerError(f"evaluation of {where}: the worker failed: {error.cause!r}") from error
    except ray.exceptions.RayError as error:
        raise WorkerError(
            f"evaluation of {where}: {type(error).__name__}: {str(error).splitlines()[0]}; resume the run when the "
            "cluster is well, with fewer workers where memory ran out (evaluation.num_workers)"
        ) from error
    if isinstance(result, LowprecError):
        raise result
    return result


def _init_ray(num_cpus: int, address: str | None) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address is None:
            # "local" never joins a cluster that an old address file points to.
            ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)
        else:
            _check_reachable(address)
            ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        # Ray sends no token to an address that it was given, and a cluster that wants one does not say so.
        asks_token = address is not None and "RAY_AUTH_MODE" not in os.environ and "Failed to connect" in str(error)
        raise WorkerError(
            f"Ray at {address or 'this machine'}: cannot be reached or started: {str(error).splitlines()[0]}; "
            + ("set RAY_AUTH_MODE=token if the cluster asks for a token; " if asks_token else "")
            + "check the address (evaluation.address, --address), or leave it out to run on this machine"
        ) from error


def _check_reachable(address: str) -> None:
    """Ray itself waits without end for a head node that is not there."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
