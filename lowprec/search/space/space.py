"""The plans that a search may choose from, as the config describes them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from lowprec.config import SpaceConfig
from lowprec.core.errors import ConfigError
from lowprec.plan import Plan, Precision, Unit
from lowprec.plan.cost import DominatedChoice, ModelStorage, undominated

__all__ = ["Decision", "SearchSpace", "at_least_as_exact", "build_space"]


@dataclass(frozen=True)
class Decision:
    """One free choice: units that share a precision, and the precisions they may have, most exact first."""

    name: str
    units: tuple[str, ...]
    choices: tuple[Precision, ...]


@dataclass(frozen=True)
class SearchSpace:
    """Every decision of a search over the units of a model. A fixed unit is a decision with one choice."""

    storage: ModelStorage
    decisions: tuple[Decision, ...]
    dominated: tuple[DominatedChoice, ...] = ()

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units of the model."""
        return self.storage.units

    @property
    def num_plans(self) -> int:
        """How many plans there are."""
        return math.prod(len(decision.choices) for decision in self.decisions)

    @property
    def free(self) -> tuple[Decision, ...]:
        """The decisions with more than one choice."""
        return tuple(decision for decision in self.decisions if len(decision.choices) > 1)

    @property
    def most_exact(self) -> Plan:
        """The plan with the most exact choice everywhere."""
        return self.plan({})

    @property
    def cheapest(self) -> Plan:
        """The plan with the fewest bytes."""
        return self.plan({decision.name: decision.choices[-1] for decision in self.decisions})

    def plan(self, choices: Mapping[str, Precision]) -> Plan:
        """The plan with these choices by decision name; a decision left out takes its most exact one."""
        precisions = {
            unit: choices.get(decision.name, decision.choices[0])
            for decision in self.decisions
            for unit in decision.units
        }
        return Plan.of(self.units, precisions)

    def choices(self, plan: Plan) -> dict[str, Precision]:
        """The choice of every decision under a plan of this space."""
        return {decision.name: plan[decision.units[0]] for decision in self.decisions}

    def holds(self, plan: Plan) -> bool:
        """Whether a plan keeps every rule of the space."""
        return all(
            {plan[unit] for unit in decision.units} == {choice} and choice in decision.choices
            for decision, choice in zip(self.decisions, self.choices(plan).values(), strict=True)
        )

    def nearest_uniform(self, precision: Precision) -> Plan:
        """The plan in which every decision takes `precision`, or its next more exact choice where that is ruled out."""
        order = list(Precision)
        wanted = order.index(precision)
        picked = {
            decision.name: max(
                (c for c in decision.choices if order.index(c) <= wanted), key=order.index, default=decision.choices[0]
            )
            for decision in self.decisions
        }
        return self.plan(picked)

    def uniform_plans(self) -> list[Plan]:
        """One plan for each precision, every decision as near to it as it may be; most exact first, none twice."""
        plans = [self.nearest_uniform(precision) for precision in Precision]
        return list(dict.fromkeys([*plans, self.cheapest]))

    def every_plan(self) -> Iterator[Plan]:
        """All plans; their number may be astronomical."""
        names = [decision.name for decision in self.decisions]
        for choices in itertools.product(*(decision.choices for decision in self.decisions)):
            yield self.plan(dict(zip(names, choices, strict=True)))

    def check(self, plan: Mapping[str, Precision]) -> None:
        """Raise `ConfigError` where a plan has a precision that the space does not."""
        for decision in self.decisions:
            for unit in decision.units:
                if plan[unit] not in decision.choices:
                    raise ConfigError(
                        f'"{unit}" is {plan[unit]} in the plan to begin with, and the config lets it be '
                        f"{', '.join(decision.choices)}; add {plan[unit]} to space"
                    )
            if len({plan[unit] for unit in decision.units}) > 1:
                raise ConfigError(f'"{decision.name}" is one group in space.groups, and not in the plan to begin with')

    def size_bytes(self, plan: Mapping[str, Precision]) -> int:
        """Bytes of a plan."""
        return self.storage.size_bytes(plan)

    def size_of(self, unit: str, precision: Precision) -> int:
        """Bytes of one unit, by name, at a precision."""
        return self.unit_bytes(next(u for u in self.units if u.name == unit), precision)

    def unit_bytes(self, unit: Unit, precision: Precision) -> int:
        """Bytes of one unit at a precision."""
        return self.storage.unit_bytes(unit, precision)

    @property
    def fp32_bytes(self) -> int:
        """Bytes of the reference."""
        return self.storage.fp32_bytes


def at_least_as_exact(space: SearchSpace, plan: Plan) -> SearchSpace:
    """The decisions of a space with the choices that are as exact as a plan's, and its own."""
    order = list(Precision)
    decisions = []
    for decision in space.decisions:
        together = len({plan[unit] for unit in decision.units}) == 1
        for units in [decision.units] if together else [(unit,) for unit in decision.units]:
            now = plan[units[0]]
            choices = {now, *(p for p in decision.choices if order.index(p) < order.index(now))}
            name = decision.name if together else units[0]
            decisions.append(Decision(name, tuple(units), tuple(sorted(choices, key=order.index))))
    return replace(space, decisions=tuple(decisions))


def build_space(
    units: Iterable[Unit], config: SpaceConfig, *, prune: bool = True, fp32: Collection[str] = ()
) -> SearchSpace:
    """The search space over the units of a model; `prune` leaves out what a more exact choice equals or beats.

    prune: by bytes. fp32: units that can be nothing else, whatever the config allows.

    Raises `ConfigError` for patterns without units, for precisions that a unit cannot have, and for groups that
    contradict.
    """
    storage = config.storage(units)
    by_name = {unit.name: unit for unit in storage.units}
    of_layers = config.layers.precisions if config.layers else ()
    allowed = {unit.name: of_layers if unit.is_layer else config.precisions for unit in storage.units}
    for position, rule in enumerate(config.units):
        wanted = (rule.fixed,) if rule.fixed else rule.precisions or ()
        for name in _matching(rule.match, allowed, f"space.units[{position}].match"):
            allowed[name] = tuple(p for p in wanted if p in by_name[name].precisions)
            if not allowed[name]:
                kind = "layer" if by_name[name].is_layer else "table"
                raise ConfigError(
                    f"space.units[{position}]: {name} cannot be {' or '.join(wanted)}; a {kind} can be "
                    f"{', '.join(by_name[name].precisions)}"
                )
    allowed |= {name: (Precision.FP32,) for name in fp32}
    decisions: list[Decision] = []
    dominated: list[DominatedChoice] = []
    for name, members in _groups(by_name, config.groups):
        common = [p for p in Precision if all(p in allowed[member] for member in members)]
        if not common:
            raise ConfigError(
                f"space.groups: the units of {name} share a precision, but no precision is allowed for all of "
                f"{', '.join(members)}; widen space.units or split the group"
            )
        kept, dropped = (
            undominated(name, [by_name[m] for m in members], common, storage.row_alignment, storage.layers)
            if prune
            else (common, ())
        )
        decisions.append(Decision(name, members, tuple(kept)))
        dominated.extend(dropped)
    return SearchSpace(storage, tuple(decisions), tuple(dominated))


def _groups(units: Mapping[str, Unit], groups: Sequence[Sequence[str]]) -> list[tuple[str, tuple[str, ...]]]:
    """Decision name and members, in the model's order; a unit in no group stands alone under its own name."""
    group_of: dict[str, int] = {}
    for number, patterns in enumerate(groups):
        for pattern in patterns:
            for name in _matching(pattern, units, f"space.groups[{number}]"):
                if group_of.setdefault(name, number) != number:
                    raise ConfigError(
                        f"space.groups: {name} is in groups {group_of[name]} and {number}; put it into one"
                    )
    members: dict[str, list[str]] = {}
    for name in units:
        members.setdefault(f"group:{group_of[name]}" if name in group_of else name, []).append(name)
    return [(name, tuple(names)) for name, names in members.items()]


def _matching(pattern: str, names: Iterable[str], where: str) -> list[str]:
    names = list(names)
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        near = get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
        raise ConfigError(f'{where}: "{pattern}" matches no unit; units are called, for example, {", ".join(near)}')
    return found
