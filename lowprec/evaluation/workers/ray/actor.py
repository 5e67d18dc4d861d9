"""A worker in a process of its own, as a Ray actor."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from lowprec.core.errors import LowprecError, WorkerError
from lowprec.evaluation.exact.exact_evaluator import ExactEvaluator
from lowprec.evaluation.workers.memory import MemoryUse, give_back_freed, keep_freed, memory_use
from lowprec.evaluation.workers.worker import Chunk, RowCheck, ShardLoader, Task, Worker, WorkerSpec
from lowprec.shards.estimate import kept_bytes
from lowprec.shards.planner import Placement
from lowprec.shards.server import ShardServer
from lowprec.shards.sharded import Exchange, ShardedTables
from lowprec.shards.wire import Request
from lowprec.traffic import TrafficWindow

__all__ = ["Peers", "Pulse", "start_actor"]

_PREPARE, _LOOKUPS, _PULSE = "prepare", "lookups", "pulse"
# Threads of a worker that answer others while it evaluates: one computes while another is waited for.
LOOKUP_THREADS = 2


@dataclass(frozen=True)
class Peers:
    """All workers, and the machines that they run on: rows of the same machine are mapped, others asked for."""

    actors: tuple[Any, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class _Share:
    """What a worker holds of a placement."""

    placement: Placement
    worker: int
    peers: Peers


@dataclass(frozen=True)
class Pulse:
    """What a worker that lives says of itself."""

    process_id: int
    node_id: str
    memory: MemoryUse


class WorkerActor:
    """A worker in a process of its own. Errors of ours come back as values, so that the driver sees them unwrapped.

    It is told everything by `prepare`, every time that it was started. Then tasks come one at a time; meanwhile other
    threads look up what other workers ask of its shards. Neither keeps anything that would be missed.
    """

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._server: ShardServer | LowprecError | None = None
        self._is_prepared = Event()
        self._work: tuple[Any, TrafficWindow, Sequence[Task[Any]]] | None = None

    @ray.method(concurrency_group=_PREPARE)
    def prepare(self, spec: WorkerSpec, placement: Placement | None, worker: int, peers: Peers) -> LowprecError | None:
        """Load the model and the rows; nothing where that was done."""
        if self._worker is not None:
            return None
        torch.set_num_threads(spec.threads)
        if spec.memory_bytes is None:
            keep_freed()
        else:
            give_back_freed()
        try:
            if placement is None:
                self._worker = Worker(spec)
            else:
                self._worker, self._server = _sharded_worker(spec, _Share(placement, worker, peers))
            return None
        except LowprecError as error:
            self._server = error
            return error
        finally:
            self._is_prepared.set()

    def run(self, work: list[Any], number: int) -> Chunk[Any] | LowprecError:
        """Do a task by its number.

        `work` holds one reference, to the window and all tasks, and is fetched once: a window kept open reads on where
        it left off.
        """
        try:
            if self._work is None or self._work[0] != work[0]:
                self._work = (work[0], *ray.get(work[0]))
            _, window, tasks = self._work
            return self._prepared().run(window, tasks[number])
        except LowprecError as error:
            return error

    def check_rows(self, check: RowCheck) -> str | LowprecError | None:
        """What is wrong with the first row of a range that has no form at a precision."""
        try:
            return self._prepared().check_rows(check)
        except LowprecError as error:
            return error

    @ray.method(concurrency_group=_LOOKUPS, max_task_retries=-1)
    def answer(self, request: Request) -> NDArray[np.float32] | LowprecError:
        """Look up rows of this worker's shards for another one, which waits while this one is started again."""
        self._is_prepared.wait()
        assert self._server is not None, "a worker that holds all tables is not asked for rows"
        try:
            return self._server if isinstance(self._server, LowprecError) else self._server.answer(request)
        except LowprecError as error:
            return error

    @ray.method(concurrency_group=_PULSE)
    def pulse(self) -> Pulse:
        """That this worker lives; answered whatever else it does."""
        return Pulse(os.getpid(), str(ray.get_runtime_context().get_node_id()), memory_use())

    def _prepared(self) -> Worker:
        """The worker; one that was started again unseen is given work before it is told what it needs for it."""
        self._is_prepared.wait()
        if isinstance(self._server, LowprecError):
            raise self._server
        assert self._worker is not None
        return self._worker


def _sharded_worker(spec: WorkerSpec, share: _Share) -> tuple[Worker, ShardServer]:
    """A worker that asks others for the rows that it does not have, and what answers them."""
    loader = ShardLoader(spec, share.placement)
    own = loader.held([share.worker])
    reached = own
    if loader.is_mapped:
        here = ray.get_runtime_context().get_node_id()
        neighbours = (worker for worker, node in enumerate(share.peers.nodes) if node == here)
        reached = loader.held({*neighbours, share.worker})
    tables = ShardedTables(share.placement, reached, _exchange_with(share.peers.actors))
    evaluator = ExactEvaluator(loader.adapter, tables, kept_bytes=kept_bytes(spec.memory_bytes))
    return Worker(spec, evaluator, loader), ShardServer(own.values(), num_threads=spec.threads)


def start_actor(num_cpus: int, memory_bytes: int | None) -> Any:
    """A worker that is being started. Ray starts it again whenever it dies, on any machine with room for it.

    What it was at is not done again by Ray but by who gave it, so that each try is counted.
    """
    remote: Any = ray.remote  # whose types know no concurrency groups
    actor = remote(
        num_cpus=num_cpus,
        max_restarts=-1,
        max_task_retries=0,
        concurrency_groups={_PREPARE: 1, _LOOKUPS: LOOKUP_THREADS, _PULSE: 1},
        **({"memory": memory_bytes} if memory_bytes else {}),
    )(WorkerActor)
    return actor.remote()


def _exchange_with(peers: Sequence[Any]) -> Exchange:
    """Requests to other workers, which answer at the same time. A worker asks for one batch at a time."""

    def exchange(requests: Mapping[int, Request]) -> Callable[[], dict[int, NDArray[np.float32]]]:
        sent = {worker: peers[worker].answer.remote(request) for worker, request in requests.items()}
        return lambda: {worker: _answer(reference, worker) for worker, reference in sent.items()}

    return exchange


def _answer(reference: Any, worker: int) -> NDArray[np.float32]:
    try:
        answer: NDArray[np.float32] | LowprecError = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise RuntimeError(f"worker {worker} failed to look up rows: {error.cause!r}") from error
    except ray.exceptions.RayError as error:
        raise WorkerError(
            f"rows of worker {worker} cannot be looked up: {type(error).__name__}: {str(error).splitlines()[0]}; "
            "resume the run when the cluster is well"
        ) from error
    if isinstance(answer, LowprecError):
        raise answer
    return answer
