"""Units of a model, and plans: one precision for every unit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from lowprec.core.errors import PlanError
from lowprec.plan.precision import LAYER_PRECISIONS, TABLE_PRECISIONS, Precision, RowRange

__all__ = ["Plan", "Unit", "is_layer", "rowwise_ranges"]


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


def is_layer(unit: str) -> bool:
    """Whether a unit of that name is an FC layer, and no table."""
    return unit.startswith("layer:")


def rowwise_ranges(plan: Plan, row_ranges: Mapping[str, RowRange]) -> dict[str, str]:
    """How the rows of each unit that is row-wise in a plan choose their range, for documents."""
    return {name: str(row_ranges.get(name, RowRange.MINMAX)) for name, p in plan.items() if p.is_rowwise}


def _preview(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
