"""Earlier looks at a plan, and what they leave of the error rate.

A bound of one look keeps its confidence for one look. Who verifies a plan again while a window fills up has looked
twice, so each further look at the plan on an overlapping window is held to a stricter confidence, and all of them
together keep that of the config. The same examples evaluated again are the same look. A confidence sequence may be
looked at as often as one likes, and pays for it with a wider interval from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowprec.evaluation.metrics import Looks
from lowprec.search.choice import confidence_of_try

__all__ = ["Look", "Spending", "spending"]


@dataclass(frozen=True)
class Look:
    """One evaluation of a plan that ended in a verdict. key: of plan, checkpoint and examples."""

    key: str
    looks: Looks
    confidence: float
    num_units: int


@dataclass(frozen=True)
class Spending:
    """How a new look is judged, and why: `note` is empty where it is the first.

    tuned_for: units at which the sequence is tightest; None for its own.
    """

    looks: Looks
    confidence: float
    num_earlier: int
    note: str
    tuned_for: int | None = None


def spending(earlier: Sequence[Look], key: str, *, confidence: float, sequential: bool) -> Spending:
    """The terms of a look at the examples of `key`, after the looks at the same plan on overlapping windows.

    earlier: in the order of time. confidence: of all looks together.
    """
    once = {look.key: look for look in reversed(earlier) if look.looks == "once"}
    repeated = [look for look in earlier if look.looks == "repeated"]
    num_earlier = len({look.key for look in earlier})
    if sequential:
        left = confidence_of_try(confidence, len(once)) if once else confidence
        note = _note(len(once), left, confidence) if once else ""
        return Spending("repeated", left, num_earlier, note, repeated[0].num_units if repeated else None)
    if key in once:
        found = once[key].confidence
        note = f"the same examples were looked at before: this is the same look, at {_percent(found)} confidence"
        return Spending("once", found, num_earlier, note)
    attempt = len(once) + bool(repeated)
    left = confidence_of_try(confidence, attempt)
    return Spending("once", left, num_earlier, _note(attempt, left, confidence) if attempt else "")


def _note(count: int, left: float, confidence: float) -> str:
    times = "once" if count == 1 else f"{count} times"
    return (
        f"this plan was looked at {times} before on this or an overlapping window: this look is held to "
        f"{_percent(left)} confidence, so that all of them together keep {_percent(confidence)}; a window without them "
        "begins afresh, and --sequential is for looking again and again"
    )


def _percent(confidence: float) -> str:
    return f"{100 * confidence:.6g} %"
