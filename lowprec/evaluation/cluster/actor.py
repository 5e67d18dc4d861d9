"""A worker in a process of its own, as a Ray actor."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from lowprec.errors import LowprecError, WorkerError
from lowprec.evaluation.exact import ExactEvaluator
from lowprec.evaluation.memory import MemoryUse, memory_use
from lowprec.evaluation.worker import (
    Chunk,
    HeldShards,
    RowCheck,
    ShardLoader,
    Task,
    Worker,
    WorkerSpec,
)
from lowprec.shards.estimate import kept_bytes
from lowprec.shards.planner import Placement
from lowprec.shards.server import ShardServer
from lowprec.shards.sharded import Exchange, ShardedTables
from lowprec.shards.wire import Request
from lowprec.traffic import TrafficWindow

__all__ = ["Peers", "Pulse", "Share", "start_actor"]

_LOOKUPS, _PULSE = "lookups", "pulse"
# Threads of a worker that answer others while it evaluates: one computes while another is waited for.
LOOKUP_THREADS = 2


@dataclass(frozen=True)
class Share:
    """What a worker holds of a placement."""

    placement: Placement
    worker: int


@dataclass(frozen=True)
class Peers:
    """All workers, and the machines that they run on: rows of the same machine are mapped, others asked for."""

    actors: tuple[Any, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Pulse:
    """What a worker that lives says of itself."""

    process_id: int
    node_id: str
    memory: MemoryUse


class WorkerActor:
    """A worker in a process of its own. Errors of ours come back as values, so that the driver sees them unwrapped.

    Tasks come one at a time; meanwhile other threads look up what other workers ask of its shards. Neither keeps
    anything that would be missed: a worker that was restarted loads its rows again and goes on.
    """

    def __init__(self, spec: WorkerSpec, share: Share | None) -> None:
        self._spec, self._share = spec, share
        self._loading = Lock()
        self._worker: Worker | None = None
        self._sharded: tuple[ShardLoader, HeldShards, ShardServer] | None = None
        self._window: tuple[Any, TrafficWindow] | None = None

    def ready(self, peers: Peers) -> LowprecError | None:
        """Load the model and the rows; tasks do it where this was not called."""
        try:
            self._ready(peers)
            return None
        except LowprecError as error:
            return error

    def run(self, window: list[Any], task: Task[Any], peers: Peers) -> Chunk[Any] | LowprecError:
        """Do a task; `window` holds one reference, fetched once: a window kept open reads on where it left off."""
        try:
            worker = self._ready(peers)
            if self._window is None or self._window[0] != window[0]:
                self._window = (window[0], ray.get(window[0]))
            return worker.run(self._window[1], task)
        except LowprecError as error:
            return error

    def check_rows(self, check: RowCheck, peers: Peers) -> str | LowprecError | None:
        """What is wrong with the first row of a range that has no form at a precision."""
        try:
            return self._ready(peers).check_rows(check)
        except LowprecError as error:
            return error

    @ray.method(concurrency_group=_LOOKUPS, max_task_retries=-1)
    def answer(self, request: Request) -> NDArray[np.float32] | LowprecError:
        """Look up rows of this worker's shards for another one, which waits while this one is started again."""
        torch.set_num_threads(self._spec.threads)  # of this thread
        try:
            *_, server = self._load()
            return server.answer(request)
        except LowprecError as error:
            return error

    @ray.method(concurrency_group=_PULSE)
    def pulse(self) -> Pulse:
        """That this worker lives; answered whatever else it does."""
        return Pulse(os.getpid(), str(ray.get_runtime_context().get_node_id()), memory_use())

    def _ready(self, peers: Peers) -> Worker:
        if self._worker is None:
            self._worker = Worker(self._spec) if self._share is None else self._sharded_worker(peers, self._share)
        return self._worker

    def _sharded_worker(self, peers: Peers, share: Share) -> Worker:
        loader, held, _ = self._load()
        if loader.is_mapped:
            here = ray.get_runtime_context().get_node_id()
            neighbours = (worker for worker, node in enumerate(peers.nodes) if node == here)
            held = loader.held({*neighbours, share.worker})
        tables = ShardedTables(share.placement, held, _exchange_with(peers.actors))
        evaluator = ExactEvaluator(loader.adapter, tables, kept_bytes=kept_bytes(self._spec.memory_bytes))
        return Worker(self._spec, evaluator, loader)

    def _load(self) -> tuple[ShardLoader, HeldShards, ShardServer]:
        with self._loading:
            if self._sharded is None:
                assert self._share is not None, "a worker without a share is not asked for rows"
                loader = ShardLoader(self._spec, self._share.placement)
                held = loader.held([self._share.worker])
                self._sharded = loader, held, ShardServer(held.values())
            return self._sharded


def start_actor(spec: WorkerSpec, share: Share | None) -> Any:
    """A worker that is being started. Ray starts it again whenever it dies, on any machine with room for it.

    What it was at is not done again by Ray but by who gave it, so that each try is counted.
    """
    remote: Any = ray.remote  # whose types know no concurrency groups
    options = {"memory": spec.memory_bytes} if spec.memory_bytes else {}
    actor = remote(
        num_cpus=spec.threads,
        max_restarts=-1,
        max_task_retries=0,
        concurrency_groups={_LOOKUPS: LOOKUP_THREADS, _PULSE: 1},
        **options,
    )(WorkerActor)
    return actor.remote(spec, share)


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
