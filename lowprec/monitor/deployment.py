"""A deployment: a plan in production and its budget."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from lowprec.config import Config
from lowprec.core.errors import ConfigError
from lowprec.plan import PlanFile, read_plan
from lowprec.storage import AnyPath

__all__ = ["Deployment"]


@dataclass(frozen=True)
class Deployment:
    """What is watched. `key` names its rows: the same plan on the same traffic in windows of the same length, against
    the same budget; where any of that changes, another life begins.
    """

    key: str
    name: str
    plan: PlanFile
    budget_pct: float
    judged_by: str

    @classmethod
    def of(cls, config: Config, plan_path: AnyPath) -> Deployment:
        """The deployment of a plan under a config; raises `PlanError` or `ConfigError`."""
        file = read_plan(plan_path, units=None, checkpoint_sha256=None)
        watch = config.monitor
        budget = watch.budget
        if budget is None:
            made_for = file.evidence.get("budget_pct")
            if made_for is None:
                raise ConfigError(
                    f"monitor.budget: is required, because plan {plan_path} does not say which budget it was made for"
                )
            budget = float(made_for)
        traffic = config.traffic.model_dump(
            mode="json", exclude={"path", "version", "synthetic", "max_bad_fraction", "batch_size"}
        )
        parts = {
            "name": config.name,
            "units": {name: [str(p), *_details(file, name)] for name, p in file.plan.items()},
            "checkpoint": file.checkpoint_sha256,
            "traffic": traffic,
            "model": [
                config.model.factory,
                config.model.args,
                *([config.model.outputs] if config.model.outputs == "probabilities" else []),
            ],
            "window": watch.window,
            "budget_pct": budget,
            "judged_by": watch.judge_by,
            "false_alarm_rate": watch.false_alarm_rate,
        }
        text = json.dumps(parts, sort_keys=True, default=str)
        return cls(hashlib.sha256(text.encode()).hexdigest()[:16], config.name, file, budget, watch.judge_by)


def _details(file: PlanFile, unit: str) -> list[object]:
    """What a plan says of a unit beside its precision."""
    form = file.layer_forms.get(unit)
    return [str(file.row_range(unit))] if form is None else [form.to_dict()]
