"""What a run of the monitor found, as documents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowprec.monitor.judging.judge import SEVERITY, Judgement, State
from lowprec.monitor.proposal import Proposal

__all__ = ["MonitorOutcome", "window_document", "worst"]

# Units and features that a document names; the rows of `monitor_windows` have all.
NUM_NAMED = 5


@dataclass(frozen=True)
class MonitorOutcome:
    """What one run did. `windows` has the documents of those that it judged, in time order.

    state: the worst of these windows; where there was none, as `current_state`. message: why, of the newest window in
    that state. current_state: of the deployment, which is that of its newest window. Both are at least
    `insufficient_data` where complete windows are after the end of the traffic. told: what became of telling.
    """

    deployment: str
    name: str
    plan: str
    state: State
    message: str
    current_state: State
    budget_pct: float
    judged_by: str
    num_windows: int
    windows: tuple[Mapping[str, Any], ...]
    told: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of the command."""
        return {
            "deployment": self.deployment,
            "name": self.name,
            "plan": self.plan,
            "state": self.state,
            "message": self.message,
            "current_state": self.current_state,
            "budget_pct": self.budget_pct,
            "judged_by": self.judged_by,
            "num_windows": self.num_windows,
            "windows": list(self.windows),
            "told": list(self.told),
            "notes": list(self.notes),
        }


def worst(states: Sequence[State]) -> State:
    """The worst of some states."""
    return max(states, key=SEVERITY.index)


def window_document(
    row: Mapping[str, Any],
    version: int,
    judgement: Judgement,
    proposal: Proposal | None,
    proposed_plan: str | None,
    verify_with: str | None = None,
) -> dict[str, Any]:
    """The document of a window from its row, with what a person asks first.

    verify_with: the arguments of `lowprec verify`, after the config, for the proposed plan.
    """
    names = ("gap_pct", "gap_lower_pct", "gap_upper_pct", "kl_pct", "kl_lower_pct", "kl_upper_pct")
    running = ("running_pct", "running_lower_pct", "running_upper_pct", "overdispersion")
    models = ("ne_ref", "ne_plan", "auc_ref", "auc_plan", "calibration_ref", "calibration_plan")
    counts = ("num_rows", "num_labelled", "num_bad", "num_units")
    inputs = json.loads(row["inputs_json"]) if row["inputs_json"] else {"features": [], "untouched": {}}
    untouched = sorted(inputs["untouched"].items(), key=lambda item: -item[1])
    return {
        "window": row["window"],
        "version": version,
        "state": judgement.state,
        "reasons": list(judgement.reasons),
        "warnings": list(judgement.warnings),
        "checkpoint": row["checkpoint"],
        **{name: row[name] for name in (*names, *running, *models, *counts)},
        "units": json.loads(row["units_json"] or "[]")[:NUM_NAMED],
        "inputs": inputs["features"][:NUM_NAMED],
        "num_moved": row["num_moved"],
        "untouched": dict(untouched[:NUM_NAMED]),
        "saturation": json.loads(row["saturation_json"] or "[]")[:NUM_NAMED],
        "proposal": None if proposal is None else proposal.to_dict() | {"plan": proposed_plan, "verify": verify_with},
    }
