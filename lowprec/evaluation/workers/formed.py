"""Workers that know how layers are stored and computed: what a search finds out after its workers have begun."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic

from lowprec.evaluation.exact.exact_evaluator import ExactEvaluator
from lowprec.evaluation.workers.worker import Chunk, RowCheck, T, Task, Workers
from lowprec.plan import Forms
from lowprec.traffic import TrafficWindow
from lowprec.traffic.batch import Batch

__all__ = ["FormedWorkers"]


@dataclass(frozen=True)
class _FormedTask(Generic[T]):
    """A task in which layers have these forms."""

    task: Task[T]
    forms: Forms

    @property
    def batches(self) -> tuple[int, ...]:
        return self.task.batches

    @property
    def keep(self) -> str | None:
        return self.task.keep

    def sums(self, evaluator: ExactEvaluator, batch: Batch) -> T:
        """What one batch adds."""
        with evaluator.using(self.forms):
            return self.task.sums(evaluator, batch)


class FormedWorkers:
    """Workers for whose tasks layers have the forms of a run."""

    def __init__(self, workers: Workers, forms: Forms) -> None:
        """Send the forms along with every task."""
        self._workers, self._forms = workers, dict(forms)

    def run(self, window: TrafficWindow, tasks: Sequence[Task[T]]) -> Iterator[Chunk[T]]:
        """The chunk of every task, in order."""
        formed: list[Task[T]] = [_FormedTask(task, self._forms) for task in tasks]
        return self._workers.run(window, formed)

    def check_rows(self, checks: Sequence[RowCheck]) -> Iterator[str | None]:
        """What is wrong with each range of rows, in order."""
        return self._workers.check_rows(checks)

    def close(self) -> None:
        """Give back what the workers hold."""
        self._workers.close()
