"""What a plan costs: the bytes that serving allocates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lowprec.ops.layout import row_bytes
from lowprec.plan import Precision, Unit

__all__ = ["DominatedChoice", "plan_bytes", "undominated", "unit_bytes"]


@dataclass(frozen=True)
class DominatedChoice:
    """A precision that another one beats or equals in bytes and beats in exactness, so no search needs it."""

    name: str
    precision: Precision
    size_bytes: int
    by: Precision
    by_size_bytes: int


def unit_bytes(unit: Unit, precision: Precision, row_alignment: int) -> int:
    """Bytes of a table as FBGEMM allocates it: every row rounded up to `row_alignment` (1 on CPU, 16 on GPU)."""
    unaligned = row_bytes(unit.dim, precision)
    return unit.num_rows * (-(-unaligned // row_alignment) * row_alignment)


def plan_bytes(units: Iterable[Unit], plan: Mapping[str, Precision], row_alignment: int) -> int:
    """Bytes of all units under a plan."""
    return sum(unit_bytes(unit, plan[unit.name], row_alignment) for unit in units)


def undominated(
    name: str, units: Sequence[Unit], precisions: Iterable[Precision], row_alignment: int
) -> tuple[tuple[Precision, ...], tuple[DominatedChoice, ...]]:
    """The precisions worth trying for units that share one, most exact first, and those that are not, with the reason.

    A choice is dominated when a more exact one takes no more bytes:
    at alignment 16, int2 rows of dim 16 are as large as int4.
    """
    kept: list[tuple[Precision, int]] = []
    dominated: list[DominatedChoice] = []
    for precision in sorted(set(precisions), key=list(Precision).index):
        size = sum(unit_bytes(unit, precision, row_alignment) for unit in units)
        better = next(((p, s) for p, s in reversed(kept) if s <= size), None)
        if better is None:
            kept.append((precision, size))
        else:
            dominated.append(DominatedChoice(name, precision, size, *better))
    return tuple(p for p, _ in kept), tuple(dominated)
