"""Alpha spending: repeated attempts to certify a plan share one error rate.

A fixed-sample bound keeps its confidence for a single evaluation. Each further attempt on an overlapping window uses a
stricter confidence, so that all attempts together keep the confidence of the config. Evaluating identical examples
again is not a new attempt. A confidence sequence allows any number of evaluations at the cost of a wider interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowprec.evaluation.metrics import Looks

__all__ = ["Look", "Spending", "confidence_of_attempt", "spending"]

# The share of the error rate that one attempt leaves to all later ones.
LEFT_TO_LATER_ATTEMPTS = 0.1


@dataclass(frozen=True)
class Look:
    """An earlier evaluation of a plan with a verdict.

    key: identifies plan, checkpoint and examples.
    """

    key: str
    looks: Looks
    confidence: float
    num_units: int


@dataclass(frozen=True)
class Spending:
    """The confidence of a new evaluation.

    num_earlier: earlier evaluations on other examples, or the same. note: an explanation for the user, empty for the
    first evaluation. tuned_for: number of units at which a confidence sequence is tightest, None for its own.
    """

    looks: Looks
    confidence: float
    num_earlier: int
    note: str
    tuned_for: int | None = None


def confidence_of_attempt(confidence: float, attempt: int) -> float:
    """The confidence of attempt 0, 1, ..., such that all attempts together keep `confidence`."""
    share = LEFT_TO_LATER_ATTEMPTS**attempt
    return 1 - (1 - confidence) * share * (1 - LEFT_TO_LATER_ATTEMPTS)


def spending(earlier: Sequence[Look], key: str, *, confidence: float, sequential: bool) -> Spending:
    """The confidence of a new evaluation, given the earlier ones.

    Args:
        earlier: Evaluations of the same plan and checkpoint on overlapping windows, oldest first.
        key: Identifies plan, checkpoint and examples of the new evaluation.
        confidence: Of all evaluations together.
        sequential: Whether the new evaluation uses a confidence sequence.
    """
    once = {look.key: look for look in reversed(earlier) if look.looks == "once"}
    repeated = [look for look in earlier if look.looks == "repeated"]
    num_earlier = len({look.key for look in earlier})
    if sequential:
        left = confidence_of_attempt(confidence, len(once)) if once else confidence
        note = _note(len(once), left, confidence) if once else ""
        return Spending("repeated", left, num_earlier, note, repeated[0].num_units if repeated else None)
    if key in once:
        found = once[key].confidence
        note = f"identical examples were evaluated before: the confidence stays {_percent(found)}, nothing is spent"
        return Spending("once", found, num_earlier, note)
    attempt = len(once) + bool(repeated)
    left = confidence_of_attempt(confidence, attempt)
    return Spending("once", left, num_earlier, _note(attempt, left, confidence) if attempt else "")


def _note(count: int, left: float, confidence: float) -> str:
    times = "once" if count == 1 else f"{count} times"
    return (
        f"this plan was evaluated {times} before on this or an overlapping window: this evaluation uses "
        f"{_percent(left)} confidence, so that all of them together keep {_percent(confidence)}; use a window without "
        "overlap, or --sequential for repeated runs on a growing window"
    )


def _percent(confidence: float) -> str:
    return f"{100 * confidence:.6g} %"
