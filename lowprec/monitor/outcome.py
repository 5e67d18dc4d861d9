"""The outcome of a monitor run, as a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowprec.monitor.judging.judge import SEVERITY, State

__all__ = ["MonitorOutcome", "worst"]


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
