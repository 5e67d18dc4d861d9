"""`plan.json`: a plan, what it was made for and its evidence."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lowprec.core.errors import PlanError, ResultsError
from lowprec.plan.layer_form import Arithmetic, LayerForm
from lowprec.plan.plan import Plan, Unit, is_layer
from lowprec.plan.precision import LAYER_PRECISIONS, TABLE_PRECISIONS, Precision, RowRange
from lowprec.storage import AnyPath, Location

__all__ = ["Form", "Forms", "PlanFile", "form_of", "read_plan", "write_plan"]

PLAN_SCHEMA_VERSION = 1

# What more a plan says of a layer at these precisions.
Form = LayerForm | Arithmetic
# Those of every layer and precision of a run.
Forms = Mapping[tuple[str, Precision], Form]
_FORM_OF: dict[Precision, type[LayerForm] | type[Arithmetic]] = {
    Precision.INT8_DYNAMIC: LayerForm,
    Precision.INT8_STATIC: LayerForm,
    Precision.EMULATED: Arithmetic,
}


@dataclass(frozen=True)
class PlanFile:
    """What `plan.json` holds: a plan, the checkpoint it was made for, its bytes and its evidence.

    row_ranges: by table, for row-wise precisions; minmax for one left out. layer_forms: of the layers whose precision
    leaves a choice, by name.
    """

    plan: Plan
    model: str
    checkpoint_sha256: str
    size_bytes: int
    row_alignment: int = 1
    row_ranges: Mapping[str, RowRange] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)
    layer_forms: Mapping[str, Form] = field(default_factory=dict)

    def row_range(self, unit: str) -> RowRange:
        """How the rows of a unit choose their range."""
        return self.row_ranges.get(unit, RowRange.MINMAX)


def form_of(precision: Precision, flat: Mapping[str, Any], *, where: str) -> Form:
    """The form of a layer at a precision from its document; raises `PlanError` naming `where`."""
    kind = _FORM_OF[precision]
    of_inputs = () if precision is Precision.INT8_STATIC else ("input_scale", "input_zero_point")
    missing = [key.name for key in fields(kind) if key.name not in flat and key.name not in of_inputs]
    if missing:
        raise PlanError(
            f"{where}: misses {', '.join(missing)} of a layer at {precision}; take the whole entry from the plan of a "
            f"search, or write a plan with lowprec plan CONFIG --unit UNIT={precision} --out FILE"
        )
    return kind.from_dict(flat, where=where)


def write_plan(file: PlanFile, path: AnyPath) -> None:
    """Write `plan.json`, whole or not at all; raises `ResultsError` where that is not possible."""
    document = {
        "schema_version": PLAN_SCHEMA_VERSION,
        "model": file.model,
        "checkpoint_sha256": file.checkpoint_sha256,
        "row_alignment": file.row_alignment,
        "units": {name: {"precision": str(p), **_details(file, name, p)} for name, p in file.plan.items()},
        "bytes": file.size_bytes,
        "evidence": dict(file.evidence),
    }
    try:
        with Location.of(path).whole_file() as partial:
            partial.write_text(json.dumps(document, indent=2) + "\n")
    except OSError as error:
        reason = error.strerror or error
        raise ResultsError(f"plan {path}: cannot be written: {reason}; make room, or choose another root") from None


def read_plan(path: AnyPath, *, units: Iterable[Unit] | None, checkpoint_sha256: str | None) -> PlanFile:
    """Read and check a plan against a model; with `units` None against itself, before the model is loaded.

    Raises `PlanError` when the file is not a plan, misses or invents a unit or a key of one, or was made for another
    checkpoint (`checkpoint_sha256=None` accepts any: for a new snapshot of the same model).
    """
    document = _read_document(path)
    made_for = document["checkpoint_sha256"]
    if checkpoint_sha256 is not None and made_for != checkpoint_sha256:
        raise PlanError(
            f"plan {path}: was made for checkpoint {made_for[:12]}, the model's is {checkpoint_sha256[:12]}; "
            "search again, or point model.checkpoint at the file that the plan was made for; to judge the plan on a "
            "newer checkpoint of the same model: lowprec verify CONFIG --plan PLAN --snapshot CHECKPOINT"
        )
    precisions: dict[str, Precision] = {}
    row_ranges: dict[str, RowRange] = {}
    layer_forms: dict[str, Form] = {}
    for name, entry in document["units"].items():
        where = f'plan {path}: unit "{name}"'
        precisions[name] = precision = _unit_precision(name, entry, where)
        if precision.is_rowwise:
            row_ranges[name] = RowRange.parse(str(entry["range"]), where=where)
        elif precision in _FORM_OF:
            flat = {k: v for k, v in entry.items() if k != "precision"}
            layer_forms[name] = form_of(precision, flat, where=where)
    try:
        plan = Plan(precisions) if units is None else Plan.of(units, precisions)
    except PlanError as error:
        raise PlanError(f"plan {path}: {error}") from None
    return PlanFile(
        plan=plan,
        model=document["model"],
        checkpoint_sha256=made_for,
        size_bytes=document["bytes"],
        row_alignment=document["row_alignment"],
        row_ranges=row_ranges,
        layer_forms=layer_forms,
        evidence=document["evidence"],
    )


def _read_document(path: AnyPath) -> dict[str, Any]:
    """The keys of a plan file, each of its type; raises `PlanError` where one is missing, wrong or unknown."""
    try:
        document = json.loads(Location.of(path).read_bytes())
    except OSError as error:
        raise PlanError(
            f"plan {path}: cannot be read: {error.strerror or error}; a search prints where it wrote its plan.json"
        ) from None
    except ValueError as error:
        raise PlanError(f"plan {path}: is not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("schema_version") != PLAN_SCHEMA_VERSION:
        version = document.get("schema_version") if isinstance(document, dict) else None
        raise PlanError(f"plan {path}: schema_version must be {PLAN_SCHEMA_VERSION}; got {version!r}")
    document = {"evidence": {}, **document}
    kinds = {
        "schema_version": int,
        "units": dict,
        "model": str,
        "checkpoint_sha256": str,
        "bytes": int,
        "row_alignment": int,
        "evidence": dict,
    }
    if unknown := [key for key in document if key not in kinds]:
        raise PlanError(
            f"plan {path}: has no key {', '.join(unknown)}; known here: {', '.join(kinds)}; notes of your own go into "
            "evidence"
        )
    wrong = [key for key, kind in kinds.items() if type(document.get(key)) is not kind]
    if wrong:
        expected = ", ".join(f"{key} ({kinds[key].__name__})" for key in wrong)
        raise PlanError(f"plan {path}: misses {expected}, or has another type there")
    if document["row_alignment"] < 1:
        raise PlanError(f"plan {path}: row_alignment must be positive; got {document['row_alignment']}")
    budget = document["evidence"].get("budget_pct")
    if budget is not None and not (type(budget) in (int, float) and 0 < budget < math.inf):
        raise PlanError(
            f"plan {path}: evidence.budget_pct must be a positive number, in percent; got {json.dumps(budget)}"
        )
    return document


def _details(file: PlanFile, unit: str, precision: Precision) -> dict[str, Any]:
    """What an entry says beside the precision."""
    if precision.is_rowwise:
        return {"range": str(file.row_range(unit))}
    return file.layer_forms[unit].to_dict() if precision in _FORM_OF else {}


def _unit_precision(name: str, entry: Any, where: str) -> Precision:
    if not isinstance(entry, dict) or "precision" not in entry:
        raise PlanError(f'{where} needs {{"precision": ...}}; got {entry!r}')
    among = LAYER_PRECISIONS if is_layer(name) else TABLE_PRECISIONS
    precision = Precision.parse(str(entry["precision"]), where=where, among=among)
    if precision in _FORM_OF:
        return precision
    wanted = {"precision", "range"} if precision.is_rowwise else {"precision"}
    if entry.keys() - wanted or wanted - entry.keys():
        raise PlanError(f"{where} at {precision} has {' and '.join(sorted(wanted))}; got {', '.join(sorted(entry))}")
    return precision
