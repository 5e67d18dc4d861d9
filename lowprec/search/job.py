"""What a config describes, opened: traffic, windows, model, units and space, ready to evaluate."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise

from lowprec import ops
from lowprec.config import Config, WindowConfig
from lowprec.core.errors import ConfigError, TrafficError
from lowprec.evaluation.evaluate import Evaluation, evaluate_plans
from lowprec.evaluation.metrics import Looks
from lowprec.evaluation.profile.profile import Column, columns_of
from lowprec.evaluation.profile.profile_file import ProfileOrigin
from lowprec.evaluation.profile.window_profile import MeasuredProfile, measure_profile
from lowprec.evaluation.rows import RowAccount, TableUse
from lowprec.evaluation.workers.auto_workers import (
    SEARCH_PASSES,
    Work,
    WorkersChoice,
    choose_workers,
    is_ray_job,
    work_seconds,
)
from lowprec.evaluation.workers.worker import (
    LocalWorkers,
    RowCheck,
    Workers,
    WorkerSpec,
    load_adapter,
    load_adapter_without_rows,
)
from lowprec.models.adapter import ModelAdapter, inputs_of
from lowprec.models.checkpoints.checkpoint import checkpoint_sha256, checkpoint_stamp
from lowprec.models.checkpoints.tensor_files import open_tensors
from lowprec.plan import Forms, Plan, PlanFile, Precision, RowRange, Unit, is_layer
from lowprec.search.space.costs import Costs, open_costs
from lowprec.search.space.placement import Demand, demand_of, place
from lowprec.search.space.space import SearchSpace, build_space
from lowprec.shards.planner import Cuts, Placement
from lowprec.storage import Location
from lowprec.traffic import (
    BadRow,
    TrafficReader,
    TrafficWindow,
    check_bad_rows,
    format_window,
    open_traffic,
    parse_window,
    write_quarantine,
)
from lowprec.traffic.window import Window

__all__ = ["Job", "choose_workers_for", "open_job", "open_workers"]

# Rows that are looked through at once, and of a worker's memory where that is limited: a worker that holds others reads
# them for it.
_CHECKED_BYTES, _CHECKED_SHARE = 128 << 20, 1 / 100
# Weights that are read into this process although workers may read them again.
_READ_HERE_BYTES = 1 << 30


@dataclass(frozen=True)
class Job:
    """A config with everything behind it checked and opened once.

    config: as given, with the version of a Delta table that is read where it is traffic, so that what is opened from it
    later reads the same.
    adapter: the model; without rows where workers alone are to have them.
    placement: which worker holds which rows, where no worker can hold them all. forms: of layers, once they are known.
    fp32_layers: those that can be nothing but fp32, with the reason.
    """

    config: Config
    reader: TrafficReader
    adapter: ModelAdapter
    space: SearchSpace
    spec: WorkerSpec
    checkpoint_sha256: str
    features: dict[str, str]
    placement: Placement | None = None
    forms: Forms = field(default_factory=dict)
    fp32_layers: Mapping[str, str] = field(default_factory=dict)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units of the model."""
        return self.space.units

    def window(self, name: str) -> TrafficWindow:
        """The traffic window that the config calls `name`; raises where it is empty."""
        return self.reader.window(_window(self.config, name, self.reader))

    def window_text(self, name: str) -> str:
        """The bounds of a window for people and results."""
        return format_window(_window(self.config, name, self.reader), self.reader.time_unit)

    def evaluated_on(self, name: str, window: TrafficWindow) -> list[object]:
        """All that decides which examples a window gives and what the model makes of them, for the keys of trials."""
        # The version of a Delta table is part of the window's fingerprint.
        columns = self.config.traffic.model_dump(exclude={"path", "version", "synthetic", "max_bad_fraction"})
        # Keys that change no logit are left out, so that runs from before they existed can be resumed.
        is_converted = self.config.model.outputs == "probabilities"
        model = self.config.model.model_dump(exclude={"checkpoint", *(() if is_converted else ("outputs",))})
        ranges = {unit: str(row_range) for unit, row_range in self.spec.row_ranges.items()}
        forms = {f"{unit} {precision}": form.to_dict() for (unit, precision), form in self.forms.items()}
        # Bags of a table that is cut are added up piece by piece, which decides their last bits.
        cuts = self.placement.cuts if self.placement else {}
        where = [part for part in (cuts, forms) if part]
        return [self.window_text(name), window.fingerprint, columns, model, self.space.row_alignment, *where, ranges]

    def search_work(self) -> Work:
        """What a search does."""
        windows = [self.window(name) for name in ("search", "confirm")]
        return Work(windows[0], SEARCH_PASSES * sum(window.num_batches for window in windows))

    def demand(self) -> Demand:
        """What the job asks of a cluster, with lookups counted on its search window."""
        return demand_of(
            self.adapter,
            self.window("search"),
            self.spec.row_ranges,
            batch_size=self.config.traffic.batch_size,
            num_low=len({precision for unit, precision in self.columns if not is_layer(unit)}),
        )

    def with_row_ranges(self, row_ranges: Mapping[str, RowRange]) -> Job:
        """The same job with other ranges of rows, by unit; minmax for one left out."""
        whole = {u.name: row_ranges.get(u.name, RowRange.MINMAX) for u in self.units if not u.is_layer}
        return replace(self, spec=replace(self.spec, row_ranges=whole))

    def with_forms(self, forms: Forms) -> Job:
        """The same job with forms of layers."""
        return replace(self, forms=dict(forms))

    def as_planned(self, file: PlanFile) -> Job:
        """The same job with the ranges of rows and the forms of layers that a plan was certified with."""
        forms = {(unit, file.plan[unit]): form for unit, form in file.layer_forms.items()}
        return self.with_row_ranges(file.row_ranges).with_forms(forms)

    def with_cuts(self, cuts: Cuts) -> Job:
        """The same job with tables cut into those pieces, for a run that goes on with other workers.

        Raises `ConfigError` where the workers have no room for the pieces.
        """
        if cuts == (self.placement.cuts if self.placement else {}):
            return self
        where = self.config.evaluation
        if where.worker_memory is None:
            raise ConfigError(
                f"the run cut tables among its workers ({', '.join(cuts)}), which decides the last bits of its "
                "results; set evaluation.worker_memory to go on with it, or begin a new run"
            )
        try:
            placement = _placed(self, cuts)
        except ConfigError as error:
            raise ConfigError(
                f"{error}; the run goes on with the pieces of tables that it began with: give it workers as before "
                "(evaluation.num_workers, evaluation.worker_memory), or begin a new run"
            ) from None
        return replace(self, placement=placement)

    def costs(self, use: Mapping[str, TableUse]) -> Costs:
        """What plans cost under traffic that uses the tables so; raises `ConfigError` where that cannot be said."""
        rows: dict[str, float] = {}
        if self.config.cost.calibration is not None and any(unit.is_layer for unit in self.units):
            rows = self.adapter.layer_rows(inputs_of(self.window("search").batch(0)))
        return open_costs(self.config.cost, self.space, use, rows)

    def profile_origin(self, name: str) -> ProfileOrigin:
        """What a profile of the window called `name` is of."""
        window, *traffic, _ = self.with_forms({}).evaluated_on(name, self.window(name))
        return ProfileOrigin(
            checkpoint_sha256=self.checkpoint_sha256,
            window=str(window),
            traffic=hashlib.sha256(json.dumps(traffic, default=str).encode()).hexdigest()[:16],
            row_range=self.config.space.row_range,
            columns=self.columns,
        )

    @property
    def columns(self) -> tuple[Column, ...]:
        """Every unit at every low precision that a plan of the space may give it, in the order of units."""
        choices = {unit: set(d.choices) for d in self.space.decisions for unit in d.units}
        return tuple(c for c in columns_of(self.units, Precision) if c[1] in choices[c[0]])

    def measure_profile(
        self,
        workers: Workers,
        name: str,
        window: TrafficWindow,
        *,
        quarantine: Location,
        on_progress: Callable[[int], None] | None = None,
    ) -> MeasuredProfile:
        """Profile a window; bad rows are written to `quarantine`, and too many of them stop the job."""
        measured = measure_profile(
            workers,
            window,
            self.columns,
            forms=self.forms,
            by_group=self.config.traffic.group is not None,
            batches_per_task=self.config.evaluation.batches_per_task,
            max_bad_fraction=self.config.traffic.max_bad_fraction,
            on_progress=on_progress,
        )
        self.judge_rows(name, measured.rows, measured.bad_rows, quarantine)
        _check_labels(name, measured.rows, measured.profile.num_rows)
        return measured

    def rows_without_form(self, workers: Workers, plan: Plan) -> list[str]:
        """A sentence for each table with a row that its precision in a plan cannot store, met by traffic or not."""
        checks = []
        memory = self.spec.memory_bytes
        num_bytes = _CHECKED_BYTES if memory is None else min(_CHECKED_BYTES, int(memory * _CHECKED_SHARE))
        for unit in (unit for unit in self.units if not unit.is_layer):
            step = max(1, num_bytes // (4 * unit.dim))
            for first in range(0, unit.num_rows, step):
                checks.append(RowCheck(unit.name, first, min(first + step, unit.num_rows), plan[unit.name]))
        found: dict[str, str] = {}
        for check, wrong in zip(checks, workers.check_rows(checks), strict=True):
            if wrong:
                found.setdefault(check.table, wrong)
        more = "no example that was evaluated looked it up, but serving stores it too"
        return [f"{wrong}; {more}" for wrong in found.values()]

    def evaluate(
        self,
        workers: Workers,
        name: str,
        window: TrafficWindow,
        plans: Sequence[Plan],
        *,
        quarantine: Location,
        batches: Sequence[int] | None = None,
        confidence: float | None = None,
        looks: Looks = "once",
        tuned_for: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Evaluation:
        """Evaluate plans on a window; bad rows are written to `quarantine`, and too many of them stop the job.

        A sample of batches is not judged for its bad rows: what is allowed is a share of the window.
        """
        evaluation = evaluate_plans(
            workers,
            window,
            plans,
            forms=self.forms,
            confidence=confidence or self.config.search.confidence,
            looks=looks,
            tuned_for=tuned_for,
            batches_per_task=self.config.evaluation.batches_per_task,
            batches=batches,
            max_bad_fraction=self.config.traffic.max_bad_fraction,
            on_progress=on_progress,
        )
        whole = evaluation.bad_rows if batches is None else ()
        self.judge_rows(name, evaluation.rows, whole, quarantine)
        _check_labels(name, evaluation.rows, evaluation.sums.num_rows)
        return evaluation

    def judge_rows(self, name: str, rows: RowAccount, bad_rows: Sequence[BadRow], quarantine: Location) -> None:
        """Write the bad rows of a window to a file, and raise `TrafficError` where they are too many."""
        if bad_rows:
            kept = quarantine / f"{name}.parquet"
            write_quarantine(bad_rows, kept)
            check_bad_rows(
                rows.num_bad,
                rows.num_read,
                self.config.traffic.max_bad_fraction,
                first=bad_rows[0],
                quarantine_path=kept,
            )


def _check_labels(name: str, rows: RowAccount, num_labelled: int) -> None:
    if num_labelled == 0:
        raise TrafficError(
            f"windows.{name}: none of the {rows.num_read} rows read has a usable label ({rows.num_bad} are bad, "
            f"{rows.num_unlabelled} have none), so no gap can be measured; choose a window whose labels are known"
        )


def open_job(config: Config, *, is_placed: bool = True) -> Job:
    """Open traffic, model and checkpoint, and find the units; raises a `LowprecError` for whatever does not fit.

    is_placed: tables too, on the workers of the config.
    """
    ops.check_kernels()
    columns = config.traffic.schema_of_columns()
    traffic = config.traffic
    reader = open_traffic(traffic.path, columns, batch_size=traffic.batch_size, version=traffic.version)
    config = config.with_traffic_version(reader.version)
    _check_order(config, reader)
    checkpoint = str(Location.of(config.model.checkpoint).absolute())
    spec = WorkerSpec(
        factory=config.model.factory,
        args=dict(config.model.args),
        checkpoint=checkpoint,
        checkpoint_stamp=checkpoint_stamp(checkpoint),
        schema=columns,
        threads=config.evaluation.threads_per_worker,
        import_paths=(os.getcwd(),),
        memory_bytes=config.evaluation.worker_memory,
        outputs=config.model.outputs,
    )
    adapter = load_adapter_without_rows(spec) if _is_for_workers_alone(config, spec) else load_adapter(spec)
    layers = adapter.layers.units if config.space.layers else ()
    if config.space.layers and not layers:
        raise ConfigError("space.layers: the model has no nn.Linear, so there is nothing to choose for; leave it out")
    features = adapter.tables_of_features(columns)
    rows = {unit.name: unit.num_rows for unit in adapter.units}
    schema = columns.with_num_embeddings({name: rows[table] for name, table in features.items()})
    row_ranges = {unit.name: config.space.row_range for unit in adapter.units}
    reader = reader.with_schema(schema)
    fp32_layers = _fp32_layers(config, reader, adapter) if layers else {}
    job = Job(
        config=config,
        reader=reader,
        adapter=adapter,
        # By latency a larger precision may be the faster one, so no choice is ruled out by its bytes then.
        space=build_space(
            (*adapter.units, *layers), config.space, prune=config.cost.calibration is None, fp32=fp32_layers
        ),
        spec=replace(spec, row_ranges=row_ranges),
        checkpoint_sha256=checkpoint_sha256(checkpoint, stamp=spec.checkpoint_stamp),
        features=features,
        fp32_layers=fp32_layers,
    )
    return replace(job, placement=_placed(job)) if is_placed else job


def _fp32_layers(config: Config, reader: TrafficReader, adapter: ModelAdapter) -> dict[str, str]:
    """The layers that cannot be below fp32 and why: of another kind, or not called on the search window's first batch.

    Where the window has no rows, nothing is known of calls.
    """
    found = {unit.name: why for unit in adapter.layers.units if (why := adapter.layers.why_fp32(unit.name))}
    window = reader.find(_window(config, "search", reader))
    batch = window.batch(0) if window is not None else None
    if batch is not None and batch.num_rows:
        called = adapter.called_units(inputs_of(batch))
        uncalled = [unit.name for unit in adapter.layers.units if unit.name not in called]
        found |= {name: "is not called through its module" for name in uncalled}
    return found


def _placed(job: Job, cuts: Cuts | None = None) -> Placement | None:
    """Where the rows lie; None where every worker has them all."""
    where = job.config.evaluation
    if where.worker_memory is None:
        return None
    _, placement = place(job.demand(), where.num_worker_machines, where.worker_memory, cuts)
    return placement if placement.shards else None


def _is_for_workers_alone(config: Config, spec: WorkerSpec) -> bool:
    """Whether rows have no place in this process: too large for one, or read into memory instead of mapped."""
    where = config.evaluation
    if where.num_workers == 0:
        return False
    if where.worker_memory is not None:
        return True
    source = open_tensors(Location.of(spec.checkpoint))
    if source.is_mapped:
        return False
    # Where workers are not certain, a second copy in this process may be for nothing.
    is_certain = where.num_workers != "auto" or where.address is not None or is_ray_job()
    return is_certain or 4 * sum(map(math.prod, source.shapes.values())) > _READ_HERE_BYTES


def choose_workers_for(job: Job, work: Work | None = None) -> WorkersChoice:
    """How many workers a job gets for some work, by default for its search, and why."""

    def seconds() -> float:
        return work_seconds(job.spec, job.adapter, work or job.search_work())

    return choose_workers(job.config.evaluation, has_rows=job.adapter.has_rows, seconds=seconds)


@contextmanager
def open_workers(job: Job, note: Callable[[str], None] = lambda _: None, work: Work | None = None) -> Iterator[Workers]:
    """The workers that the config asks for, Ray actors or this process.

    `note` receives the choice where `evaluation.num_workers` is auto, and what happens to the workers. work: what they
    are for, by default a search.
    """
    workers: Workers
    where = job.config.evaluation
    choice = choose_workers_for(job, work)
    if where.num_workers == "auto":
        note(str(choice))
    if choice.num_workers == 0:
        workers = LocalWorkers(job.spec, job.adapter)
    else:
        from lowprec.evaluation.workers.ray import RayWorkers, Timeouts

        workers = RayWorkers(
            job.spec,
            num_workers=choice.num_workers,
            address=where.address,
            placement=job.placement,
            timeouts=Timeouts(where.task_timeout_s, where.hung_after_s, where.start_timeout_s),
            note=note,
        )
    try:
        yield workers
    finally:
        workers.close()


def _window(config: Config, name: str, reader: TrafficReader) -> Window:
    bounds: WindowConfig | None = getattr(config.windows, name, None)
    if bounds is None:
        raise ConfigError(f"windows.{name}: is required here")
    return parse_window(bounds.start, bounds.end, unit=reader.time_unit, key=f"windows.{name}")


def _check_order(config: Config, reader: TrafficReader) -> None:
    """Windows must not share rows, and confirm must come last: evidence on rows already used is no evidence."""
    names = [n for n in ("train", "validation", "search", "confirm") if getattr(config.windows, n) is not None]
    windows = {name: _window(config, name, reader) for name in names}
    for earlier, later in pairwise(names):
        end, start = windows[earlier].end, windows[later].start
        if end is None or start is None or start < end:
            raise ConfigError(
                f"windows.{later}: must begin where windows.{earlier} ends, or later, so that no row is used twice; "
                f"windows.{earlier} is {format_window(windows[earlier], reader.time_unit)}, "
                f"windows.{later} is {format_window(windows[later], reader.time_unit)}"
            )
