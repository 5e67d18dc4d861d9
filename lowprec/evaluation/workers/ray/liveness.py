"""Which workers live. Each is asked again and again; one that does not answer is killed, and started again by Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import ray

from lowprec.core.errors import LowprecError, WorkerError
from lowprec.core.timeouts import HUNG_S, START_S, TASK_S
from lowprec.evaluation.workers.ray.actor import Peers, Pulse

__all__ = ["Timeouts", "Watch", "memory_hint"]

PULSE_EVERY_S = 5.0
# A worker that is being started is asked more often: work waits for it.
START_PULSE_EVERY_S = 0.2
# After so long one is told what is waited for.
START_SAID_AFTER_S = 10.0
# A worker that was lost so often without finishing anything is given up: it would be for ever.
MAX_LOSSES_IN_A_ROW = 3


@dataclass(frozen=True)
class Timeouts:
    """How long to wait for workers, in seconds.

    task_s: for a task. hung_s: for an answer; nothing that a worker does keeps it from answering for so long. start_s:
    for one to be started: a cluster that grows by itself takes minutes, in one that is too small work would wait for
    ever.
    """

    task_s: float = TASK_S
    hung_s: float = HUNG_S
    start_s: float = START_S


@dataclass
class _Seen:
    """What is known of a worker: `starting` until it answers, `loading` until it has its rows, then `up`.

    silent_since: since when an answer could have come and did not; None while it has no process, or has answered.
    """

    state: Literal["starting", "loading", "up"]
    heard_at: float
    asked_at: float = 0.0
    asked: Any = None
    loading: Any = None
    pulse: Pulse | None = None
    silent_since: float | None = None
    losses_in_a_row: int = 0


class Watch:
    """Some actors, from their start to their end."""

    def __init__(
        self,
        actors: tuple[Any, ...],
        prepare: Callable[[int, Peers], Any],
        timeouts: Timeouts,
        note: Callable[[str], None],
    ) -> None:
        """Watch `actors`, which are being started; `note` is told what happens to them.

        prepare: lets a worker load what it needs; whoever was started again does so again.
        """
        self._actors, self._prepare, self._timeouts, self._note = actors, prepare, timeouts, note
        self._seen = [_Seen("starting", time.monotonic()) for _ in actors]

    @property
    def up(self) -> list[int]:
        """The workers that have all that they need."""
        return [number for number, seen in enumerate(self._seen) if seen.state == "up"]

    @property
    def started(self) -> list[int]:
        """The workers that have answered since they were last started."""
        return [number for number, seen in enumerate(self._seen) if seen.state != "starting"]

    @property
    def peers(self) -> Peers:
        """All workers and where they were last heard from."""
        return Peers(self._actors, tuple(seen.pulse.node_id if seen.pulse else "" for seen in self._seen))

    @property
    def references(self) -> list[Any]:
        """What is waited for, for `ray.wait`."""
        return [ref for seen in self._seen for ref in (seen.asked, seen.loading) if ref is not None]

    def pulse(self, worker: int) -> Pulse | None:
        """What a worker said last, maybe before it was lost."""
        return self._seen[worker].pulse

    def place(self, worker: int) -> str:
        """A worker in words."""
        pulse = self.pulse(worker)
        return f"worker {worker}" + (f" (process {pulse.process_id} on node {pulse.node_id[:8]})" if pulse else "")

    def start(self, needs: str) -> None:
        """Wait until every worker has answered; they load their rows while the driver goes on.

        needs: what each of them needs, in words. Raises `WorkerError` where the cluster has no room for all.
        """
        began = time.monotonic()
        is_said = False
        while len(self.started) < len(self._seen):
            waited = time.monotonic() - began
            state = f"{len(self.started)} of {len(self._seen)} workers in {waited:.0f} s, each on {needs}"
            if waited > self._timeouts.start_s:
                raise WorkerError(
                    f"Ray started {state}, and has {_left()} left; lower evaluation.num_workers or what a worker takes "
                    "(evaluation.worker_memory, evaluation.threads_per_worker), or make the cluster larger "
                    "(evaluation.start_timeout_s is how long to wait for it)"
                )
            if waited > START_SAID_AFTER_S and not is_said:
                is_said = True
                self._note(
                    f"Ray has started {state}, and has {_left()} left; waiting for up to {self._timeouts.start_s:g} s "
                    "(evaluation.start_timeout_s)"
                )
            self.look()
            ray.wait(self.references, timeout=START_PULSE_EVERY_S)

    def look(self) -> None:
        """See to every worker, without waiting.

        Raises what a worker raised while it loaded, and `WorkerError` for one that cannot be started.
        """
        for worker, seen in enumerate(self._seen):
            self._listen(worker, seen)
            self._load(worker, seen)
            self._ask(worker, seen)

    def finished(self, worker: int) -> None:
        """A worker has done something."""
        self._seen[worker].losses_in_a_row = 0

    def lost(self, worker: int) -> None:
        """A worker is known to be gone: it has to answer, and to load its rows, before it is up again.

        Raises `WorkerError` for one that was lost again and again.
        """
        seen = self._seen[worker]
        seen.silent_since = None
        if seen.state == "starting":
            return
        # An answer from before its death would make it look alive.
        seen.state, seen.asked, seen.loading, seen.heard_at = "starting", None, None, time.monotonic()
        seen.losses_in_a_row += 1
        if seen.losses_in_a_row >= MAX_LOSSES_IN_A_ROW:
            raise WorkerError(
                f"{self.place(worker)} died {seen.losses_in_a_row} times in a row without finishing anything"
                f"{memory_hint(seen.pulse)}"
            )

    def kill(self, worker: int) -> None:
        """Kill a worker's process, also one that does nothing any more; Ray starts another one."""
        # It is counted anew: Ray may lose that it was told, and the next process may hang as well.
        self._seen[worker].asked_at, self._seen[worker].silent_since = time.monotonic(), None
        ray.kill(self._actors[worker], no_restart=False)

    def _listen(self, worker: int, seen: _Seen) -> None:
        if seen.asked is None or not _is_there(seen.asked):
            return
        asked, seen.asked = seen.asked, None
        try:
            pulse: Pulse = ray.get(asked)
        except ray.exceptions.ActorDiedError as error:
            raise WorkerError(
                f"{self.place(worker)} ended and is not started again: {' '.join(str(error).split())}; look at the "
                "cluster, then resume"
            ) from error
        except ray.exceptions.RayTaskError as error:
            raise WorkerError(f"{self.place(worker)} cannot say how it is: {error.cause!r}") from error
        except ray.exceptions.RayError:
            self.lost(worker)
            return
        is_new = seen.pulse is None or seen.pulse.process_id != pulse.process_id
        seen.heard_at, seen.pulse, seen.silent_since = time.monotonic(), pulse, None
        if is_new or seen.state == "starting":
            seen.state = "loading"

    def _load(self, worker: int, seen: _Seen) -> None:
        if seen.state != "loading":
            return
        if seen.loading is None:
            if all(other.pulse for other in self._seen):
                seen.loading = self._prepare(worker, self.peers)
        elif _is_there(seen.loading):
            loading, seen.loading = seen.loading, None
            try:
                error: LowprecError | None = ray.get(loading)
            except ray.exceptions.RayTaskError as failure:
                raise WorkerError(f"{self.place(worker)} failed to load its rows: {failure.cause!r}") from failure
            except ray.exceptions.RayError:
                self.lost(worker)
                return
            if error is not None:
                raise error
            seen.state = "up"

    def _ask(self, worker: int, seen: _Seen) -> None:
        now = time.monotonic()
        if seen.asked is None:
            if now - seen.asked_at > (
                min(PULSE_EVERY_S, self._timeouts.hung_s) if seen.state == "up" else START_PULSE_EVERY_S
            ):
                seen.asked, seen.asked_at = self._actors[worker].pulse.remote(), now
        elif self._is_hung(worker, seen, now):
            self._note(
                f"{self.place(worker)} has not answered for {self._timeouts.hung_s:g} s (evaluation.hung_after_s): it "
                "is killed and started again"
            )
            self.kill(worker)
        if seen.state == "starting" and seen.pulse is not None and now - seen.heard_at > self._timeouts.start_s:
            raise WorkerError(
                f"{self.place(worker)} is gone and was not started again in {self._timeouts.start_s:g} s "
                "(evaluation.start_timeout_s): the cluster has no "
                "room for it; add a machine, or resume with fewer workers (evaluation.num_workers)"
            )

    def _is_hung(self, worker: int, seen: _Seen, now: float) -> bool:
        """Whether a worker was asked, has had a process for so long that it should have answered, and did not."""
        if now - seen.asked_at <= self._timeouts.hung_s:
            return False
        if seen.silent_since is None and seen.state != "starting":
            seen.silent_since = seen.asked_at
        elif seen.silent_since is None and self._has_process(worker):
            # It was asked before it was started, which takes as long as it takes.
            seen.silent_since = now
        return seen.silent_since is not None and now - seen.silent_since > self._timeouts.hung_s

    def _has_process(self, worker: int) -> bool:
        """Whether Ray has started a worker; one that it has yet to start may wait for a machine."""
        # Ray's public way asks a dashboard, which a Ray of our own has none of.
        actor: dict[str, Any] = ray._private.state.actors(self._actors[worker]._actor_id.hex())
        return actor.get("State") == "ALIVE"


def _is_there(reference: Any) -> bool:
    return bool(ray.wait([reference], timeout=0)[0])


def memory_hint(pulse: Pulse | None) -> str:
    """What is known of the memory of a worker that died, and what to do about it."""
    seen = ""
    if pulse is not None:
        limit = f" of {pulse.memory.limit_bytes / 1e9:.2f} GB" if pulse.memory.limit_bytes else ""
        kills = pulse.memory.num_oom_kills
        seen = f" (it was last seen with {pulse.memory.used_bytes / 1e9:.2f} GB{limit} beside mapped files" + (
            f", and the kernel has killed {kills} of its container's processes for want of memory)" if kills else ")"
        )
    return (
        f", most often for want of memory{seen}: give workers more of it (evaluation.worker_memory, and the limit of "
        "their containers) or put fewer of them on a machine, and resume; or begin a new run with a lower "
        "traffic.batch_size"
    )


def _left() -> str:
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return f"{free.get('CPU', 0):g} CPU and {free.get('memory', 0) / 1e9:.1f} GB"
