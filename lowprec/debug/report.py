"""The report of the debugger, as a document."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowprec.debug.causes.channels import WorstChannel
from lowprec.debug.causes.rows import WorstRow
from lowprec.debug.sums import ErrorSums
from lowprec.evaluation.metrics import PlanMetrics

__all__ = ["Change", "DebugReport", "Suspect", "UnitReport"]


@dataclass(frozen=True)
class UnitReport:
    """One unit, in the order of the model's calls.

    counts: values that lie beyond their codes (saturated), that became zero (underflowed) or not finite (overflowed),
    of how many, by what they are of. share: of the label-free gap, as a fraction; kl_pct, first_pct: what it adds to
    the label-free and to the labelled gap, in percent, the latter with its standard error. differs: how what is served
    is not what the plan makes of the checkpoint. misfits: how a form does not fit its weights or inputs, though another
    one of the same bytes would.
    """

    unit: str
    precision: str
    form: str | None
    size_bytes: int
    alone: ErrorSums
    accumulated: ErrorSums
    counts: Mapping[str, Mapping[str, int]]
    share: float
    kl_pct: float
    first_pct: float
    first_error_pct: float
    worst: tuple[WorstRow, ...] | tuple[WorstChannel, ...] = ()
    differs: tuple[str, ...] = ()
    misfits: tuple[str, ...] = ()

    @property
    def is_broken(self) -> bool:
        """Whether it returned values that are not finite."""
        return self.alone.num_not_finite > 0

    def to_dict(self) -> dict[str, Any]:
        """For documents."""
        return {
            "unit": self.unit,
            "precision": self.precision,
            "form": self.form,
            "bytes": self.size_bytes,
            "alone": self.alone.to_dict(),
            "accumulated": self.accumulated.to_dict(),
            "counts": {name: dict(of) for name, of in self.counts.items()},
            **{name: _known(getattr(self, name)) for name in ("share", "kl_pct", "first_pct", "first_error_pct")},
            "worst": [worst.to_dict() for worst in self.worst],
            "differs": list(self.differs),
            "misfits": list(self.misfits),
        }


@dataclass(frozen=True)
class Suspect:
    """A unit that may be the reason, and why."""

    unit: str
    why: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For documents."""
        return {"unit": self.unit, "why": list(self.why)}


@dataclass(frozen=True)
class Change:
    """One unit changed, all others as they are: the label-free gap before and after, evaluated exactly.

    to: a precision and form, or "as planned" where what is served is not what the plan makes. bytes_added: of the unit.
    kept: of what fp32 would take from the gap, the fraction that this change takes.
    """

    unit: str
    to: str
    kl_before_pct: float
    kl_after_pct: float
    bytes_added: int
    num_examples: int
    kept: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """For documents; None for what is not finite."""
        return {k: _known(v) for k, v in vars(self).items()}


@dataclass(frozen=True)
class DebugReport:
    """All of it. metrics: of the implementation on the sample; suspects: the likeliest first.

    num_compared: of the sample, the examples whose outputs were compared; num_traced: those of shares, changes and
    counts of inputs. differs: what is not what the plan makes of the checkpoint, and no unit's; the notes say it too.
    arrays: paths of the files that were asked for.
    """

    name: str
    label: str
    checkpoint_sha256: str
    window: str
    metrics: PlanMetrics
    num_compared: int
    num_traced: int
    units: tuple[UnitReport, ...]
    suspects: tuple[Suspect, ...]
    change: Change | None
    differs: tuple[str, ...]
    notes: tuple[str, ...]
    arrays: Mapping[str, str]
    seconds: float

    @property
    def is_as_planned(self) -> bool:
        """Whether everything is finite and what the plan makes of the checkpoint."""
        return not self.differs and not any(unit.differs or unit.is_broken for unit in self.units)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of the command."""
        return {
            "name": self.name,
            "plan": self.label,
            "checkpoint_sha256": self.checkpoint_sha256,
            "kind": "exact",
            "window": self.window,
            **self.metrics.to_dict(),
            "num_compared": self.num_compared,
            "num_traced": self.num_traced,
            "is_as_planned": self.is_as_planned,
            "units": [unit.to_dict() for unit in self.units],
            "suspects": [suspect.to_dict() for suspect in self.suspects],
            "change": self.change.to_dict() if self.change else None,
            "arrays": dict(self.arrays),
            "warnings": [*self.metrics.warnings(), *self.notes],
            "seconds": round(self.seconds, 1),
        }


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
