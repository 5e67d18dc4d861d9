"""Workers as Ray actors: who does what is decided here, in the driver, which alone counts results."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import ray

from lowprec.core.errors import LowprecError, PoisonedWorkError, WorkerError
from lowprec.evaluation.workers.ray.actor import start_actor
from lowprec.evaluation.workers.ray.connect import init_ray
from lowprec.evaluation.workers.ray.dispatch import Dispatch
from lowprec.evaluation.workers.ray.liveness import Timeouts, Watch, memory_hint
from lowprec.evaluation.workers.worker import Chunk, RowCheck, Summable, Task, WorkerSpec
from lowprec.shards.planner import Placement
from lowprec.traffic import TrafficWindow

__all__ = ["RayWorkers"]

T = TypeVar("T", bound=Summable)
P = TypeVar("P")

# Tasks queued at one worker: it never waits for the driver, and little is lost when it dies.
TASKS_IN_FLIGHT = 2
# Results wait for those before them: so many of each worker, or as many as take this memory.
TASKS_AHEAD, MAX_AHEAD_BYTES = 8, 256 << 20
# Work that ended so often without a result is set aside.
MAX_TRIES = 3
# How long to wait for something to happen before looking after workers.
LOOK_EVERY_S = 0.2


class RayWorkers:
    """Evaluation workers on Ray. One that dies is started again and its tasks are done again, each counted once."""

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        num_workers: int,
        address: str | None,
        placement: Placement | None = None,
        timeouts: Timeouts = Timeouts(),  # noqa: B008  (frozen)
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Start `num_workers` actors; `address=None` starts Ray on this machine until `close`.

        placement: which of them holds which rows; without it, each of them holds all. A task that takes longer than
        timeouts.task_s is taken for hung, and so is a worker that does not answer for timeouts.hung_s: it is killed.
        `note` is told what happens to workers.
        """
        assert placement is None or placement.num_workers == num_workers
        self._note, self._timeouts = note, timeouts
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            is_here = init_ray(num_workers * spec.threads, address)
            if is_here and spec.memory_bytes:
                _check_memory(num_workers, spec.memory_bytes)
        self._actors: tuple[Any, ...] = ()
        memory = f" and {spec.memory_bytes / 1e9:.1f} GB" if spec.memory_bytes else ""
        try:
            self._actors = tuple(start_actor(spec.threads, spec.memory_bytes) for _ in range(num_workers))
            shared_spec, shared_placement = ray.put(spec), ray.put(placement)
            self._watch = Watch(
                self._actors,
                lambda worker, peers: self._actors[worker].prepare.remote(shared_spec, shared_placement, worker, peers),
                timeouts,
                note,
            )
            self._watch.start(f"{spec.threads} CPU{memory}")
        except BaseException:
            self.close()
            raise

    def run(self, window: TrafficWindow, tasks: Sequence[Task[T]]) -> Iterator[Chunk[T]]:
        """The chunk of every task, in order; a task goes to whichever worker is free.

        Raises `PoisonedWorkError` for a task that came to nothing three times.
        """
        # All together: what tasks have in common is sent once to a machine.
        work = [ray.put((window, tasks))]
        return self._work(
            tasks,
            lambda actor, number: actor.run.remote(work, number),
            lambda task: f"{type(task).__name__} of batches {task.batches[0]} to {task.batches[-1]}",
        )

    def check_rows(self, checks: Sequence[RowCheck]) -> Iterator[str | None]:
        """What is wrong with each range of rows, in order."""
        return self._work(checks, lambda actor, number: actor.check_rows.remote(checks[number]), str)

    def process_ids(self) -> list[int]:
        """The process of every worker, as last heard."""
        return [pulse.process_id if (pulse := self._watch.pulse(w)) else 0 for w in range(len(self._actors))]

    def node_ids(self) -> list[str]:
        """The machine of every worker, as last heard."""
        return list(self._watch.peers.nodes)

    def close(self) -> None:
        """Stop the actors, and Ray where it was started here."""
        try:
            for actor in self._actors:
                ray.kill(actor)
        finally:
            if self._owns_ray:
                ray.shutdown()

    def _work(
        self, pieces: Sequence[P], send: Callable[[Any, int], Any], describe: Callable[[P], str]
    ) -> Iterator[Any]:
        work = _Work(self._actors, self._watch, pieces, send, describe)
        return work.results(self._timeouts.task_s, self._note)


def _check_memory(num_workers: int, memory_bytes: int) -> None:
    """Refuse workers that this machine can never have at once, instead of waiting for them."""
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    if total.get("memory", 0) < num_workers * memory_bytes:
        ray.shutdown()
        needed, there = (
            f"{num_workers} workers of {memory_bytes / 1e9:.1f} GB",
            f"{total.get('memory', 0) / 1e9:.1f} GB",
        )
        raise WorkerError(
            f"{needed} need more than the {there} that Ray gives workers on this machine; "
            "lower evaluation.worker_memory or evaluation.num_workers, or name a cluster in evaluation.address"
        )


class _Work(Generic[P]):
    """Pieces of work being done by watched actors."""

    def __init__(
        self,
        actors: Sequence[Any],
        watch: Watch,
        pieces: Sequence[P],
        send: Callable[[Any, int], Any],
        describe: Callable[[P], str],
    ) -> None:
        self._actors, self._watch, self._pieces, self._send, self._describe = actors, watch, pieces, send, describe
        self._dispatch = Dispatch(len(pieces), len(actors), in_flight=TASKS_IN_FLIGHT, ahead=TASKS_AHEAD * len(actors))
        self._is_sized = False
        self._sent: dict[Any, tuple[int, int]] = {}
        self._done: dict[int, Any] = {}
        # The piece that each worker is at, and since when.
        self._at: dict[int, tuple[int, float]] = {}

    def results(self, timeout_s: float, note: Callable[[str], None]) -> Iterator[Any]:
        """The result of every piece, in order, whatever happens to workers meanwhile."""
        try:
            for wanted in range(len(self._pieces)):
                while wanted not in self._done:
                    self._watch.look()
                    self._give()
                    self._stop_hung(timeout_s, note)
                    for reference in self._ready():
                        # One that was lost took all references of its worker with it.
                        if reference in self._sent:
                            self._take(reference, note)
                yield self._done.pop(wanted)
        finally:
            # Whoever drops this generator late must not start another Ray by it.
            for reference in self._sent if ray.is_initialized() else ():
                ray.cancel(reference)

    def _give(self) -> None:
        while (given := self._dispatch.next(self._watch.up)) is not None:
            piece, worker = given
            self._sent[self._send(self._actors[worker], piece)] = piece, worker

    def _ready(self) -> list[Any]:
        """References of results that are there, in the order of work; waits a little for the first."""
        ray.wait([*self._sent, *self._watch.references], timeout=LOOK_EVERY_S)
        if not self._sent:
            return []
        # A worker's results come before its death: what it had finished must not be held against it.
        return ray.wait(list(self._sent), num_returns=len(self._sent), timeout=0)[0]

    def _take(self, reference: Any, note: Callable[[str], None]) -> None:
        piece, worker = self._sent.pop(reference)
        try:
            result = ray.get(reference)
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError):
            self._lost(worker, note)
        except ray.exceptions.RayTaskError as error:
            hint = memory_hint(self._watch.pulse(worker)) if _is_for_want_of_memory(error.cause) else ""
            self._failed(piece, repr(error.cause), note, hint)
        except ray.exceptions.RayError as error:  # the result was lost with its machine
            self._failed(piece, f"{type(error).__name__}: {str(error).splitlines()[0]}", note)
        else:
            if isinstance(result, LowprecError):
                raise result
            self._dispatch.finished(piece)
            if not self._is_sized:
                self._is_sized = True
                self._dispatch.ahead = max(self._dispatch.ahead, MAX_AHEAD_BYTES // len(pickle.dumps(result)))
            self._watch.finished(worker)
            self._done[piece] = result

    def _lost(self, worker: int, note: Callable[[str], None]) -> None:
        place, pulse = self._watch.place(worker), self._watch.pulse(worker)
        self._sent = {ref: where for ref, where in self._sent.items() if where[1] != worker}
        piece = self._dispatch.lost(worker, f"{place} died")
        note(f"{place} died" + ("" if piece is None else f" at {self._describe(self._pieces[piece])}, done again"))
        if piece is not None:
            self._check_not_poisoned(piece, memory_hint(pulse))
        self._watch.lost(worker)

    def _failed(self, piece: int, how: str, note: Callable[[str], None], hint: str = "") -> None:
        self._dispatch.failed(piece, how)
        note(f"{self._describe(self._pieces[piece])} failed and is tried again: {how}")
        self._check_not_poisoned(piece, hint)

    def _check_not_poisoned(self, piece: int, hint: str) -> None:
        failures = self._dispatch.failures[piece]
        if len(failures) < MAX_TRIES:
            return
        work = self._describe(self._pieces[piece])
        hows = [failure.how for failure in failures]
        raise PoisonedWorkError(
            f"{work} came to nothing {len(failures)} times and is set aside: {'; '.join(hows)}"
            + (hint or "; resume when the cause is mended"),
            work=work,
            tries=hows,
        )

    def _stop_hung(self, timeout_s: float, note: Callable[[str], None]) -> None:
        now = time.monotonic()
        for worker in range(len(self._actors)):
            pieces = self._dispatch.at(worker)
            if not pieces:
                self._at.pop(worker, None)
            elif worker not in self._at or self._at[worker][0] != pieces[0]:
                self._at[worker] = pieces[0], now
            elif now - self._at[worker][1] > timeout_s:
                self._at[worker] = pieces[0], now
                note(
                    f"{self._watch.place(worker)} has been at {self._describe(self._pieces[pieces[0]])} for "
                    f"{timeout_s:g} s (evaluation.task_timeout_s): it is killed, and that is done again"
                )
                self._watch.kill(worker)


def _is_for_want_of_memory(error: BaseException) -> bool:
    """PyTorch has no error of its own for it."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)
