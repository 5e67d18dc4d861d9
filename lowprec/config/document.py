"""The whole config, and how it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ValidationError

from lowprec.config.gate import GateConfig
from lowprec.config.monitor import MonitorConfig
from lowprec.config.sections import (
    CostConfig,
    EvaluationConfig,
    ModelConfig,
    ResultsConfig,
    SearchConfig,
    TrafficConfig,
    TrainConfig,
    WindowsConfig,
)
from lowprec.config.space import SpaceConfig
from lowprec.config.yaml_text import parse_yaml
from lowprec.core.errors import ConfigError
from lowprec.core.section import Section

__all__ = ["Config", "load_config"]


class Config(Section):
    """A whole job."""

    name: str
    traffic: TrafficConfig
    windows: WindowsConfig = WindowsConfig()
    model: ModelConfig
    train: TrainConfig = TrainConfig()
    space: SpaceConfig = SpaceConfig()
    cost: CostConfig = CostConfig()
    search: SearchConfig = SearchConfig()
    gate: GateConfig = GateConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    results: ResultsConfig = ResultsConfig()
    monitor: MonitorConfig = MonitorConfig()

    def to_json(self) -> str:
        """The resolved config as one JSON document, as saved with a run."""
        return self.model_dump_json()

    def with_(self, **sections: Mapping[str, Any]) -> Self:
        """The same config with other values of some keys, by section; they are taken as they are, not checked again."""
        return self.model_copy(
            update={name: getattr(self, name).model_copy(update=changes) for name, changes in sections.items()}
        )

    def with_traffic_version(self, version: int | None) -> Self:
        """The same config with traffic at a version of its Delta table; unchanged where it is None."""
        return self if version is None else self.with_(traffic={"version": version})

    def in_this_process(self) -> Self:
        """The same config without other workers: rows are mapped from the checkpoint."""
        return self.with_(evaluation={"num_workers": 0, "worker_memory": None})


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read and check a config; each override is `dotted.key=value` with the value in YAML.

    Raises `ConfigError` naming the file and every key that is wrong.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"config {path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config {path}: is no text file; expected YAML in UTF-8") from None
    try:
        document = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"config {path}: must be a mapping with keys {', '.join(Config.model_fields)}")
    for override in overrides:
        _apply_override(document, override)
    document = _without_null_sections(document, Config, is_top=True)
    return _validated(document, str(path))


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f'--set "{override}": expected KEY=VALUE, for example --set search.budget=0.05')
    *parents, last = key.split(".")
    section = document
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise ConfigError(f'--set "{override}": "{parent}" is not a section')
    try:
        section[last] = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f'--set "{override}": the value is not YAML: {" ".join(str(error).split())}') from None


def _without_null_sections(document: dict[str, Any], section: type[BaseModel], *, is_top: bool) -> dict[str, Any]:
    """The document with an empty mapping for a section without keys, which YAML reads as null.

    Where null has a meaning of its own, or a section is required, it stays; a section at the top says itself what is
    required in it.
    """
    found = {}
    for key, value in document.items():
        field = section.model_fields.get(key)
        inner = field.annotation if field is not None else None
        if field is not None and isinstance(inner, type) and issubclass(inner, BaseModel):
            if value is None and (is_top or not field.is_required()):
                value = {}
            if isinstance(value, dict):
                value = _without_null_sections(value, inner, is_top=False)
        found[key] = value
    return found


def _validated(document: dict[str, Any], where: str) -> Config:
    try:
        # JSON mode reads lists as tuples and names as precisions; the detour through JSON makes YAML dates text.
        return Config.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        problems = error.errors()
        # Where an item of a list is wrong, pydantic also complains of the list being too short without it.
        items = {e["loc"][:-1] for e in problems if e["loc"] and isinstance(e["loc"][-1], int)}
        sentences = [_sentence(e) for e in problems if not (e["type"] == "too_short" and e["loc"] in items)]
        raise ConfigError(f"config {where}: {'; '.join(sentences)}") from None


def _sentence(error: Any) -> str:
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    if error["type"] == "extra_forbidden":
        return f"{key}: no such key{_closest(error['loc'])}"
    if error["type"] == "missing":
        return f"{key}: is required"
    message = error["msg"].removeprefix("Value error, ").replace("tuple", "list")
    message = message.replace("an object", "a mapping").replace("object", "mapping")
    return f"{key}: {message[0].lower()}{message[1:]}; got {json.dumps(error['input'], default=str)}"


def _closest(place: Sequence[int | str]) -> str:
    """A hint for a misspelt key: the keys of its section that look like it."""
    from difflib import get_close_matches

    *parents, last = place
    section: type[BaseModel] | None = Config
    for parent in parents:
        if isinstance(parent, str) and section is not None:
            field = section.model_fields.get(parent)
            section = _section_in(field.annotation) if field is not None else None
    if section is None:
        return ""
    matches = get_close_matches(str(last), list(section.model_fields), n=1)
    return f'; did you mean "{matches[0]}"?' if matches else f"; known here: {', '.join(section.model_fields)}"


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a key takes: itself, as an item of a list, or instead of null."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part)) is not None), None)
