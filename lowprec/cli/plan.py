"""Plans by hand: `lowprec plan`, and the options --uniform and --unit."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lowprec.cli.command import PLACE, command, show

if TYPE_CHECKING:
    from collections.abc import Callable

    from lowprec.config import Config
    from lowprec.search.space.hand_plan import HandPlan
    from lowprec.storage import Location

__all__ = ["by_hand", "chosen_plan", "plans"]

_Decorated = TypeVar("_Decorated", bound="Callable[..., Any]")

plans = click.Group("plans")
_command = functools.partial(command, plans)


def by_hand(function: _Decorated) -> _Decorated:
    """Add the options that describe a plan by hand."""
    uniform = click.option(
        "--uniform", metavar="PRECISION", help="By hand: every unit that can have this precision, the others fp32."
    )
    units = click.option(
        "--unit",
        "units",
        multiple=True,
        metavar="PATTERN=PRECISION",
        help="By hand: units by name or pattern, such as table:user=int2; later ones win.",
    )
    return uniform(units(function))


def chosen_plan(plan: Location | None, uniform: str | None, units: tuple[str, ...]) -> Location | HandPlan:
    """The plan that options name, a file or one by hand; raises `ConfigError` where they name none or both."""
    from lowprec.core.errors import ConfigError
    from lowprec.search.space.hand_plan import HandPlan

    is_by_hand = uniform is not None or bool(units)
    if (plan is None) is not is_by_hand:
        raise ConfigError(
            "give either --plan PLAN or a plan by hand: --uniform PRECISION, --unit PATTERN=PRECISION or both"
        )
    return HandPlan.parse(uniform, units) if plan is None else plan


@_command("plan")
@by_hand
@click.option("--out", type=PLACE, required=True, metavar="FILE", help="Where to write the plan (a path or URL).")
def plan(config: Config, uniform: str | None, units: tuple[str, ...], out: Location, as_json: bool) -> None:
    """Write a plan by hand for the checkpoint of CONFIG; without --uniform and --unit every unit is fp32.

    Such a plan has no evidence: `lowprec verify CONFIG --plan FILE` judges it. int8 layers are calibrated on the search
    window, as in a search.
    """
    from lowprec.cli import console, render
    from lowprec.search.space.hand_plan import HandPlan, write_hand_plan

    with console.Bars().shown() as bars:
        written = write_hand_plan(config, HandPlan.parse(uniform, units), out, progress=bars)
    show(console.json_document("plan", written), as_json, render.render_plan)
