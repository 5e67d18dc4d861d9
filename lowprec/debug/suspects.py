"""Ranks units by how likely they cause the error."""

from __future__ import annotations

from collections.abc import Sequence

from lowprec.debug.report import Suspect, UnitReport

__all__ = ["suspects_among"]

# Units that add less of the label-free gap than this fraction are not suspected of anything.
_MIN_SHARE = 0.02
# Ranges by squared error leave out a few of a hundred values on purpose.
_MANY = 0.05


def suspects_among(units: Sequence[UnitReport]) -> list[Suspect]:
    """The likeliest first: what returns values that are not finite, what is not as planned, what does not
    fit, and then by share.
    """
    ranked = sorted(units, key=_rank)
    return [Suspect(unit.unit, tuple(_why(unit))) for unit in ranked if _is_suspect(unit)]


def _rank(unit: UnitReport) -> tuple[int, float]:
    kind = 0 if unit.is_broken else 1 if unit.differs else 2 if unit.misfits else 3
    return kind, -unit.share


def _is_suspect(unit: UnitReport) -> bool:
    return bool(unit.is_broken or unit.differs or unit.misfits or unit.share >= _MIN_SHARE)


def _why(unit: UnitReport) -> list[str]:
    said = [*unit.differs, *unit.misfits]
    if unit.is_broken:
        said.append(
            f"{unit.alone.num_not_finite:,} of {unit.alone.num_values:,} values that it returned are not finite"
        )
    if unit.share >= _MIN_SHARE or not said:
        said.append(f"{100 * unit.share:.0f} percent of the label-free gap")
    if unit.worst:
        worst = unit.worst[0]
        name = f"row {worst.id}" if hasattr(worst, "id") else f"channel {worst.channel}"
        said.append(f"{name} has {100 * worst.share:.0f} percent of its squared error: {worst.why}")
    for name, of in unit.counts.items():
        for kind in ("saturated", "overflowed"):
            if of.get(kind, 0) > _MANY * of["values"]:
                said.append(f"{100 * of[kind] / of['values']:.0f} percent of its {name} are {kind}")
    return said
