"""Plans by hand: one precision for all units, others for those that patterns name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Self

from lowprec.config import Config
from lowprec.core.errors import ConfigError, PlanError
from lowprec.core.progress import Progress, Silent
from lowprec.evaluation.workers.auto_workers import Work
from lowprec.plan import Form, Plan, PlanFile, Precision, Unit, precisions_of, rowwise_ranges, write_plan
from lowprec.search.job import SearchJob, open_job
from lowprec.search.space.layer_forms import fitted_forms, num_passes
from lowprec.search.space.space import Decision
from lowprec.session import open_workers
from lowprec.storage import Location

__all__ = ["HandPlan", "make_plan", "write_hand_plan"]

# Precisions of layers whose form depends on the layer, or is described by the config.
_FORMED = (Precision.INT8_DYNAMIC, Precision.INT8_STATIC, Precision.EMULATED)


@dataclass(frozen=True)
class HandPlan:
    """What a person says of a plan.

    uniform: of every unit that can have this precision; the others, and all without it, are fp32. units: patterns over
    unit names, as in space.units, with the precision of the units that match; a later one wins.
    """

    uniform: Precision | None = None
    units: tuple[tuple[str, Precision], ...] = ()

    @classmethod
    def parse(cls, uniform: str | None, units: Sequence[str]) -> Self:
        """From the options --uniform PRECISION and --unit PATTERN=PRECISION; raises `PlanError` naming the option."""
        everything = tuple(Precision)
        chosen = None if uniform is None else Precision.parse(uniform, where="--uniform", among=everything)
        pairs = []
        for text in units:
            pattern, separator, precision = text.rpartition("=")
            if not separator or not pattern:
                raise PlanError(f'--unit "{text}": expected PATTERN=PRECISION, for example --unit table:user=int2')
            among = precisions_of(pattern)
            if precision in everything:  # one that other units can have is refused with the kinds that the model has
                among = everything
            pairs.append((pattern, Precision.parse(precision, where=f'--unit "{text}"', among=among)))
        return cls(chosen, tuple(pairs))

    def __str__(self) -> str:
        parts = [f"--uniform {self.uniform}"] if self.uniform else []
        return " ".join([*parts, *(f"--unit {pattern}={precision}" for pattern, precision in self.units)])

    def plan(self, units: Sequence[Unit]) -> Plan:
        """The plan for the units of a model; raises `PlanError` for patterns and precisions that fit no unit."""
        chosen = dict.fromkeys((unit.name for unit in units), Precision.FP32)
        if self.uniform is not None:
            able = [unit.name for unit in units if self.uniform in unit.precisions]
            if not able:
                raise PlanError(f"--uniform {self.uniform}: no unit can have it; {_kinds(units)}")
            chosen |= dict.fromkeys(able, self.uniform)
        for pattern, precision in self.units:
            option = f"--unit {pattern}={precision}"
            found = [unit for unit in units if fnmatchcase(unit.name, pattern)]
            if not found:
                raise PlanError(f"{option}: matches no unit; {_known(pattern, units)}")
            wrong = [unit.name for unit in found if precision not in unit.precisions]
            if wrong:
                raise PlanError(f"{option}: {wrong[0]} cannot be {precision}; {_kinds(units)}")
            chosen |= {unit.name: precision for unit in found}
        return Plan.of(units, chosen)


def make_plan(config: Config, hand: HandPlan, *, progress: Progress | None = None) -> PlanFile:
    """The plan file of a plan by hand, for the config's checkpoint, with ranges of rows as `space.row_range` says.

    int8 layers get their forms as in a search, by passes over the search window: calibrated inputs and the form that
    changes predictions least. Other plans take no pass.

    Raises `PlanError` for what fits no unit, `ConfigError` where the config describes no arithmetic to emulate.
    """
    file, _ = _planned(config, hand, progress or Silent())
    return file


def _planned(config: Config, hand: HandPlan, listener: Progress) -> tuple[PlanFile, SearchJob]:
    job = open_job(config)
    plan = hand.plan(job.units)
    file = PlanFile(
        plan=plan,
        model=config.model.factory,
        checkpoint_sha256=job.checkpoint_sha256,
        size_bytes=job.space.size_bytes(plan),
        row_alignment=job.storage.row_alignment,
        row_ranges={unit: config.space.row_range for unit, precision in plan.items() if precision.is_rowwise},
        evidence={"kind": "hand", "made_with": str(hand)},
        layer_forms=_forms(job, plan, listener),
    )
    return file, job


def write_hand_plan(
    config: Config, hand: HandPlan, out: Location, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Write the plan file of a plan by hand, and return the document of the command.

    Raises `PlanError` where a file is there already.
    """
    if out.kind() is not None:
        raise PlanError(f"plan {out}: is there already; remove it, or give another --out")
    file, job = _planned(config, hand, progress or Silent())
    write_plan(file, out)
    return {
        "path": str(out),
        "plan": {unit: str(precision) for unit, precision in file.plan.items()},
        "row_ranges": rowwise_ranges(file.plan, file.row_ranges),
        "layer_forms": {unit: form.to_dict() for unit, form in file.layer_forms.items()},
        "bytes": file.size_bytes,
        "fp32_bytes": job.space.fp32_bytes,
        "bytes_ratio": file.size_bytes / job.space.fp32_bytes,
    }


def _forms(job: SearchJob, plan: Plan, listener: Progress) -> dict[str, Form]:
    """The forms of the layers of a plan whose precision leaves a choice."""
    formed = {unit: precision for unit, precision in plan.items() if precision in _FORMED}
    if not formed:
        return {}
    layers = job.config.space.layers
    assert layers is not None, "layers are units only where the config has them"
    emulated = [unit for unit, precision in formed.items() if precision is Precision.EMULATED]
    if emulated and layers.arithmetic is None:
        raise ConfigError(
            f"{emulated[0]}: cannot be emulated, because the config describes no arithmetic; add emulated to "
            "space.layers.precisions and describe it in space.layers.arithmetic"
        )
    space = replace(job.space, decisions=tuple(Decision(unit, (unit,), (p,)) for unit, p in formed.items()))
    window = job.window("search")
    num_batches = num_passes(window, space, layers)
    listener.stage("layers", num_batches)
    with open_workers(job, Work(window, num_batches), listener.note) as workers:
        found = fitted_forms(
            workers,
            window,
            space,
            layers,
            batches_per_task=job.config.evaluation.batches_per_task,
            on_progress=listener.advance,
        )
    return {unit: form for (unit, _), form in found.items()}


def _known(pattern: str, units: Sequence[Unit]) -> str:
    names = [unit.name for unit in units]
    near = get_close_matches(pattern, names, n=3, cutoff=0.5)
    listed = ", ".join(names[:40]) + (f", and {len(names) - 40} more" if len(names) > 40 else "")
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{meant}The units are {listed}{_no_layers(units)}"


def _kinds(units: Sequence[Unit]) -> str:
    """What units can be, by kind."""
    kinds = {"a layer" if unit.is_layer else "a table": unit.precisions for unit in units}
    return "; ".join(f"{kind} can be {', '.join(allowed)}" for kind, allowed in kinds.items()) + _no_layers(units)


def _no_layers(units: Sequence[Unit]) -> str:
    has_layers = any(unit.is_layer for unit in units)
    return "" if has_layers else "; layers are units only where the config has space.layers"
