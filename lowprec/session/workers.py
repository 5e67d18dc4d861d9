"""The workers of a session: this process or Ray actors, as the config asks for and as the work is worth it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lowprec.evaluation.workers.auto_workers import Work, WorkersChoice, choose_workers, work_seconds
from lowprec.evaluation.workers.worker import LocalWorkers, Workers
from lowprec.session.session import Session

__all__ = ["choose_workers_for", "open_workers"]


def choose_workers_for(session: Session, work: Work) -> WorkersChoice:
    """How many workers a session gets for some work, and why."""

    def seconds() -> float:
        return work_seconds(session.spec, session.adapter, work)

    return choose_workers(session.config.evaluation, has_rows=session.adapter.has_rows, seconds=seconds)


@contextmanager
def open_workers(session: Session, work: Work, note: Callable[[str], None] = lambda _: None) -> Iterator[Workers]:
    """The workers that the config asks for, Ray actors or this process.

    work: what they are for. `note` receives the choice where `evaluation.num_workers` is auto, and what happens to the
    workers.
    """
    workers: Workers
    where = session.config.evaluation
    choice = choose_workers_for(session, work)
    if where.num_workers == "auto":
        note(str(choice))
    if choice.num_workers == 0:
        workers = LocalWorkers(session.spec, session.adapter)
    else:
        from lowprec.evaluation.workers.ray import RayWorkers, Timeouts

        workers = RayWorkers(
            session.spec,
            num_workers=choice.num_workers,
            address=where.address,
            placement=session.placement,
            timeouts=Timeouts(where.task_timeout_s, where.hung_after_s, where.start_timeout_s),
            note=note,
        )
    try:
        yield workers
    finally:
        workers.close()
