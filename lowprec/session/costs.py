"""What plans of a model cost: bytes, latency where lookups were calibrated, and the one that a search minimises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lowprec.config import CostConfig
from lowprec.core.errors import ConfigError
from lowprec.evaluation.rows import TableUse
from lowprec.latency.calibration import Calibration, layer_latency_ns, unit_latency_ns
from lowprec.latency.calibration_file import read_calibration
from lowprec.plan import LAYER_PRECISIONS, Plan, Precision, Unit
from lowprec.plan.cost import ModelStorage

__all__ = ["Costs", "Limit", "open_costs"]


_TIMED_LAYERS = tuple(p for p in LAYER_PRECISIONS if p is not Precision.EMULATED)


@dataclass(frozen=True)
class Limit:
    """Plans must keep the sum over units of `cost(unit, precision)` at or below `at_most`."""

    name: str
    cost: Callable[[str, Precision], float]
    at_most: float


@dataclass(frozen=True)
class Costs:
    """Costs of every unit at every precision, additive over units.

    size_bytes, latency_ns: by unit and precision; latency is of all lookups and layers of one example on one thread,
    and None where nothing was calibrated. `notes` say where latencies had to be extrapolated.
    """

    minimize: str
    size_bytes: Mapping[tuple[str, Precision], int]
    latency_ns: Mapping[tuple[str, Precision], float] | None
    max_bytes: int | None
    max_latency_ns: float | None
    notes: tuple[str, ...] = ()

    def unit_cost(self, unit: str, precision: Precision) -> float:
        """What the search minimises, for one unit."""
        if self.minimize == "latency" and self.latency_ns is not None:
            return self.latency_ns[unit, precision]
        return float(self.size_bytes[unit, precision])

    def cost(self, plan: Plan) -> float:
        """What the search minimises."""
        return sum(self.unit_cost(unit, precision) for unit, precision in plan.items())

    def plan_latency_ns(self, plan: Plan) -> float | None:
        """Nanoseconds of all lookups of one example; None where nothing was calibrated."""
        latency = self.latency_ns
        return None if latency is None else sum(latency[item] for item in plan.items())

    @property
    def limits(self) -> tuple[Limit, ...]:
        """What plans may cost at most."""
        found = []
        if self.max_bytes is not None:
            found.append(Limit("cost.max_bytes", lambda u, p: float(self.size_bytes[u, p]), float(self.max_bytes)))
        latency = self.latency_ns
        if self.max_latency_ns is not None and latency is not None:
            found.append(Limit("cost.max_latency_ns", lambda u, p: latency[u, p], self.max_latency_ns))
        return tuple(found)

    def keeps_limits(self, plan: Plan) -> bool:
        """Whether a plan costs no more than it may."""
        return all(sum(limit.cost(u, p) for u, p in plan.items()) <= limit.at_most for limit in self.limits)


def open_costs(
    config: CostConfig,
    storage: ModelStorage,
    choices: Iterable[tuple[str, Precision]],
    use: Mapping[str, TableUse],
    layer_rows: Mapping[str, float],
) -> Costs:
    """The costs of the units of a model under traffic that uses the tables so, and gives layers so many rows.

    choices: the units and precisions that are asked for; of an emulated one only the bytes are known.

    Raises `ConfigError` where the calibration cannot be read or misses a precision.
    """
    calibration = read_calibration(config.calibration) if config.calibration else None
    latency: dict[tuple[str, Precision], float] | None = None
    notes: list[str] = []
    if calibration is not None:
        latency = {}
        emulated = [unit for unit, precision in choices if precision is Precision.EMULATED]
        if emulated:
            raise ConfigError(
                f"cost.calibration: {emulated[0]} may be emulated, and what that takes on the machine that it stands "
                "for is not known here; minimise bytes, or leave emulated out"
            )
        for unit in storage.units:
            if unit.is_layer:
                rows = layer_rows.get(unit.name, 0.0)
                for timed in _TIMED_LAYERS:
                    latency[unit.name, timed] = layer_latency_ns(calibration, unit, timed, rows_per_example=rows)
                continue
            used = use.get(unit.name, TableUse(0.0, 0.0))
            for precision in unit.precisions:
                latency[unit.name, precision] = unit_latency_ns(
                    calibration,
                    unit,
                    precision,
                    bags_per_example=used.bags_per_example,
                    ids_per_bag=used.ids_per_bag,
                )
        notes = _outside(calibration, [unit for unit in storage.units if not unit.is_layer], use)
    return Costs(
        minimize=config.minimize,
        size_bytes={(u.name, p): storage.unit_bytes(u, p) for u in storage.units for p in u.precisions},
        latency_ns=latency,
        max_bytes=config.max_bytes,
        max_latency_ns=config.max_latency_ns,
        notes=tuple(notes),
    )


def _outside(calibration: Calibration, units: Sequence[Unit], use: Mapping[str, TableUse]) -> list[str]:
    """One sentence for all tables whose latency is not between measured points."""
    found = {}
    for unit in units:
        ids = use[unit.name].ids_per_bag if unit.name in use else 0.0
        if ids > 0 and (said := calibration.outside(Precision.INT4, unit.dim, unit.num_rows, ids)):
            found[unit.name] = said
    if not found:
        return []
    name, said = next(iter(found.items()))
    more = f" (and {len(found) - 1} more tables)" if len(found) > 1 else ""
    return [f"latency of {name}{more} is not between calibrated points: {said}"]
