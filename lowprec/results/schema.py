"""The Delta tables of results: their columns, and rows checked against them.

Delta writers truncate, round and reinterpret silently (a float into an integer column, a time without a zone), so every
value is checked here before it gets there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from lowprec.core.errors import ResultsError

__all__ = ["SCHEMA_VERSION", "TABLES", "TableSchema", "table_schema", "to_arrow"]

# What the columns mean. It moves when a column comes, goes or changes its meaning, and stands in each Delta table's
# description. 1: the KL gap of searches was in percent of the reference's loss (tables without a description). 2: it is
# in percent of the reference's entropy, everywhere; trials have floors. 3: intervals of confirm, verify and a monitored
# window lie between two one-sided bounds of one look (before: two-sided confidence sequences); trials say which.
SCHEMA_VERSION = 3

_TIME = pa.timestamp("us", tz="UTC")
_NAMES = {pa.string(): "text", pa.int64(): "an integer", pa.float64(): "a number", _TIME: "a time with a zone"}
# Every integer up to here has a float64 of its own.
_EXACT_FLOATS = 1 << 53


@dataclass(frozen=True)
class TableSchema:
    """One table: its columns, and which rows readers see.

    Of the rows with equal `row_key` the one committed last is kept. Where `entity` names a column, only the row with
    the highest `order` of each entity is kept then.
    """

    name: str
    arrow: pa.Schema
    entity: str | None = None
    order: str | None = None


def _table(name: str, columns: Mapping[str, pa.DataType], **visible: str) -> TableSchema:
    key = pa.field("row_key", pa.string(), nullable=False)
    committed = pa.field("committed_at", _TIME, nullable=False)
    return TableSchema(name, pa.schema([key, *(pa.field(n, t) for n, t in columns.items()), committed]), **visible)


_INTERVALS = {f"{gap}_{end}": pa.float64() for gap in ("gap", "kl") for end in ("pct", "lower_pct", "upper_pct")}
_QUALITY_NAMES = ("ne_ref", "ne_plan", "auc_ref", "auc_plan", "auc_error", "calibration_ref", "calibration_plan")
_QUALITY = dict.fromkeys(_QUALITY_NAMES, pa.float64())

TABLES: Mapping[str, TableSchema] = {
    table.name: table
    for table in (
        _table(
            "runs",
            {
                "run_id": pa.string(),
                "version": pa.int64(),
                "status": pa.string(),  # running, done, stopped or failed
                "command": pa.string(),
                "started_at": _TIME,
                "updated_at": _TIME,
                "name": pa.string(),
                "config_json": pa.string(),
                "checkpoint_sha256": pa.string(),
                "lowprec_version": pa.string(),
                "budget_pct": pa.float64(),
                "verdict": pa.string(),
                "recommended_trial_key": pa.string(),
                "message": pa.string(),
                "summary_json": pa.string(),
            },
            entity="run_id",
            order="version",
        ),
        _table(
            "trials",
            {
                "run_id": pa.string(),
                "trial_key": pa.string(),
                "number": pa.int64(),
                "wave": pa.int64(),
                "kind": pa.string(),  # where the plan came from: uniform, front, optuna, finalist
                "evaluation": pa.string(),  # exact, confirm, verify or proxy
                "window": pa.string(),
                "plan_json": pa.string(),
                "size_bytes": pa.int64(),
                "bytes_ratio": pa.float64(),
                "latency_ns": pa.float64(),  # of all lookups of one example, where lookups were calibrated
                "cost": pa.float64(),  # what the search minimised: bytes or latency
                "promised_pct": pa.float64(),  # the gap that the profile promised
                **_INTERVALS,
                "budget_pct": pa.float64(),  # the tightest budget that the verdict is good for, else the loosest
                "verdict": pa.string(),
                **_QUALITY,
                "num_examples": pa.int64(),
                "num_exact": pa.int64(),  # of these, evaluated exactly; the profile predicts the rest
                "num_units": pa.int64(),  # units of evidence: examples, or groups of them
                "looks": pa.string(),  # once: bounds are one-sided, each at `confidence`; repeated: a sequence
                "confidence": pa.float64(),
                "metrics_json": pa.string(),
                "floors_json": pa.string(),  # of the launch gate: figure, limit and verdict of each floor; null without
            },
        ),
        _table(
            "sensitivities",
            {
                "run_id": pa.string(),
                "unit": pa.string(),
                "precision": pa.string(),
                "bytes_saved": pa.int64(),
                "window": pa.string(),
                "gap_pct": pa.float64(),  # predicted over the window
                "gap_lower_pct": pa.float64(),
                "gap_upper_pct": pa.float64(),
                "promised_pct": pa.float64(),  # the same with its label noise shrunk away
                "kl_pct": pa.float64(),
                "gap_pct_per_mb": pa.float64(),  # promised gap for each megabyte saved
                "sampled_kl_pct": pa.float64(),  # exact, on a sample
                "predicted_kl_pct": pa.float64(),  # predicted, on the same sample
                "linearization_error": pa.float64(),  # the former over the latter, less 1
                "num_examples": pa.int64(),
                "num_exact": pa.int64(),
            },
        ),
        _table(
            "monitor_windows",
            {
                "deployment": pa.string(),
                "name": pa.string(),
                "window_key": pa.string(),
                "version": pa.int64(),  # counts how often the window was judged: again when labels or rows came late
                "window": pa.string(),
                "window_start": pa.int64(),  # in the unit of the traffic's time
                "window_end": pa.int64(),
                "judged_at": _TIME,
                "state": pa.string(),  # ok, warn, breach, insufficient_data or error
                "message": pa.string(),
                "checkpoint": pa.string(),
                "checkpoint_sha256": pa.string(),
                "budget_pct": pa.float64(),
                "judged_by": pa.string(),  # labels or kl
                **_INTERVALS,  # of this window by itself, between two one-sided bounds
                "running_pct": pa.float64(),  # of all windows since the deployment, or the last breach or its end
                "running_lower_pct": pa.float64(),
                "running_upper_pct": pa.float64(),
                "confidence": pa.float64(),
                "log_evidence": pa.float64(),
                "log_threshold": pa.float64(),
                "overdispersion": pa.float64(),
                "epoch": pa.int64(),
                **_QUALITY,
                "num_rows": pa.int64(),  # as they are logged, bad ones included
                "num_labelled": pa.int64(),
                "num_bad": pa.int64(),
                "num_units": pa.int64(),
                "worst_unit": pa.string(),  # whose share of the gap grew most
                "num_moved": pa.int64(),  # features whose inputs moved
                "units_json": pa.string(),
                "inputs_json": pa.string(),
                "saturation_json": pa.string(),
                "evidence_json": pa.string(),
                "lowprec_version": pa.string(),
            },
            entity="window_key",
            order="version",
        ),
        _table(
            "alerts",
            {
                "deployment": pa.string(),
                "name": pa.string(),
                "alert_key": pa.string(),
                "incident": pa.string(),  # what belongs together: the deduplication key of the webhook
                "event": pa.string(),  # opened, continues, resolved; told or not_told: what became of telling it
                "state": pa.string(),
                "window": pa.string(),
                "window_start": pa.int64(),
                "raised_at": _TIME,
                "message": pa.string(),
                "proposed_plan": pa.string(),
                "alert_json": pa.string(),
            },
        ),
    )
}


def table_schema(name: str) -> TableSchema:
    """The table of that name; raises `ResultsError` naming those that there are."""
    if name not in TABLES:
        raise ResultsError(f'results: no table "{name}"; there are {", ".join(TABLES)}')
    return TABLES[name]


def to_arrow(table: TableSchema, rows: Sequence[Mapping[str, Any]], committed_at: datetime) -> pa.Table:
    """The rows as an Arrow table of exactly the table's schema, `committed_at` added; equal keys are kept once.

    Raises `ResultsError` when a row misses a column, has one too many, or a value that would not come back the same.
    """
    unique: dict[str, dict[str, Any]] = {}
    for row in rows:
        where = f'results table {table.name}, row "{row.get("row_key")}"'
        full = {**row, "committed_at": committed_at}
        missing = [name for name in table.arrow.names if name not in full]
        unknown = [name for name in row if name not in table.arrow.names or name == "committed_at"]
        if missing or unknown:
            wrong = [
                f"{what} {', '.join(names)}" for what, names in (("misses", missing), ("has unknown", unknown)) if names
            ]
            raise ResultsError(f"{where}: {' and '.join(wrong)}; columns are {', '.join(table.arrow.names)}")
        checked = {field.name: _checked(full[field.name], field, where) for field in table.arrow}
        unique.setdefault(checked["row_key"], checked)
    return pa.Table.from_pylist(list(unique.values()), schema=table.arrow)


def _checked(value: Any, field: pa.Field, where: str) -> Any:
    if value is None:
        if field.nullable:
            return None
    elif field.type == pa.string():
        if isinstance(value, str):
            return str(value)
    elif field.type == pa.int64():
        if _is_integer(value) and -(1 << 63) <= int(value) < 1 << 63:
            return int(value)
    elif field.type == pa.float64():
        if isinstance(value, float | np.floating):
            return float(value)
        if _is_integer(value) and abs(int(value)) <= _EXACT_FLOATS:
            return float(value)
    elif isinstance(value, datetime) and value.tzinfo is not None:
        return value.astimezone(UTC)
    raise ResultsError(f"{where}: {field.name} must be {_NAMES[field.type]}; got {value!r} ({type(value).__name__})")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
