"""The floors of the launch gate: what a model must reach by itself, beside the budget of its plan.

A gap compares a plan with the fp32 model of the same checkpoint, so a ruined checkpoint passes by its gap. Floors judge
the model that would be served: its NE, its calibration, and its NE beside that of the deployed checkpoint. Each
compares a point estimate with its limit, whatever its standard error: set a limit with room for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lowprec.config import Config, GateConfig
from lowprec.core.errors import PlanError
from lowprec.core.progress import Progress
from lowprec.evaluation.metrics import PlanMetrics
from lowprec.evaluation.stats.confidence import Verdict
from lowprec.evaluation.workers.auto_workers import Work
from lowprec.models.checkpoints.checkpoint import checkpoint_sha256, checkpoint_stamp
from lowprec.plan import PlanFile
from lowprec.session import open_session, open_workers
from lowprec.storage import Location

__all__ = ["Floor", "Gate", "floors_of", "gated"]


@dataclass(frozen=True)
class Floor:
    """One floor: its config key below `gate`, the figure of the plan and of fp32, and the limit that it was held to.

    is_kept: None where the figure cannot be measured, as NE where all labels are the same. is_kept_by_fp32: whether
    another plan of this checkpoint could keep it, because its fp32 model does.
    """

    name: str
    figure: float
    fp32_figure: float
    limit: str
    is_kept: bool | None
    is_kept_by_fp32: bool
    advice: str

    @property
    def message(self) -> str:
        """The figure, the floor and what to do, in one sentence."""
        value = f"{_NAMES[self.name]} is {_number(self.figure)} (fp32: {_number(self.fp32_figure)})"
        if self.is_kept is None:
            return f"gate.{self.name}: {value}, so the floor ({self.limit}) cannot be judged on this window"
        if self.is_kept:
            return f"gate.{self.name}: {value}, the floor is {self.limit}"
        return f"gate.{self.name}: {value}, and the floor is {self.limit}: {self.advice}"

    def to_dict(self) -> dict[str, Any]:
        """For documents and results; None for a figure that is not defined."""
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in vars(self).items()}
        return {**{k: v for k, v in known.items() if k != "advice"}, "message": self.message}


_NAMES = {"max_ne": "NE", "calibration": "calibration", "max_ne_change_pct": "the change of NE in percent"}


def floors_of(metrics: PlanMetrics, gate: GateConfig, deployed: PlanMetrics | None = None) -> tuple[Floor, ...]:
    """Every floor of the config, judged. deployed: of the deployed checkpoint on the same window, where it is known."""
    found: list[Floor] = []

    def add(name: str, plan: float, fp32: float, limit: str, is_within: Callable[[float], bool], advice: str) -> None:
        is_kept = is_within(plan) if math.isfinite(plan) else None
        found.append(Floor(name, plan, fp32, limit, is_kept, math.isfinite(fp32) and is_within(fp32), advice))

    ne, calibration, change = gate.max_ne, gate.calibration, gate.max_ne_change_pct
    if ne is not None:
        advice = (
            "a model that predicts the label rate for every example has NE 1; check its features, its checkpoint and "
            "that it returns logits"
            if ne >= 1
            else "train it further, or change gate.max_ne"
        )
        add("max_ne", metrics.ne_plan, metrics.ne_ref, f"below {ne:g}", lambda value: value < ne, advice)
    if calibration is not None:
        lowest, highest = calibration
        add(
            "calibration",
            metrics.calibration_plan,
            metrics.calibration_ref,
            f"from {lowest:g} to {highest:g}",
            lambda value: lowest <= value <= highest,
            "calibrate the model on recent traffic, or change gate.calibration",
        )
    if change is not None and deployed is not None:
        add(
            "max_ne_change_pct",
            _change_pct(metrics.ne_plan, deployed.ne_plan),
            _change_pct(metrics.ne_ref, deployed.ne_ref),
            f"at most {change:+g} against the deployed checkpoint (NE {_number(deployed.ne_plan)})",
            lambda value: value <= change,
            "keep the deployed checkpoint, and find what changed in training",
        )
    return tuple(found)


def gated(verdict: Verdict, floors: Sequence[Floor]) -> Verdict:
    """The verdict of a plan with its floors: a broken one rejects, one that cannot be judged certifies nothing."""
    if any(floor.is_kept is False for floor in floors):
        return "rejected"
    if verdict == "certified" and any(floor.is_kept is None for floor in floors):
        return "inconclusive"
    return verdict


class Gate:
    """The floors of a config for one plan, and the deployed model where one of them compares with it."""

    def __init__(self, config: Config, file: PlanFile, *, is_of_snapshot: bool, progress: Progress) -> None:
        """config: that of the deployed checkpoint. is_of_snapshot: whether another checkpoint than that is judged.

        Raises `PlanError` where a floor compares with the deployed checkpoint and the plan was made for another one.
        """
        self._config, self._file, self._progress = config, file, progress
        self._compares = is_of_snapshot and config.gate.max_ne_change_pct is not None
        self._deployed: dict[str, PlanMetrics] = {}
        if self._compares:
            _check_deployed(config.model.checkpoint, file.checkpoint_sha256)

    def floors(self, metrics: PlanMetrics, window: str, quarantine: Location) -> tuple[Floor, ...]:
        """Every floor, judged for the metrics of a plan on a window.

        The deployed checkpoint is evaluated on that window where `gate.max_ne_change_pct` compares with it; its bad
        rows are written to `quarantine`.
        """
        if self._compares and window not in self._deployed:
            self._deployed[window] = _deployed_metrics(
                self._config, self._file, window, quarantine=quarantine / "deployed", progress=self._progress
            )
        return floors_of(metrics, self._config.gate, self._deployed.get(window))


def _check_deployed(checkpoint: str, made_for: str) -> None:
    path = str(Location.of(checkpoint).absolute())
    found = checkpoint_sha256(path, stamp=checkpoint_stamp(path))
    if found != made_for:
        raise PlanError(
            f"gate.max_ne_change_pct: the plan was made for checkpoint {made_for[:12]}, and model.checkpoint "
            f"{checkpoint} is {found[:12]}, so it is not the deployed one; point model.checkpoint at the deployed "
            "checkpoint, or leave this floor out"
        )


def _deployed_metrics(
    config: Config, file: PlanFile, window: str, *, quarantine: Location, progress: Progress
) -> PlanMetrics:
    """The metrics of a plan on the config's own checkpoint over a whole window."""
    session = open_session(config).as_planned(file)
    traffic = session.window(window)
    progress.stage("deployed checkpoint", traffic.num_batches)
    with open_workers(session, Work(traffic, traffic.num_batches), progress.note) as workers:
        evaluation = session.evaluate(
            workers, window, traffic, [file.plan], quarantine=quarantine, on_progress=progress.advance
        )
    return evaluation.metrics[0]


def _change_pct(now: float, before: float) -> float:
    return 100 * (now / before - 1) if before else math.nan


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not defined"
