"""Command-line options that override keys of the config."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from lowprec.config.document import Config
from lowprec.config.gate import GateConfig
from lowprec.core.errors import ConfigError

__all__ = ["with_gate"]

_OPTIONS = {"max_ne": "--max-ne", "calibration": "--calibration", "max_ne_change_pct": "--max-ne-change"}


def with_gate(
    config: Config,
    *,
    max_ne: float | None,
    calibration: str | None,
    max_ne_change_pct: float | None,
    has_snapshot: bool,
) -> Config:
    """The config with the floors of the gate that options give; None leaves the config's own.

    calibration: LOWEST,HIGHEST. Raises `ConfigError` naming the option that is wrong.
    """
    if max_ne_change_pct is not None and not has_snapshot:
        raise ConfigError(
            "--max-ne-change: compares a new checkpoint with the deployed one, which is model.checkpoint; name the new "
            "one with --snapshot"
        )
    given: dict[str, Any] = {"max_ne": max_ne, "max_ne_change_pct": max_ne_change_pct}
    given["calibration"] = None if calibration is None else calibration.split(",")
    changed = {key: value for key, value in given.items() if value is not None}
    if not changed:
        return config
    try:
        gate = GateConfig.model_validate({**config.gate.model_dump(), **changed})
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        value = calibration if key == "calibration" else given[key]
        expected = "LOWEST,HIGHEST with 0 <= LOWEST < HIGHEST, such as 0.9,1.1" if key == "calibration" else "a number"
        raise ConfigError(f"{_OPTIONS[key]} {value}: expected {expected}") from None
    return config.model_copy(update={"gate": gate})
