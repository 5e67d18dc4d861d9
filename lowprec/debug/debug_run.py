"""The numeric debugger: runs all of its steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowprec.config import Config
from lowprec.core.errors import TrafficError
from lowprec.core.progress import Progress, Silent
from lowprec.debug.arrays import write_arrays
from lowprec.debug.causes.channels import WorstChannel, weight_codes, worst_channels
from lowprec.debug.causes.differences import (
    changed_files,
    dense_differences,
    layer_modules_differences,
    table_difference,
)
from lowprec.debug.causes.misfits import misfits
from lowprec.debug.causes.rows import SeenRows, WorstRow, seen_rows, worst_rows
from lowprec.debug.changes import best_change
from lowprec.debug.implementations import Implementation, PlannedModel, ServedModel, open_implementation
from lowprec.debug.report import DebugReport, UnitReport
from lowprec.debug.suspects import suspects_among
from lowprec.debug.trace import InputCodes, Trace, trace_batches
from lowprec.evaluation.workers.worker import evaluator_of
from lowprec.plan import Precision, is_layer
from lowprec.session import Session, open_session
from lowprec.storage import AnyPath
from lowprec.traffic.batch import Batch
from lowprec.traffic.quarantine import said_of_bad_rows

__all__ = ["debug_implementation", "debug_plan", "sample_of"]

# The backward pass, and exact trials of changes, take one of so many parts of the sample.
_NUM_PARTS = 16
_NUM_WORST = 5


def debug_plan(
    config: Config,
    plan: AnyPath,
    *,
    window: str = "confirm",
    num_examples: int = 32_768,
    arrays: Path | None = None,
    any_checkpoint: bool = False,
    progress: Progress | None = None,
) -> DebugReport:
    """Where the error of a plan, or of an exported folder, comes from: every unit by itself, and all of them together.

    plan: a `plan.json`, or a folder that `lowprec export` wrote. The sample is about `num_examples` of a window,
    batches at equal distances. The model is watched, and nothing in it is changed. arrays: a folder for Parquet files
    by channel and by row. any_checkpoint: also a plan that was made for another snapshot of the model.

    Raises `PlanError` or `ExportError` where the plan or the folder does not fit the model and its checkpoint,
    `TrafficError` where the window has no usable rows.
    """
    began = time.monotonic()
    session = open_session(config.in_this_process())
    session, implementation = open_implementation(session, plan, any_checkpoint=any_checkpoint)
    report = debug_implementation(
        session, implementation, sample_of(session, window, num_examples), window, arrays=arrays, progress=progress
    )
    return replace(report, seconds=time.monotonic() - began)


def debug_implementation(
    session: Session,
    implementation: Implementation,
    batches: Sequence[Callable[[], Batch]],
    window: str,
    *,
    arrays: Path | None = None,
    progress: Progress | None = None,
) -> DebugReport:
    """The same of what is open already, on batches of a window."""
    began = time.monotonic()
    listener = progress or Silent()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(session.spec.threads)
    try:
        evaluator = evaluator_of(session.spec, session.adapter)
        with evaluator.using(session.forms):
            listener.stage("look at every unit", len(batches))
            trace = trace_batches(
                evaluator, implementation, batches, num_parts=_NUM_PARTS, on_progress=lambda: listener.advance()
            )
            evaluator.outputs.check()
            if trace.exact is None or not trace.exact.num_rows:
                raise TrafficError(
                    f"windows.{window}: the sample has no row with a usable label; choose another window"
                )
            planned = (
                implementation
                if isinstance(implementation, PlannedModel)
                else PlannedModel(session, implementation.file, implementation.label)
            )
            looked = _Looked(session, implementation, planned, trace)
            units = tuple(looked.unit(unit) for unit in trace.units)
            suspects = suspects_among(units)
            listener.stage("try changes", 1)
            differing = [unit.unit for unit in units if unit.differs]
            broken = [unit.unit for unit in units if unit.is_broken]
            change = best_change(session, implementation, planned, suspects, differing, broken, trace.parts)
            listener.advance()
    finally:
        torch.set_num_threads(threads_before)
    written = write_arrays(arrays, trace.alone, trace.accumulated, looked.tables) if arrays else {}
    differs = looked.differences()
    is_reference = set(implementation.file.plan.values()) == {Precision.FP32}
    return DebugReport(
        name=session.config.name,
        label=implementation.label,
        checkpoint_sha256=session.checkpoint_sha256,
        window=session.window_text(window),
        metrics=trace.exact.metrics(0, confidence=session.config.search.confidence, is_reference=is_reference),
        num_compared=trace.num_compared,
        num_traced=trace.num_traced,
        units=units,
        suspects=tuple(suspects),
        change=change,
        differs=differs,
        notes=(*differs, *looked.notes(), *said_of_bad_rows([row for read in batches for row in read().bad_rows])),
        arrays=written,
        seconds=time.monotonic() - began,
    )


def sample_of(session: Session, window: str, num_examples: int) -> list[Callable[[], Batch]]:
    """Batches at equal distances in a window, about so many examples; each is read once."""
    traffic = session.window(window)
    wanted = max(1, math.ceil(num_examples / session.config.traffic.batch_size))
    count = min(wanted, traffic.num_batches)
    kept: dict[int, Batch] = {}

    def reader(k: int) -> Callable[[], Batch]:
        return lambda: kept.setdefault(k, traffic.batch(k)) if k not in kept else kept[k]

    return [reader(k * traffic.num_batches // count) for k in range(count)]


# Counts, the worst rows or channels, differences and misfits of a unit.
_Seen = tuple[
    dict[str, dict[str, int]], tuple[WorstRow, ...] | tuple[WorstChannel, ...], tuple[str, ...], tuple[str, ...]
]


@dataclass
class _Looked:
    """From sums to reports of units."""

    session: Session
    implementation: Implementation
    planned: PlannedModel
    trace: Trace

    def __post_init__(self) -> None:
        self.tables: list[SeenRows] = []
        self._total = float(self.trace.shares.second.sum())
        self._row = {unit: k for k, unit in enumerate(self.trace.units)}
        self._sizes = {u.name: u for u in (*self.session.adapter.units, *self.session.adapter.layers.units)}

    def unit(self, name: str) -> UnitReport:
        """All that is known of a unit."""
        precision = self.implementation.file.plan.get(name, Precision.FP32)
        form = self.implementation.file.layer_forms.get(name)
        counts, worst, differs, unfit = self._layer(name) if is_layer(name) else self._table(name)
        k, shares = self._row[name], self.trace.shares
        loss, entropy = float(shares.loss[0]), float(shares.entropy[0])
        second = float(shares.second[k])
        return UnitReport(
            unit=name,
            precision=str(precision),
            form=None if form is None else str(form),
            size_bytes=self.session.storage.unit_bytes(self._sizes[name], precision),
            alone=self.trace.alone[name],
            accumulated=self.trace.accumulated[name],
            counts=counts,
            share=second / self._total if self._total > 0 else 0.0,
            kl_pct=100 * second / entropy if entropy else math.nan,
            first_pct=100 * float(shares.first[k]) / loss if loss else math.nan,
            first_error_pct=100 * float(shares.first_squares[k]) ** 0.5 / loss if loss else math.nan,
            worst=worst,
            differs=differs,
            misfits=unfit,
        )

    def differences(self) -> tuple[str, ...]:
        """How a folder is not what its plan makes of the checkpoint, beside the units that traffic asked."""
        if not isinstance(self.implementation, ServedModel):
            return ()
        return (
            *dense_differences(self.session.adapter, self.implementation),
            *changed_files(self.implementation).values(),
        )

    def notes(self) -> list[str]:
        """What is no unit's."""
        return [f"{unit} was not called" for unit in self.implementation.file.plan if unit not in self.trace.units]

    def _table(self, name: str) -> _Seen:
        weight = self.session.adapter.weights[name].numpy()
        precision = self.implementation.file.plan[name]
        rows = seen_rows(
            name, precision, self.trace.ids[name], weight, lambda ids: self.implementation.stored(name, ids)
        )
        self.tables.append(rows)
        counts: dict[str, Any] = {
            "values": {
                "values": rows.exact.size,
                "saturated": rows.num_saturated,
                "underflowed": rows.num_underflowed,
                "overflowed": int((~np.isfinite(rows.restored)).sum()),
            }
        }
        differs = (
            table_difference(rows, self.planned.stored(name, rows.ids))
            if self.implementation is not self.planned
            else None
        )
        return counts, tuple(worst_rows(rows, _NUM_WORST)), (differs,) if differs else (), ()

    def _layer(self, name: str) -> _Seen:
        weight = self.session.adapter.layers.weights[name]
        stored = self.implementation.stored_layer(name, 0)
        codes = weight_codes(weight, stored)
        counts = {
            "weights": {
                "values": codes.num_values,
                "saturated": codes.num_saturated,
                "underflowed": codes.num_underflowed,
            }
        }
        seen = self.trace.inputs.get(name, InputCodes())
        if seen.num_values:
            counts["inputs"] = {
                "values": seen.num_values,
                "saturated": seen.num_saturated,
                "underflowed": seen.num_underflowed,
            }
        differs: Sequence[str] = ()
        if isinstance(self.implementation, ServedModel):
            modules = len(self.session.adapter.layers.modules(name))
            differs = layer_modules_differences(self.planned, self.implementation, name, modules)
        worst = worst_channels(self.trace.alone[name], weight, stored, _NUM_WORST, saturated_share=seen.saturated_share)
        # A form is judged by what the plan makes with it: what else is stored is a difference, and said as one.
        planned = self.planned.stored_layer(name, 0)
        unfit = misfits(self.implementation.file.layer_forms.get(name), weight, planned, seen.histogram)
        return counts, tuple(worst), tuple(differs), unfit
