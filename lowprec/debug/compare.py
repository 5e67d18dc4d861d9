"""Two plans, or one plan on two snapshots, unit by unit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowprec.config import Config
from lowprec.core.errors import ConfigError
from lowprec.core.progress import Progress
from lowprec.debug.debug_run import debug_plan
from lowprec.debug.report import DebugReport
from lowprec.storage import AnyPath
from lowprec.traffic.files.source import find_files

__all__ = ["Comparison", "compare_plans"]


@dataclass(frozen=True)
class Comparison:
    """Two reports of the same examples, each beside the reference of its own snapshot."""

    before: DebugReport
    after: DebugReport

    @property
    def is_as_planned(self) -> bool:
        """Whether both are."""
        return self.before.is_as_planned and self.after.is_as_planned

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of the command: units of both, those first whose part of the label-free gap grew most."""
        before, after = ({unit.unit: unit for unit in report.units} for report in (self.before, self.after))
        grew = {unit: after[unit].kl_pct - before[unit].kl_pct for unit in after if unit in before}
        ranked = sorted(grew, key=lambda unit: -grew[unit] if math.isfinite(grew[unit]) else -math.inf)
        whole = {"before": self.before.to_dict(), "after": self.after.to_dict()}
        left = {name: {k: v for k, v in of.items() if k != "units"} for name, of in whole.items()}
        return {
            "name": self.after.name,
            **left,
            "is_as_planned": self.is_as_planned,
            "units": [
                {
                    "unit": unit,
                    "grew_pct": grew[unit] if math.isfinite(grew[unit]) else None,
                    "before": before[unit].to_dict(),
                    "after": after[unit].to_dict(),
                }
                for unit in ranked
            ],
        }


def compare_plans(
    config: Config,
    plan: AnyPath,
    against: AnyPath | None,
    snapshot: str | None,
    *,
    window: str = "confirm",
    num_examples: int = 32_768,
    arrays: Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Debug `plan`, and beside it `against`, or the plan itself on another snapshot of the model.

    Arguments and errors are those of `debug_plan`; with two snapshots the plan is one that was made for either.
    """
    if (against is None) == (snapshot is None):
        raise ConfigError("give either --against or --snapshot")
    # Both look at the same version of a Delta table.
    traffic = config.traffic
    config = config.with_traffic_version(find_files(traffic.path, traffic.version).version)
    other = config
    if snapshot is not None:
        other = config.with_(model={"checkpoint": snapshot})
    is_snapshot = snapshot is not None

    def debugged(which: Config, where: AnyPath, folder: str) -> DebugReport:
        return debug_plan(
            which,
            where,
            window=window,
            num_examples=num_examples,
            arrays=arrays / folder if arrays else None,
            progress=progress,
            any_checkpoint=is_snapshot,
        )

    return Comparison(debugged(config, plan, "before"), debugged(other, plan if against is None else against, "after"))
