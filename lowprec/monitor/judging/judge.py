"""From what was measured to a state: ok, warn, breach, insufficient_data or error, each with its reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lowprec.evaluation.metrics import PlanMetrics
from lowprec.evaluation.stats.confidence import MIN_EFFECTIVE_UNITS, MIN_UNITS, Interval, RatioMoments
from lowprec.monitor.inputs.drift import FeatureDrift
from lowprec.monitor.inputs.normal_drift import MIN_STEPS
from lowprec.monitor.judging.budget_test import BudgetState, Evidence

__all__ = ["SEVERITY", "Judgement", "State", "WindowEvidence", "judge", "standing_breach"]

State = Literal["ok", "warn", "breach", "insufficient_data", "error"]

# From the best to the worst: the state of a command that judged several windows is the worst of theirs.
SEVERITY: tuple[State, ...] = ("ok", "insufficient_data", "warn", "error", "breach")

# A decision that needs more windows than this is out of reach.
MAX_WINDOWS = 10_000
# Beyond such a change of the reference's own calibration its gap without labels is no longer the expected one.
CALIBRATION_CHANGE = 0.1
_NO_BREACH = "by itself that breaks no promise"


@dataclass(frozen=True)
class WindowEvidence:
    """What is kept of a window for the tests over the whole life, by labels and without them, and what was there.

    num_rows, num_labels: rows as they are logged, and those with a label: if they change, the window is judged again.
    """

    labels: Evidence | None
    kl: Evidence | None
    num_rows: int
    num_labels: int

    def of(self, judged_by: str) -> Evidence:
        """The evidence that the promise is judged by; nothing where there is none."""
        found = self.labels if judged_by == "labels" else self.kl
        return found or Evidence(RatioMoments(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))

    def to_dict(self) -> dict[str, Any]:
        """Numbers that come back the same to the bit."""
        return {
            "labels": _evidence_dict(self.labels),
            "kl": _evidence_dict(self.kl),
            "num_rows": self.num_rows,
            "num_labels": self.num_labels,
        }

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any]) -> WindowEvidence:
        """The inverse of `to_dict`."""
        return cls(
            _evidence_of(flat["labels"]), _evidence_of(flat["kl"]), int(flat["num_rows"]), int(flat["num_labels"])
        )


@dataclass(frozen=True)
class Judgement:
    """A state, and why: sentences on the promise, and apart from them those on what else changed."""

    state: State
    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = field(default=())

    @property
    def message(self) -> str:
        """All of it in one line."""
        return "; ".join([*self.reasons, *self.warnings])


def judge(
    metrics: PlanMetrics | None,
    standing: BudgetState,
    kl_standing: BudgetState,
    *,
    number: int,
    breach_window: str,
    evidence: Evidence,
    budget_pct: float,
    judged_by: str,
    num_unlabelled: int,
    drift: Sequence[FeatureDrift],
    certified_calibration: float | None,
    notes: Sequence[str],
) -> Judgement:
    """The state of a window that has rows.

    metrics: None where no row has a label. number: of the window, as `standing` counts them. breach_window: in which
    the breach that stands was found.
    """
    budget = f"{budget_pct:g} %"
    running = _interval_text(standing.running_gap, standing.running)
    num_running = number - standing.since + 1
    windows = _windows_text(num_running)
    other = "label-free " if judged_by == "kl" else ""
    worse: list[str] = []
    if kl_standing.in_breach and judged_by == "labels":
        kl_running = _interval_text(kl_standing.running_gap, kl_standing.running)
        above = f"is above {budget} ({kl_running})"
        if not kl_standing.began:
            above = f"was found to be above {budget}, and not to be below it again (since then {kl_running})"
        worse.append(f"the label-free gap {above}: quantization got worse, though labels do not prove it yet")
    if metrics is not None and judged_by == "labels" and metrics.gap_interval_pct.lower > budget_pct:
        worse.append(
            f"the gap of this window alone is above {budget} "
            f"({_interval_text(metrics.gap_pct / 100, _fraction(metrics.gap_interval_pct))}, one-sided bounds)"
        )
    moved = _input_warnings(drift, metrics, certified_calibration)
    warnings = (*moved, *notes)
    if standing.in_breach:
        if standing.began:
            reason = f"the {other}gap is found to be above {budget}: {running} over {windows}"
        else:
            reason = standing_breach(standing, f"the {other}gap", budget_pct, breach_window, number)
        return Judgement("breach", (reason, *worse), warnings)
    if standing.running.lower * 100 > budget_pct:
        worse.append(f"the {other}gap over {windows} seems to be above {budget}: {running}")
    ended = [f"the {other}gap is no longer above {budget}"] if standing.ended else []
    missing = _missing(metrics, num_unlabelled) if judged_by == "labels" else None
    if worse:
        return Judgement("warn", (*worse, *([missing] if missing else [])), warnings)
    if missing:
        return Judgement("insufficient_data", (*ended, missing), warnings)
    if not standing.running.upper * 100 <= budget_pct:
        reason = f"not enough evidence yet: the {other}gap over {windows} is {running}, the budget {budget}"
        more = _evidence_needed(standing, evidence, num_running, budget_pct)
        return Judgement("insufficient_data", (*ended, f"{reason}; {more}"), warnings)
    kept = (*ended, f"the {other}gap over {windows} is {running}, within {budget}")
    return Judgement("warn" if warnings else "ok", kept, warnings)


def standing_breach(standing: BudgetState, gap: str, budget_pct: float, breach_window: str, number: int) -> str:
    """A sentence on a breach that was found before window `number`: a small gap since then does not end it."""
    since = "no evidence since then"
    if math.isfinite(standing.running_gap):
        windows = _windows_text(number - standing.since + 1)
        since = f"{_interval_text(standing.running_gap, standing.running)} over {windows} since then"
    return (
        f"{gap} was found to be above {budget_pct:g} % in window {breach_window}: the breach stands until the test "
        f"finds the gap to be below the budget again ({since})"
    )


def _windows_text(number: int) -> str:
    return f"{number} window{'s' * (number != 1)}"


def _missing(metrics: PlanMetrics | None, num_unlabelled: int) -> str | None:
    """Why labels say nothing of this window; None where they do."""
    if metrics is None or metrics.num_examples == 0:
        return f"not enough evidence: none of {num_unlabelled} rows has a label"
    if not math.isfinite(metrics.calibration_ref) or not math.isfinite(metrics.ne_ref):
        return f"not enough evidence: all {metrics.num_examples} labels are the same"
    return None


def _evidence_needed(standing: BudgetState, evidence: Evidence, num_running: int, budget_pct: float) -> str:
    """How much evidence was found and is needed, and after about how many more windows there is a decision."""
    moments = evidence.moments
    found = f"{moments.effective_units:,.0f} effective units found in this window (of {moments.num_units:,})"
    needed = f"at least {MIN_EFFECTIVE_UNITS} (of {MIN_UNITS}) needed"
    if not math.isfinite(standing.running.upper):
        if moments.effective_units == 0:
            return f"{found}, {needed}: no logit changed"
        factor = max(MIN_UNITS / moments.num_units, MIN_EFFECTIVE_UNITS / moments.effective_units)
        return f"{found}, {needed}: about {math.ceil(factor * 10) / 10:g} times the examples of this window"
    gap = standing.running_gap
    distance = abs(budget_pct / 100 - gap)
    half = standing.running.upper - gap if budget_pct / 100 >= gap else gap - standing.running.lower
    factor = (half / distance) ** 2 if distance else math.inf
    if factor * num_running > MAX_WINDOWS:
        return f"{found}: a decision needs more than {MAX_WINDOWS:,} windows like these; the gap is at the budget"
    more = max(1, math.ceil(factor * num_running) - num_running)
    return f"{found}: a decision needs about {more:,} more window{'s' * (more != 1)} like these"


def _input_warnings(
    drift: Sequence[FeatureDrift],
    metrics: PlanMetrics | None,
    certified_calibration: float | None,
) -> list[str]:
    found = []
    moved = [f for f in drift if f.is_warning]
    # Of some features it may be known what is normal, and of others, as of one without lookups so far, not.
    new = [f for f in moved if f.normal_step is None]
    unusual = [f for f in moved if f.normal_step is not None]
    if unusual:
        names = _named([f"{f.feature} ({f.step:.2f} from the nearest, {f.normal_step:.2f} is normal)" for f in unusual])
        found.append(f"inputs moved beside earlier windows: {names}; {_NO_BREACH}")
    if new:
        names = _named([f"{f.feature} ({f.distance:.2f})" for f in new])
        found.append(
            f"inputs moved since the plan was certified: {names}; what is normal here is not known before "
            f"{MIN_STEPS + 1} windows; {_NO_BREACH}"
        )
    if metrics is not None and certified_calibration and math.isfinite(metrics.calibration_ref):
        change = metrics.calibration_ref / certified_calibration - 1
        if abs(change) > CALIBRATION_CHANGE:
            found.append(
                f"the reference's own calibration is {metrics.calibration_ref:.3f}, it was {certified_calibration:.3f} "
                "when the plan was certified: the label-free gap is off by about as much"
            )
    return found


def _named(texts: Sequence[str]) -> str:
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


def _interval_text(gap: float, interval: Interval) -> str:
    lower, upper = (f"{100 * end:+.4f}" if math.isfinite(end) else "unknown" for end in vars(interval).values())
    return f"{100 * gap:+.4f} % [{lower}, {upper}]"


def _fraction(interval: Interval) -> Interval:
    return Interval(interval.lower / 100, interval.upper / 100)


def _evidence_dict(evidence: Evidence | None) -> dict[str, Any] | None:
    return None if evidence is None else {**vars(evidence.moments), "design_effect": evidence.design_effect}


def _evidence_of(flat: Mapping[str, Any] | None) -> Evidence | None:
    if flat is None:
        return None
    moments = {k: v for k, v in flat.items() if k != "design_effect"}
    return Evidence(RatioMoments(**moments), float(flat["design_effect"]))
