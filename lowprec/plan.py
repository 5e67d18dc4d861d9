"""Precisions, units and plans: the words that every other part speaks."""

from __future__ import annotations

import enum
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from lowprec.errors import PlanError, ResultsError
from lowprec.layer_form import Arithmetic, LayerForm
from lowprec.storage import Location, Where

__all__ = [
    "LAYER_PRECISIONS",
    "TABLE_PRECISIONS",
    "Form",
    "Forms",
    "Plan",
    "PlanFile",
    "Precision",
    "RowRange",
    "Unit",
    "form_of",
    "is_layer",
    "precision_counts",
    "precision_texts",
    "precisions_of",
    "read_plan",
    "rowwise_ranges",
    "write_plan",
]

PLAN_SCHEMA_VERSION = 1


class Precision(enum.StrEnum):
    """Format of a table's rows, or of a layer's weights and arithmetic, from the most to the least exact.

    `TABLE_PRECISIONS` and `LAYER_PRECISIONS` are those of each.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8_DYNAMIC = "int8_dynamic"
    """A layer's weights int8, its inputs int8 by the range of each batch."""
    INT8_STATIC = "int8_static"
    """A layer's weights int8, its inputs int8 by a range that was calibrated."""
    EMULATED = "emulated"
    """A layer in the arithmetic of an accelerator, as `space.arithmetic` describes it."""
    INT8 = "int8"
    INT4 = "int4"
    INT2 = "int2"

    @property
    def bits(self) -> int:
        """Bits of one stored value; of an emulated one its arithmetic decides."""
        return int(self.value.partition("_")[0].lstrip("bfpint"))

    @property
    def is_rowwise(self) -> bool:
        """Whether a table's row carries its own fp16 scale and bias."""
        return self in (Precision.INT8, Precision.INT4, Precision.INT2)

    @classmethod
    def parse(cls, text: str, *, where: str, among: Sequence[Precision] | None = None) -> Precision:
        """The precision called `text`, one of a table or of those in `among`; raises `PlanError` naming `where`."""
        allowed = TABLE_PRECISIONS if among is None else among
        if text not in allowed:
            raise PlanError(f'{where}: precision must be one of {", ".join(allowed)}; got "{text}"')
        return cls(text)


TABLE_PRECISIONS = (Precision.FP32, Precision.FP16, Precision.INT8, Precision.INT4, Precision.INT2)
LAYER_PRECISIONS = (
    Precision.FP32,
    Precision.FP16,
    Precision.BF16,
    Precision.INT8_DYNAMIC,
    Precision.INT8_STATIC,
    Precision.EMULATED,
)


# What more a plan says of a layer at these precisions.
Form = LayerForm | Arithmetic
# Those of every layer and precision of a run.
Forms = Mapping[tuple[str, Precision], Form]
_FORM_OF: dict[Precision, type[LayerForm] | type[Arithmetic]] = {
    Precision.INT8_DYNAMIC: LayerForm,
    Precision.INT8_STATIC: LayerForm,
    Precision.EMULATED: Arithmetic,
}


class RowRange(enum.StrEnum):
    """How a row-wise precision chooses the scale and bias of a row; the bytes are the same."""

    MINMAX = "minmax"
    """From the smallest to the largest value, as FBGEMM's `FloatToFusedNBitRowwiseQuantizedSBHalf` has it.

    At int8, FBGEMM's `quantize_embs`, which TorchRec uses, stores other rows: codes for a scale and bias in fp32
    (`FloatToFused8BitRowwiseQuantized`), which are rounded to fp16 afterwards.
    """
    MSE = "mse"
    """A squared error near the least, never above that of `minmax`."""

    @classmethod
    def parse(cls, text: str, *, where: str) -> RowRange:
        """The range called `text`; raises `PlanError` naming `where`."""
        try:
            return cls(text)
        except ValueError:
            raise PlanError(f'{where}: range must be one of {", ".join(cls)}; got "{text}"') from None


@dataclass(frozen=True, order=True)
class Unit:
    """Something with rows or weights that gets a precision of its own.

    `name` begins with its kind: `table:user_id`, `layer:top.0`. A table has `num_rows` rows of `dim` fp32 values; the
    rows of a layer are its output channels, its dim is the number of inputs.
    """

    name: str
    num_rows: int
    dim: int

    def __post_init__(self) -> None:
        kind, _, rest = self.name.partition(":")
        if kind not in ("table", "layer") or not rest:
            raise PlanError(f'unit "{self.name}": a unit is called table:NAME or layer:NAME')
        if self.num_rows <= 0 or self.dim <= 0:
            raise PlanError(f'unit "{self.name}": rows and dim must be positive; got {self.num_rows} x {self.dim}')

    @property
    def is_layer(self) -> bool:
        """Whether it is an FC layer, and no table."""
        return is_layer(self.name)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Those that a unit of its kind can have, from the most to the least exact."""
        return LAYER_PRECISIONS if self.is_layer else TABLE_PRECISIONS


@dataclass(frozen=True)
class Plan(Mapping[str, Precision]):
    """One precision for every unit of a model, nothing left out, in the model's own order of units."""

    precisions: Mapping[str, Precision]

    @classmethod
    def of(cls, units: Iterable[Unit], precisions: Mapping[str, Precision]) -> Plan:
        """The plan for `units`; raises `PlanError` when a unit is missing or unknown."""
        names = [unit.name for unit in units]
        missing = [name for name in names if name not in precisions]
        unknown = [name for name in precisions if name not in set(names)]
        if missing or unknown:
            wrong = [f"the plan misses {', '.join(missing)}"] * bool(missing)
            wrong += [f"the model does not know {', '.join(unknown)}"] * bool(unknown)
            if unknown and all(is_layer(name) for name in unknown) and not any(is_layer(name) for name in names):
                wrong.append(
                    "the config has no space.layers, so that layers are no units: add it as it was in the search"
                )
            raise PlanError(f"plan does not fit the model ({len(names)} units: {_preview(names)}): {'; '.join(wrong)}")
        return cls({name: precisions[name] for name in names})

    @classmethod
    def uniform(cls, units: Iterable[Unit], precision: Precision) -> Plan:
        """The plan that gives every unit the same precision."""
        return cls({unit.name: precision for unit in units})

    def replace(self, changes: Mapping[str, Precision]) -> Plan:
        """This plan with some units changed; raises `PlanError` on a unit that it does not have."""
        for name in changes:
            if name not in self.precisions:
                raise PlanError(f'plan has no unit "{name}"; it has {_preview(list(self.precisions))}')
        return Plan({**self.precisions, **changes})

    def __getitem__(self, name: str) -> Precision:
        return self.precisions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.precisions)

    def __len__(self) -> int:
        return len(self.precisions)

    def __hash__(self) -> int:
        return hash(frozenset(self.precisions.items()))


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


def is_layer(unit: str) -> bool:
    """Whether a unit of that name is an FC layer, and no table."""
    return unit.startswith("layer:")


def precisions_of(pattern: str) -> tuple[Precision, ...]:
    """The precisions that units can have whose name matches a pattern: those of its kind, or all."""
    kinds = {"table": TABLE_PRECISIONS, "layer": LAYER_PRECISIONS}
    return kinds.get(pattern.partition(":")[0], tuple(Precision))


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


def write_plan(file: PlanFile, path: Where) -> None:
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


def read_plan(path: Where, *, units: Iterable[Unit] | None, checkpoint_sha256: str | None) -> PlanFile:
    """Read and check a plan against a model; with `units` None against itself, before the model is loaded.

    Raises `PlanError` when the file is not a plan, misses or invents a unit or a key of one, or was made for another
    checkpoint (`checkpoint_sha256=None` accepts any: for a new snapshot of the same model).
    """
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


def rowwise_ranges(plan: Plan, row_ranges: Mapping[str, RowRange]) -> dict[str, str]:
    """How the rows of each unit that is row-wise in a plan choose their range, for documents."""
    return {name: str(row_ranges.get(name, RowRange.MINMAX)) for name, p in plan.items() if p.is_rowwise}


def precision_counts(precisions: Iterable[str]) -> str:
    """How many units have each precision, the most frequent first: `int4:13 int8:8`."""
    counts = Counter(precisions)
    return " ".join(f"{precision}:{count}" for precision, count in sorted(counts.items(), key=lambda c: (-c[1], c[0])))


def precision_texts(plans: Sequence[Mapping[str, str]]) -> list[str]:
    """How many units of each plan have each precision; where plans count alike, the units in which they differ too.

    The first of those that count alike stands as it is; the others name up to three units that differ from it.
    """
    first: dict[str, Mapping[str, str]] = {}
    texts = []
    for plan in plans:
        counts = precision_counts(plan.values())
        other = first.setdefault(counts, plan)
        differing = [f"{unit} {precision}" for unit, precision in plan.items() if other[unit] != precision]
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        texts.append(f"{counts} ({', '.join(differing[:3])}{more})" if differing else counts)
    return texts


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


def _preview(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
