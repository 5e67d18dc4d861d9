"""A window with its verdict, as a row of `monitor_windows` and as a document."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from lowprec.monitor.inputs.range_growth import RangeGrowth
from lowprec.monitor.judging.budget_test import BudgetState
from lowprec.monitor.judging.evidence import WindowEvidence
from lowprec.monitor.judging.judge import Judgement
from lowprec.monitor.proposal import Proposal
from lowprec.monitor.window_evidence import MeasuredWindow
from lowprec.results.schema import table_schema
from lowprec.traffic import Window

__all__ = ["ProposedPlan", "ServedSnapshot", "WindowResult"]

# Units and features that a document names; the rows of `monitor_windows` have all.
NUM_NAMED = 5

# What the record fills in itself, and the other columns of a window.
_KEYS = {"row_key", "deployment", "name", "window_key", "version", "window_start", "window_end"}
_KEYS |= {"budget_pct", "judged_by", "lowprec_version", "committed_at", "judged_at"}
_COLUMNS = [name for name in table_schema("monitor_windows").arrow.names if name not in _KEYS]
# Those that a document has as well.
_SHOWN = (
    *("gap_pct", "gap_lower_pct", "gap_upper_pct", "kl_pct", "kl_lower_pct", "kl_upper_pct"),
    *("running_pct", "running_lower_pct", "running_upper_pct", "overdispersion"),
    *("ne_ref", "ne_plan", "auc_ref", "auc_plan", "calibration_ref", "calibration_plan"),
    *("num_rows", "num_labelled", "num_bad", "num_units"),
)


@dataclass(frozen=True)
class ServedSnapshot:
    """The checkpoint that was live in a window. growth: rows whose range grew since the certified one, by table."""

    path: str
    sha256: str
    growth: tuple[RangeGrowth, ...]


@dataclass(frozen=True)
class ProposedPlan:
    """A proposal with the path of its plan. verify_with: the arguments of `lowprec verify`, after the config."""

    proposal: Proposal
    path: str
    verify_with: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return self.proposal.to_dict() | {"plan": self.path, "verify": self.verify_with}


@dataclass(frozen=True)
class WindowResult:
    """A window as it is judged now.

    window_text: for people. evidence: None where the window could not be judged. measured, snapshot: None where it
    could not, or has no rows. test: after the window, None where it could not be judged. confidence: of intervals.
    """

    window: Window
    window_text: str
    version: int
    judgement: Judgement
    evidence: WindowEvidence | None = None
    measured: MeasuredWindow | None = None
    test: BudgetState | None = None
    confidence: float | None = None
    snapshot: ServedSnapshot | None = None
    proposed: ProposedPlan | None = None

    @property
    def inputs_json(self) -> str | None:
        """What later windows are compared with."""
        return None if self.measured is None else self.measured.inputs_json

    def to_row(self) -> dict[str, Any]:
        """The columns of `monitor_windows` that come from here."""
        row: dict[str, Any] = dict.fromkeys(_COLUMNS)
        if self.measured is not None:
            row |= self.measured.to_row()
        elif self.evidence is not None:
            row |= {"num_rows": 0, "num_labelled": 0, "evidence_json": json.dumps(self.evidence.to_dict())}
        if self.test is not None:
            row |= _test_columns(self.test) | {"confidence": self.confidence}
        if self.snapshot is not None:
            row |= {
                "checkpoint": self.snapshot.path,
                "checkpoint_sha256": self.snapshot.sha256,
                "saturation_json": json.dumps([growth.to_dict() for growth in self.snapshot.growth]),
            }
        return row | {
            "window": self.window_text,
            "state": self.judgement.state,
            "message": self.judgement.message,
        }

    def to_dict(self) -> dict[str, Any]:
        """The document of the window: what a person asks first."""
        row, measured, snapshot = self.to_row(), self.measured, self.snapshot
        untouched = sorted(measured.untouched.items(), key=lambda item: -item[1]) if measured else []
        return {
            "window": self.window_text,
            "version": self.version,
            "state": self.judgement.state,
            "reasons": list(self.judgement.reasons),
            "warnings": list(self.judgement.warnings),
            "checkpoint": snapshot.path if snapshot else None,
            **{name: row[name] for name in _SHOWN},
            "units": [share.to_dict() for share in measured.units[:NUM_NAMED]] if measured else [],
            "inputs": [feature.to_dict() for feature in measured.drift[:NUM_NAMED]] if measured else [],
            "num_moved": row["num_moved"],
            "untouched": dict(untouched[:NUM_NAMED]),
            "saturation": [growth.to_dict() for growth in snapshot.growth[:NUM_NAMED]] if snapshot else [],
            "proposal": self.proposed.to_dict() if self.proposed else None,
        }


def _test_columns(test: BudgetState) -> dict[str, Any]:
    """The columns that say how the test stands."""
    return {
        "running_pct": _known(100 * test.running_gap),
        "running_lower_pct": _known(100 * test.running.lower),
        "running_upper_pct": _known(100 * test.running.upper),
        "log_evidence": test.log_evidence,
        "log_threshold": test.log_threshold,
        "overdispersion": test.overdispersion,
        "epoch": test.epoch,
    }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
