"""Derives the state of a window (ok, warn, breach, insufficient_data) and its reasons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lowprec.evaluation.metrics import PlanMetrics
from lowprec.evaluation.stats.confidence import MIN_EFFECTIVE_UNITS, MIN_UNITS, Interval
from lowprec.monitor.deployment import Deployment
from lowprec.monitor.inputs.drift import FeatureDrift
from lowprec.monitor.inputs.normal_drift import MIN_STEPS
from lowprec.monitor.judging.budget_test import BudgetState, Evidence
from lowprec.monitor.judging.history import HistoryAt
from lowprec.monitor.window_evidence import MeasuredWindow

__all__ = ["SEVERITY", "Judgement", "State", "judge", "standing_breach"]

State = Literal["ok", "warn", "breach", "insufficient_data", "error"]

# From the best to the worst: the state of a command that judged several windows is the worst of theirs.
SEVERITY: tuple[State, ...] = ("ok", "insufficient_data", "warn", "error", "breach")

# A decision that needs more windows than this is out of reach.
MAX_WINDOWS = 10_000
# Beyond such a change of the reference's own calibration its gap without labels is no longer the expected one.
CALIBRATION_CHANGE = 0.1
_NO_BREACH = "by itself that breaks no promise"


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
    measured: MeasuredWindow,
    history: HistoryAt,
    deployment: Deployment,
    *,
    breach_window: str,
    certified_calibration: float | None,
    notes: Sequence[str],
) -> Judgement:
    """The state of a window that has rows.

    history: after the window. breach_window: in which the breach that stands was found. certified_calibration: of the
    reference in the certified window.
    """
    is_by_labels = deployment.judged_by == "labels"
    warnings = (*_input_warnings(measured.drift, measured.metrics, certified_calibration), *notes)
    worse = _worse(measured, history, deployment)
    state, gap = history.state, "the gap" if is_by_labels else "the label-free gap"
    budget, over = f"{deployment.budget_pct:g} %", f"{_running_text(state)} over {_windows_text(history.num_running)}"
    if state.in_breach:
        reason = f"{gap} is found to be above {budget}: {over}"
        if not state.began:
            reason = standing_breach(state, gap, deployment.budget_pct, breach_window, history.number)
        return Judgement("breach", (reason, *worse), warnings)
    if state.running.lower * 100 > deployment.budget_pct:
        worse.append(
            f"{gap} over {_windows_text(history.num_running)} seems to be above {budget}: {_running_text(state)}"
        )
    missing = _missing(measured.metrics, measured.rows.num_unlabelled) if is_by_labels else None
    if worse:
        return Judgement("warn", (*worse, *([missing] if missing else [])), warnings)
    ended = [f"{gap} is no longer above {budget}"] if state.ended else []
    if missing is None and not state.running.upper * 100 <= deployment.budget_pct:
        evidence = measured.evidence.of(deployment.judged_by)
        missing = (
            f"not enough evidence yet: {gap} over {_windows_text(history.num_running)} is {_running_text(state)}, the "
            f"budget {budget}; {_evidence_needed(state, evidence, history.num_running, deployment.budget_pct)}"
        )
    if missing:
        return Judgement("insufficient_data", (*ended, missing), warnings)
    kept = (*ended, f"{gap} over {_windows_text(history.num_running)} is {_running_text(state)}, within {budget}")
    return Judgement("warn" if warnings else "ok", kept, warnings)


def _worse(measured: MeasuredWindow, history: HistoryAt, deployment: Deployment) -> list[str]:
    """What is above the budget beside the gap over the whole life, where that is judged by labels."""
    if deployment.judged_by != "labels":
        return []
    found, budget, kl = [], f"{deployment.budget_pct:g} %", history.kl_state
    if kl.in_breach:
        above = f"is above {budget} ({_running_text(kl)})"
        if not kl.began:
            above = f"was found to be above {budget}, and not to be below it again (since then {_running_text(kl)})"
        found.append(f"the label-free gap {above}: quantization got worse, though labels do not prove it yet")
    metrics = measured.metrics
    if metrics is not None and metrics.gap_interval_pct.lower > deployment.budget_pct:
        alone = _interval_text(metrics.gap_pct / 100, _fraction(metrics.gap_interval_pct))
        found.append(f"the gap of this window alone is above {budget} ({alone}, one-sided bounds)")
    return found


def standing_breach(standing: BudgetState, gap: str, budget_pct: float, breach_window: str, number: int) -> str:
    """A sentence on a breach that was found before window `number`: a small gap since then does not end it."""
    since = "no evidence since then"
    if math.isfinite(standing.running_gap):
        windows = _windows_text(number - standing.since + 1)
        since = f"{_running_text(standing)} over {windows} since then"
    return (
        f"{gap} was found to be above {budget_pct:g} % in window {breach_window}: the breach stands until the test "
        f"finds the gap to be below the budget again ({since})"
    )


def _running_text(state: BudgetState) -> str:
    return _interval_text(state.running_gap, state.running)


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
