"""One evaluator: holds the model, reads its share of a window, returns sums. It knows nothing of where it runs."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from lowprec import ops
from lowprec.core.errors import WeightError
from lowprec.evaluation.exact.exact_evaluator import ExactEvaluator
from lowprec.evaluation.metrics import Sums
from lowprec.models.adapter import ModelAdapter
from lowprec.models.checkpoints.checkpoint import load_checkpoint, load_dense
from lowprec.models.factory import build_model, without_table_init
from lowprec.models.outputs import OutputCount, Outputs
from lowprec.plan import Forms, Plan, Precision, RowRange
from lowprec.shards import LocalTables, TableShard, hot_tables
from lowprec.shards.estimate import kept_bytes
from lowprec.shards.planner import Placement, Shard
from lowprec.traffic import BadRow, Schema, TrafficWindow
from lowprec.traffic.batch import Batch

__all__ = [
    "Chunk",
    "ExactTask",
    "HeldShards",
    "LocalWorkers",
    "RowCheck",
    "ShardLoader",
    "Summable",
    "T",
    "Task",
    "Worker",
    "WorkerSpec",
    "Workers",
    "evaluator_of",
    "load_adapter",
    "load_adapter_without_rows",
]


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker needs to become ready, small enough to send anywhere.

    row_ranges: by table; minmax for one left out. checkpoint_stamp: that of the checkpoint when the run began, None
    where it was not taken. memory_bytes: what the worker may use, None without a limit. outputs: what a model returns.
    """

    factory: str
    args: dict[str, Any]
    checkpoint: str
    schema: Schema
    threads: int
    row_ranges: Mapping[str, RowRange] = field(default_factory=dict)
    import_paths: tuple[str, ...] = ()
    memory_bytes: int | None = None
    checkpoint_stamp: str | None = None
    outputs: Outputs = "logits"


class Summable(Protocol):
    """Sums over examples: associative up to rounding."""

    def __add__(self, other: Self) -> Self: ...


HeldShards = dict[tuple[str, int], TableShard]
T = TypeVar("T", bound=Summable)
T_co = TypeVar("T_co", bound=Summable, covariant=True)


class Task(Protocol[T_co]):
    """A piece of work, the same whoever does it: something to sum up over given batches of a window."""

    @property
    def batches(self) -> tuple[int, ...]:
        """The batches, in the order in which they are added up."""

    @property
    def keep(self) -> str | None:
        """A name of the window, where later tasks will come back to these batches; None where each is read once."""

    @property
    def forms(self) -> Forms:
        """How layers are stored and computed at precisions that leave a choice."""

    def sums(self, evaluator: ExactEvaluator, batch: Batch) -> T_co:
        """What one batch adds."""


@dataclass(frozen=True)
class ExactTask:
    """Plans, evaluated exactly on every row of the batches."""

    plans: tuple[Plan, ...]
    batches: tuple[int, ...]
    keep: None = None
    forms: Forms = field(default_factory=dict)

    def sums(self, evaluator: ExactEvaluator, batch: Batch) -> Sums:
        """The sums of the reference and of the plans over the batch."""
        return evaluator.sums(batch, self.plans)


@dataclass(frozen=True)
class Chunk(Generic[T]):
    """What a task gives back: sums, what was wrong with the rows, how many ids and bags each table was asked for.

    outputs: how many outputs of the reference look like probabilities.
    """

    sums: T
    num_rows_read: int
    bad_rows: tuple[BadRow, ...] = ()
    out_of_range: dict[str, int] = field(default_factory=dict)
    lookups: dict[str, int] = field(default_factory=dict)
    bags: dict[str, int] = field(default_factory=dict)
    outputs: OutputCount = field(default_factory=OutputCount)


class Workers(Protocol):
    """Somebody who does tasks. Results come in the order of tasks, whatever the order of work."""

    def run(self, window: TrafficWindow, tasks: Sequence[Task[T]]) -> Iterator[Chunk[T]]:
        """The chunk of every task, in order."""

    def check_rows(self, checks: Sequence[RowCheck]) -> Iterator[str | None]:
        """What is wrong with each range of rows, in order; None where nothing is."""

    def close(self) -> None:
        """Give back what the workers hold."""


@dataclass(frozen=True)
class RowCheck:
    """Rows [first_row, end_row) of a table, to look for one that a precision has no stored form for."""

    table: str
    first_row: int
    end_row: int
    precision: Precision

    def __str__(self) -> str:
        return f'rows {self.first_row} to {self.end_row} of "{self.table}" at {self.precision}'


def load_adapter(spec: WorkerSpec) -> ModelAdapter:
    """Build the model without committing memory for its tables, and load its checkpoint."""
    model = _build(spec, without_rows=False)
    load_checkpoint(model, spec.checkpoint, stamp=spec.checkpoint_stamp)
    return ModelAdapter(model, spec.outputs)


def load_adapter_without_rows(spec: WorkerSpec) -> ModelAdapter:
    """Build the model and load its dense part, for who only wants to know its tables."""
    model = _build(spec, without_rows=True)
    load_dense(model, spec.checkpoint, stamp=spec.checkpoint_stamp)
    return ModelAdapter(model, spec.outputs)


class ShardLoader:
    """The model without its tables' rows, and the rows of a placement for who asks for them."""

    def __init__(self, spec: WorkerSpec, placement: Placement) -> None:
        """Build the model and load its dense part."""
        model = _build(spec, without_rows=True)
        self._spec, self._placement = spec, placement
        self._rows = load_dense(model, spec.checkpoint, stamp=spec.checkpoint_stamp)
        self.adapter = ModelAdapter(model, spec.outputs)
        self._names, self._hot = self.adapter.weight_names, hot_tables(self.adapter.shapes)

    @property
    def is_mapped(self) -> bool:
        """Whether rows are mapped files, which processes of a machine share: holding more of them costs no memory."""
        return self._rows.is_mapped

    def rows(self, table: str, first_row: int, end_row: int) -> Tensor:
        """Rows of a table, float32[end_row - first_row, dim], whoever holds them."""
        return self._rows.rows(self._names[table], first_row, end_row)

    def held(self, workers: Iterable[int]) -> HeldShards:
        """The shards of some workers, and the tables that all of them hold, by table and first row."""
        wanted, found = set(workers), {}
        copies = (Shard(name, 0, self._placement.table[name].num_rows, -1) for name in self._placement.replicated)
        for shard in (*copies, *(s for s in self._placement.shards if s.worker in wanted)):
            found[shard.table, shard.first_row] = TableShard(
                shard.table,
                self.rows(shard.table, shard.first_row, shard.end_row),
                row_range=self._spec.row_ranges.get(shard.table, RowRange.MINMAX),
                is_hot=shard.table in self._hot and shard.num_rows == self._placement.table[shard.table].num_rows,
                first_row=shard.first_row,
            )
        return found


def _build(spec: WorkerSpec, *, without_rows: bool) -> nn.Module:
    for path in spec.import_paths:
        if path not in sys.path:
            sys.path.append(path)
    with without_table_init(without_rows=without_rows):
        return build_model(spec.factory, spec.args, spec.schema)


def evaluator_of(spec: WorkerSpec, adapter: ModelAdapter) -> ExactEvaluator:
    """An evaluator of a loaded model, with the ranges of rows that the spec says."""
    return ExactEvaluator(
        adapter, LocalTables(adapter.weights, spec.row_ranges), kept_bytes=kept_bytes(spec.memory_bytes)
    )


class Worker:
    """A ready evaluator."""

    def __init__(
        self, spec: WorkerSpec, evaluator: ExactEvaluator | None = None, loader: ShardLoader | None = None
    ) -> None:
        """Load the model with all its rows, or use the evaluator at hand, and fix the number of threads.

        loader: has the rows of an evaluator that has none.
        """
        self._threads = spec.threads
        torch.set_num_threads(spec.threads)
        self._evaluator = evaluator or evaluator_of(spec, load_adapter(spec))
        self._loader = loader

    def run(self, window: TrafficWindow, task: Task[T]) -> Chunk[T]:
        """Do one task. The same task gives the same bits in any worker with as many threads."""
        torch.set_num_threads(self._threads)
        evaluator = self._evaluator
        sums: T | None = None
        bad_rows: list[BadRow] = []
        out_of_range: Counter[str] = Counter()
        before, outputs_before = (dict(evaluator.lookups), dict(evaluator.bags)), evaluator.outputs
        num_rows_read = 0
        for k in task.batches:
            batch = window.batch(k) if task.keep is None else self._kept(window, task.keep, k)
            with evaluator.using(task.forms):
                batch_sums = task.sums(evaluator, batch)
            sums = batch_sums if sums is None else sums + batch_sums
            bad_rows.extend(batch.bad_rows)
            num_rows_read += batch.num_rows + len(batch.bad_rows)
            out_of_range.update(batch.out_of_range)
        assert sums is not None, "a task has at least one batch"
        lookups, bags = (
            {name: count - then[name] for name, count in now.items()}
            for now, then in zip((evaluator.lookups, evaluator.bags), before, strict=True)
        )
        outputs = evaluator.outputs - outputs_before
        return Chunk(sums, num_rows_read, tuple(bad_rows), dict(out_of_range), lookups, bags, outputs)

    def check_rows(self, check: RowCheck) -> str | None:
        """What is wrong with the first of some rows that has no stored form; None where all have one."""
        table, first, end = check.table, check.first_row, check.end_row
        if self._loader is None:
            rows = self._evaluator.adapter.weights[table][first:end]
        else:
            rows = self._loader.rows(table, first, end)
        try:
            ops.check_rows(rows.numpy(), check.precision, num_threads=self._threads, first_row=first)
        except WeightError as error:
            return f'"{table}": {error}'
        return None

    def _kept(self, window: TrafficWindow, name: str, k: int) -> Batch:
        return self._evaluator.kept.get((name, k), lambda: window.batch(k), lambda batch: batch.nbytes)


class LocalWorkers:
    """One worker in this process."""

    def __init__(self, spec: WorkerSpec, adapter: ModelAdapter | None = None) -> None:
        """Make the worker ready; restores the number of threads when closed."""
        self._threads_before = torch.get_num_threads()
        self._worker = Worker(spec, evaluator_of(spec, adapter) if adapter else None)

    def run(self, window: TrafficWindow, tasks: Sequence[Task[T]]) -> Iterator[Chunk[T]]:
        """The chunk of every task, in order."""
        return (self._worker.run(window, task) for task in tasks)

    def check_rows(self, checks: Sequence[RowCheck]) -> Iterator[str | None]:
        """What is wrong with each range of rows, in order."""
        return (self._worker.check_rows(check) for check in checks)

    def close(self) -> None:
        """Give the threads back."""
        torch.set_num_threads(self._threads_before)
