"""Bytes of a plan, as serving allocates them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lowprec.plan.plan import Plan, Unit
from lowprec.plan.precision import Precision
from lowprec.plan.row_layout import row_bytes

__all__ = ["DominatedChoice", "LayerStorage", "ModelStorage", "plan_bytes", "undominated", "unit_bytes"]

# The scale of an int8 output channel; the row, column and value of an outlier.
_SCALE_BYTES, _OUTLIER_BYTES = 4, 12
# Between these nothing is known of who is more exact before it is measured.
_INCOMPARABLE = {Precision.INT8_DYNAMIC, Precision.INT8_STATIC, Precision.EMULATED}


@dataclass(frozen=True)
class DominatedChoice:
    """A precision that another one beats or equals in bytes and beats in exactness, so no search needs it."""

    name: str
    precision: Precision
    size_bytes: int
    by: Precision
    by_size_bytes: int


@dataclass(frozen=True)
class LayerStorage:
    """What decides the bytes of layers beside their precision.

    outliers: the largest share of weights that an int8 layer may keep in fp32; every form of int8 counts as much.
    emulated_bits: of a weight at `emulated`.
    """

    outliers: float = 0.0
    emulated_bits: int = 16


@dataclass(frozen=True)
class ModelStorage:
    """The units of a model and what decides their bytes beside their precision. row_alignment: of tables, in bytes."""

    units: tuple[Unit, ...]
    row_alignment: int = 1
    layers: LayerStorage = field(default_factory=LayerStorage)

    def size_bytes(self, plan: Mapping[str, Precision]) -> int:
        """Bytes of a plan."""
        return plan_bytes(self.units, plan, self.row_alignment, self.layers)

    def unit_bytes(self, unit: Unit, precision: Precision) -> int:
        """Bytes of one unit at a precision."""
        return unit_bytes(unit, precision, self.row_alignment, self.layers)

    @property
    def fp32_bytes(self) -> int:
        """Bytes of the reference."""
        return self.size_bytes(Plan.uniform(self.units, Precision.FP32))


def unit_bytes(unit: Unit, precision: Precision, row_alignment: int, layers: LayerStorage = LayerStorage()) -> int:
    """Bytes that serving allocates for a unit.

    A table as FBGEMM has it: every row rounded up to `row_alignment` (1 on CPU, 16 on GPU). A layer: its weights, with
    a scale for each output channel and the outliers of int8 (forms with one scale, or without outliers, store a little
    less); its bias stays fp32 and is not counted.
    """
    if unit.is_layer:
        num_weights = unit.num_rows * unit.dim
        if precision in (Precision.INT8_DYNAMIC, Precision.INT8_STATIC):
            num_outliers = max(1, round(layers.outliers * num_weights)) if layers.outliers else 0
            return num_weights + unit.num_rows * _SCALE_BYTES + num_outliers * _OUTLIER_BYTES
        bits = layers.emulated_bits if precision is Precision.EMULATED else precision.bits
        return num_weights * bits // 8
    unaligned = row_bytes(unit.dim, precision)
    return unit.num_rows * (-(-unaligned // row_alignment) * row_alignment)


def plan_bytes(
    units: Iterable[Unit], plan: Mapping[str, Precision], row_alignment: int, layers: LayerStorage = LayerStorage()
) -> int:
    """Bytes of all units under a plan."""
    return sum(unit_bytes(unit, plan[unit.name], row_alignment, layers) for unit in units)


def undominated(
    name: str,
    units: Sequence[Unit],
    precisions: Iterable[Precision],
    row_alignment: int,
    layers: LayerStorage = LayerStorage(),
) -> tuple[tuple[Precision, ...], tuple[DominatedChoice, ...]]:
    """The precisions worth trying for units that share one, most exact first, and those that are not, with the reason.

    A choice is dominated when a more exact one takes no more bytes:
    at alignment 16, int2 rows of dim 16 are as large as int4.
    """
    kept: list[tuple[Precision, int]] = []
    dominated: list[DominatedChoice] = []
    for precision in sorted(set(precisions), key=list(Precision).index):
        size = sum(unit_bytes(unit, precision, row_alignment, layers) for unit in units)
        known = [(p, s) for p, s in kept if not {p, precision} <= _INCOMPARABLE]
        better = next(((p, s) for p, s in reversed(known) if s <= size), None)
        if better is None:
            kept.append((precision, size))
        else:
            dominated.append(DominatedChoice(name, precision, size, *better))
    return tuple(p for p, _ in kept), tuple(dominated)
