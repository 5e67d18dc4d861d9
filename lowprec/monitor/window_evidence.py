"""Measurements of one window."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lowprec.evaluation.evaluate import NUM_BLOCKS
from lowprec.evaluation.metrics import PlanMetrics
from lowprec.evaluation.rows import RowAccount
from lowprec.evaluation.stats.bounds import one_sided_bounds
from lowprec.evaluation.stats.confidence import Interval
from lowprec.evaluation.workers.worker import Workers
from lowprec.monitor.certified import Certified
from lowprec.monitor.inputs.counts import InputCounts, Inputs
from lowprec.monitor.inputs.drift import DriftRule, FeatureDrift, Novelty, feature_drift
from lowprec.monitor.inputs.normal_drift import History, InputSketch, sketches_of
from lowprec.monitor.judging.budget_test import Evidence
from lowprec.monitor.judging.evidence import WindowEvidence
from lowprec.monitor.judging.units import UnitShare, ranked, unit_shares
from lowprec.monitor.observe import WindowObservation, low_units, observe
from lowprec.plan import Plan, Precision
from lowprec.session import Session
from lowprec.storage import Location
from lowprec.traffic import TrafficWindow

__all__ = ["MeasuredWindow", "measure_window", "observe_window", "precisions_of"]


@dataclass(frozen=True)
class MeasuredWindow:
    """What one pass over a window says.

    metrics: by labels, None where no row has one. kl_pct, kl_interval: without labels, percent. evidence: for the tests
    over the whole life. units: those whose share of the gap grew most first. untouched: for each table the share of
    lookups to rows that the certified window did not touch. sketches: of the inputs by feature, for later windows.
    """

    metrics: PlanMetrics | None
    kl_pct: float
    kl_interval: Interval
    evidence: WindowEvidence
    units: tuple[UnitShare, ...]
    drift: tuple[FeatureDrift, ...]
    sketches: Mapping[str, InputSketch]
    untouched: Mapping[str, float]
    rows: RowAccount

    @cached_property
    def inputs_json(self) -> str:
        """What later windows are compared with."""
        return json.dumps(
            {
                "features": [f.to_dict() for f in self.drift],
                "untouched": dict(self.untouched),
                "sketches": {name: sketch.to_list() for name, sketch in self.sketches.items()},
            }
        )

    def to_row(self) -> dict[str, Any]:
        """The columns of `monitor_windows` that come from here."""
        found: dict[str, Any] = {}
        if self.metrics is not None:
            flat = self.metrics.to_dict()
            found = {name: flat[name] for name in _METRICS}
        return {
            **dict.fromkeys(_METRICS),
            **found,
            "kl_pct": _known(self.kl_pct),
            "kl_lower_pct": _known(self.kl_interval.lower),
            "kl_upper_pct": _known(self.kl_interval.upper),
            "num_rows": self.evidence.num_rows,
            "num_labelled": 0 if self.metrics is None else self.metrics.num_examples,
            "num_bad": self.rows.num_bad,
            "worst_unit": self.units[0].unit if self.units else None,
            "num_moved": sum(f.is_warning for f in self.drift),
            "units_json": json.dumps([share.to_dict() for share in self.units]),
            "inputs_json": self.inputs_json,
            "evidence_json": json.dumps(self.evidence.to_dict()),
        }


_METRICS = (
    "gap_pct",
    "gap_lower_pct",
    "gap_upper_pct",
    "ne_ref",
    "ne_plan",
    "auc_ref",
    "auc_plan",
    "auc_error",
    "calibration_ref",
    "calibration_plan",
    "num_units",
)


def precisions_of(plan: Plan) -> dict[str, str]:
    """The precision of every unit that is not fp32."""
    return {unit: str(plan[unit]) for unit in low_units(plan)}


def observe_window(
    session: Session,
    workers: Workers,
    plan: Plan,
    window: TrafficWindow,
    *,
    on_inputs: Callable[[int, InputCounts], None],
    quarantine: Location,
    name: str,
    on_progress: Callable[[int], None] | None = None,
) -> WindowObservation:
    """Observe a plan over a window, and set its bad rows aside; raises `TrafficError` where there are too many."""
    observation = observe(
        workers,
        window,
        plan,
        forms=session.forms,
        on_inputs=on_inputs,
        max_bad_fraction=session.config.traffic.max_bad_fraction,
        on_progress=on_progress,
    )
    session.judge_rows(name, observation.rows, observation.bad_rows, quarantine)
    return observation


def measure_window(
    session: Session,
    workers: Workers,
    plan: Plan,
    window: TrafficWindow,
    certified: Certified,
    rule: DriftRule,
    history: History,
    *,
    num_labels: int,
    quarantine: Location,
    name: str,
    on_progress: Callable[[int], None] | None = None,
) -> MeasuredWindow:
    """Measure a plan on a window; raises `TrafficError` where too many of its rows are bad.

    history: of the windows before it.
    """
    inputs = Inputs(window.schema, NUM_BLOCKS)
    novelty = Novelty(certified.inputs, certified.touched, session.features)

    def add(block: int, counts: InputCounts) -> None:
        inputs.add(block, counts)
        novelty.add(counts.sparse)

    observation = observe_window(
        session, workers, plan, window, on_inputs=add, quarantine=quarantine, name=name, on_progress=on_progress
    )
    confidence = session.config.search.confidence
    is_reference = set(plan.values()) == {Precision.FP32}
    metrics = _labelled(observation, confidence, is_reference)
    label_free = observation.label_free.evidence
    interval = one_sided_bounds(label_free, confidence, blocks=observation.label_free_blocks)
    shares = unit_shares(observation, precisions_of(plan)) if label_free.num_units else []
    return MeasuredWindow(
        metrics=metrics,
        kl_pct=100 * label_free.ratio,
        kl_interval=Interval(0.0, 0.0) if is_reference else Interval(100 * interval.lower, 100 * interval.upper),
        evidence=WindowEvidence(
            labels=_usable(observation, metrics),
            kl=Evidence(label_free, observation.label_free_design_effect) if label_free.num_units else None,
            num_rows=window.num_rows,
            num_labels=num_labels,
        ),
        units=tuple(ranked(shares, certified.units)),
        drift=tuple(feature_drift(certified.inputs, inputs, novelty, rule, history)),
        sketches=sketches_of(inputs),
        untouched=novelty.untouched(),
        rows=observation.rows,
    )


def _labelled(observation: WindowObservation, confidence: float, is_reference: bool) -> PlanMetrics | None:
    if observation.exact.num_rows == 0:
        return None
    blocks = np.stack([observation.label_blocks.x, observation.kl_blocks.x, observation.label_blocks.y], axis=1)
    return observation.exact.metrics(0, confidence=confidence, is_reference=is_reference, blocks=blocks)


def _usable(observation: WindowObservation, metrics: PlanMetrics | None) -> Evidence | None:
    """What labels say; nothing where they are all alike: then those that differ have not come yet, or are too rare."""
    if metrics is None or not math.isfinite(metrics.ne_ref) or not math.isfinite(metrics.calibration_ref):
        return None
    return Evidence(observation.exact.evidence(0)[0], observation.label_design_effect)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
