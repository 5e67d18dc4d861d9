"""Shared by all commands: CONFIG with --set, --json, --debug; one-sentence errors and exit codes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowprec.core.errors import is_panic

if TYPE_CHECKING:
    from lowprec.config import Config

__all__ = ["DURATION", "LOCAL_PATH", "PLACE", "POSITIVE", "Command", "command", "show"]

Command = Callable[..., int | None]


class _Duration(click.ParamType):  # type: ignore[type-arg]  # has none in older versions
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from lowprec.core.sizes import parse_seconds

        try:
            return parse_seconds(str(value))
        except ValueError as error:
            self.fail(f'"{value}": {error}', param, ctx)


DURATION = _Duration()
"""The type of an option such as 90s, 15m or 2h; its value is in seconds."""


class _Positive(click.FloatRange):
    """click takes NaN and infinity for positive numbers."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


POSITIVE = _Positive(min=0, min_open=True)
"""The type of an option that is a positive, finite number."""


class _LocalPath(click.Path):
    """A URL would become a folder called `s3:`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" in str(value):
            self.fail(f"{value} is a URL; give a path of this machine", param, ctx)
        return super().convert(value, param, ctx)


LOCAL_PATH = _LocalPath(path_type=Path)
"""The type of an option that is a path of this machine."""


class _Place(click.ParamType):  # type: ignore[type-arg]  # has none in older versions
    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from lowprec.storage import Location

        return Location.of(value)


PLACE = _Place()
"""The type of an option that is a path or a URL; its value is a `Location`."""


def command(
    group: click.Group, name: str, *, under: str = "", config: bool = True, optional: bool = False
) -> Callable[[Command], Command]:
    """A command of a group with the options that all share; errors become one sentence and an exit code.

    under: what documents put before the name. optional: CONFIG may be left out, and is None then.
    """

    def decorate(function: Command) -> Command:
        @functools.wraps(function)
        def run(as_json: bool, debug: bool, **options: Any) -> int:
            from lowprec.cli import console

            with console.own_stdout():
                try:
                    if config:
                        path, overrides = options.pop("config"), options.pop("overrides")
                        options["config"] = _load(path, overrides) if path else None
                    return function(as_json=as_json, **options) or 0
                except (KeyboardInterrupt, BrokenPipeError, click.ClickException):
                    raise
                except Exception as error:
                    return console.report_error(error, command=under + name, as_json=as_json, debug=debug)
                except BaseException as error:
                    if not is_panic(error):
                        raise
                    return console.report_error(error, command=under + name, as_json=as_json, debug=debug)

        decorated: Any = run
        decorated = click.option("--debug", is_flag=True, help="Show the traceback of an error.")(decorated)
        decorated = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")(decorated)
        if config:
            overrides = click.option(
                "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a config key."
            )
            decorated = click.argument("config", type=click.Path(path_type=Path), required=not optional)(
                overrides(decorated)
            )
        registered: Command = group.command(name)(decorated)
        return registered

    return decorate


def show(document: dict[str, Any], as_json: bool, render: Callable[[dict[str, Any]], None]) -> None:
    """The document of a command, for programs or for people."""
    from lowprec.cli.console import print_document

    (print_document if as_json else render)(document)


def _load(path: Path, overrides: tuple[str, ...]) -> Config:
    from lowprec.config import load_config

    return load_config(path, overrides)
