"""What a config describes, opened: traffic, windows, model and units, ready to evaluate plans."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Self

from lowprec import ops
from lowprec.config import Config, EvaluationConfig
from lowprec.core.errors import ConfigError, TrafficError
from lowprec.evaluation.evaluate import Evaluation, evaluate_plans
from lowprec.evaluation.metrics import Looks
from lowprec.evaluation.rows import RowAccount, TableUse
from lowprec.evaluation.workers.auto_workers import is_ray_job
from lowprec.evaluation.workers.worker import (
    RowCheck,
    Workers,
    WorkerSpec,
    load_adapter,
    load_adapter_without_rows,
)
from lowprec.models.adapter import ModelAdapter, inputs_of
from lowprec.models.called import layer_rows, tables_of_features
from lowprec.models.checkpoints.checkpoint import checkpoint_sha256, checkpoint_stamp
from lowprec.models.checkpoints.tensor_files import open_tensors
from lowprec.plan import Forms, Plan, PlanFile, Precision, RowRange, Unit
from lowprec.plan.cost import ModelStorage
from lowprec.session.costs import Costs, open_costs
from lowprec.session.placement import Demand, demand_of, place
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

__all__ = ["Session", "check_labels", "open_session"]

# Rows that are looked through at once, and of a worker's memory where that is limited: a worker that holds others reads
# them for it.
_CHECKED_BYTES, _CHECKED_SHARE = 128 << 20, 1 / 100
# Weights that are read into this process although workers may read them again.
_READ_HERE_BYTES = 1 << 30


@dataclass(frozen=True)
class Session:
    """A config with everything behind it checked and opened once.

    config: as given, with the version of a Delta table that is read where it is traffic, so that what is opened from it
    later reads the same.
    adapter: the model; without rows where workers alone are to have them.
    storage: the units of the model and what decides their bytes.
    features: by name, the table that looks its ids up unchanged.
    placement: which worker holds which rows, where no worker can hold them all. forms: of layers, once they are known.
    """

    config: Config
    reader: TrafficReader
    adapter: ModelAdapter
    storage: ModelStorage
    spec: WorkerSpec
    checkpoint_sha256: str
    features: dict[str, str]
    placement: Placement | None = None
    forms: Forms = field(default_factory=dict)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units of the model."""
        return self.storage.units

    def window(self, name: str) -> TrafficWindow:
        """The traffic window that the config calls `name`; raises where it is empty."""
        return self.reader.window(_window(self.config, name, self.reader))

    def find_window(self, name: str) -> TrafficWindow | None:
        """The traffic window that the config calls `name`, None where it has no rows."""
        return self.reader.find(_window(self.config, name, self.reader))

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
        return [self.window_text(name), window.fingerprint, columns, model, self.storage.row_alignment, *where, ranges]

    @property
    def typical_window(self) -> str:
        """The name of the window that tells how often rows are looked up: the search window where there is one."""
        return "confirm" if self.config.windows.search is None else "search"

    def demand(self) -> Demand:
        """What the session asks of a cluster, with lookups counted on its typical window."""
        return demand_of(
            self.adapter,
            self.window(self.typical_window),
            self.spec.row_ranges,
            batch_size=self.config.traffic.batch_size,
            num_low=len(self.config.space.low_table_precisions),
        )

    def with_row_ranges(self, row_ranges: Mapping[str, RowRange]) -> Self:
        """The same session with other ranges of rows, by unit; minmax for one left out."""
        whole = {u.name: row_ranges.get(u.name, RowRange.MINMAX) for u in self.units if not u.is_layer}
        return replace(self, spec=replace(self.spec, row_ranges=whole))

    def with_forms(self, forms: Forms) -> Self:
        """The same session with forms of layers."""
        return replace(self, forms=dict(forms))

    def as_planned(self, file: PlanFile) -> Self:
        """The same session with the ranges of rows and the forms of layers that a plan was certified with."""
        forms = {(unit, file.plan[unit]): form for unit, form in file.layer_forms.items()}
        return self.with_row_ranges(file.row_ranges).with_forms(forms)

    def with_cuts(self, cuts: Cuts) -> Self:
        """The same session with tables cut into those pieces, for a run that goes on with other workers.

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

    def costs(self, use: Mapping[str, TableUse], choices: Iterable[tuple[str, Precision]]) -> Costs:
        """What plans with these precisions of units cost under traffic that uses the tables so.

        Raises `ConfigError` where that cannot be said.
        """
        rows: dict[str, float] = {}
        if self.config.cost.calibration is not None and any(unit.is_layer for unit in self.units):
            rows = layer_rows(self.adapter, inputs_of(self.window(self.typical_window).batch(0)))
        return open_costs(self.config.cost, self.storage, choices, use, rows)

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
        check_labels(name, evaluation.rows, evaluation.sums.num_rows)
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


def check_labels(name: str, rows: RowAccount, num_labelled: int) -> None:
    """Raise `TrafficError` where none of the rows that were read of a window has a label."""
    if num_labelled == 0:
        raise TrafficError(
            f"windows.{name}: none of the {rows.num_read} rows read has a usable label ({rows.num_bad} are bad, "
            f"{rows.num_unlabelled} have none), so no gap can be measured; choose a window whose labels are known"
        )


def open_session(config: Config, *, is_placed: bool = True) -> Session:
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
    is_elsewhere = _is_for_workers_alone(config.evaluation, spec)
    adapter = load_adapter_without_rows(spec) if is_elsewhere else load_adapter(spec)
    layers = adapter.layers.units if config.space.layers else ()
    if config.space.layers and not layers:
        raise ConfigError("space.layers: the model has no nn.Linear, so there is nothing to choose for; leave it out")
    features = tables_of_features(adapter, columns)
    rows = {unit.name: unit.num_rows for unit in adapter.units}
    schema = columns.with_num_embeddings({name: rows[table] for name, table in features.items()})
    session = Session(
        config=config,
        reader=reader.with_schema(schema),
        adapter=adapter,
        storage=config.space.storage((*adapter.units, *layers)),
        spec=replace(spec, row_ranges={unit.name: config.space.row_range for unit in adapter.units}),
        checkpoint_sha256=checkpoint_sha256(checkpoint, stamp=spec.checkpoint_stamp),
        features=features,
    )
    return replace(session, placement=_placed(session)) if is_placed else session


def _placed(session: Session, cuts: Cuts | None = None) -> Placement | None:
    """Where the rows lie; None where every worker has them all."""
    where = session.config.evaluation
    if where.worker_memory is None:
        return None
    _, placement = place(session.demand(), where.num_worker_machines, where.worker_memory, cuts)
    return placement if placement.shards else None


def _is_for_workers_alone(where: EvaluationConfig, spec: WorkerSpec) -> bool:
    """Whether rows have no place in this process: too large for one, or read into memory instead of mapped."""
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


def _window(config: Config, name: str, reader: TrafficReader) -> Window:
    bounds = config.windows.of(name)
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
