"""The config file: one YAML document, checked once, with errors that name file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lowprec.errors import ConfigError
from lowprec.plan import Precision, RowRange
from lowprec.sizes import parse_bytes
from lowprec.timeouts import HUNG_S, START_S, TASK_S
from lowprec.traffic.schema import BoundsCheck, MissingDense, Schema, SparseFeature, TimeUnit

__all__ = ["Config", "TimeBound", "WindowConfig", "load_config"]

TimeBound = int | str | None

DEFAULT_BUDGET = 0.02


class _UniqueKeys(yaml.SafeLoader):
    """YAML without repeated keys: of two budgets the last would win, and nobody would know."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f'key "{key.value}" is there twice', key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SparseConfig(_Section):
    """One sparse feature; see `lowprec.traffic.schema.SparseFeature`."""

    name: str
    column: str = ""
    num_embeddings: Annotated[int, Field(gt=0)] | None = None
    modulo: Annotated[int, Field(gt=0)] | None = None
    weights: str | None = None


class TrafficConfig(_Section):
    """Where traffic lies and what its columns mean."""

    path: str
    label: str = "label"
    time: str | None = None
    time_unit: TimeUnit = "s"
    weight: str | None = None
    group: str | None = None
    dense: tuple[str, ...] = ()
    log1p: tuple[str, ...] = ()
    sparse: tuple[SparseConfig, ...]
    missing_dense: MissingDense = "error"
    bounds_check: BoundsCheck = "error"
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    batch_size: Annotated[int, Field(gt=0)] = 4096
    synthetic: dict[str, Any] | None = None

    @field_validator("sparse", mode="before")
    @classmethod
    def _names_are_features(cls, value: Any) -> Any:
        return (
            [{"name": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value
        )

    @field_validator("log1p", mode="before")
    @classmethod
    def _star_is_every_dense_column(cls, value: Any, info: Any) -> Any:
        return info.data.get("dense", ()) if value == "*" else value

    def schema_of_columns(self) -> Schema:
        """The traffic schema that this section describes."""
        return Schema(
            label=self.label,
            dense=self.dense,
            sparse=tuple(
                SparseFeature(
                    name=s.name,
                    column=s.column or s.name,
                    num_embeddings=s.num_embeddings or s.modulo,
                    modulo=s.modulo,
                    weights=s.weights,
                )
                for s in self.sparse
            ),
            time=self.time,
            time_unit=self.time_unit,
            weight=self.weight,
            group=self.group,
            log1p=frozenset(self.log1p),
            missing_dense=self.missing_dense,
            bounds_check=self.bounds_check,
        )


class WindowConfig(_Section):
    """A half-open time range [start, end); an open end is null. Dates are ISO 8601, UTC unless they say otherwise."""

    start: TimeBound = None
    end: TimeBound = None

    @field_validator("start", "end", mode="before")
    @classmethod
    def _yaml_dates_are_text(cls, value: Any) -> Any:
        return value.isoformat() if hasattr(value, "isoformat") else value


class WindowsConfig(_Section):
    """The windows of the main job, in time order."""

    train: WindowConfig | None = None
    validation: WindowConfig | None = None
    search: WindowConfig
    confirm: WindowConfig


class ModelConfig(_Section):
    """Which model, and where its weights are."""

    factory: str = "lowprec.models.dlrm:build"
    args: dict[str, Any] = {}
    checkpoint: str


class TrainConfig(_Section):
    """How `lowprec train` fits the built-in DLRM. `decay: linear` lowers both learning rates to 0 over the epochs."""

    epochs: Annotated[int, Field(gt=0)] = 4
    batch_size: Annotated[int, Field(gt=0)] = 512
    learning_rate: Annotated[float, Field(gt=0)] = 0.002
    embedding_learning_rate: Annotated[float, Field(gt=0)] = 0.02
    weight_decay: Annotated[float, Field(ge=0)] = 0.0003
    decay: Literal["none", "linear"] = "none"
    patience: Annotated[int, Field(gt=0)] = 2
    evaluations_per_epoch: Annotated[int, Field(gt=0)] = 2
    seed: Annotated[int, Field(ge=0)] = 0


class UnitRule(_Section):
    """What the units whose name matches the pattern may be. A later rule wins over an earlier one."""

    match: str
    precisions: tuple[Precision, ...] | None = None
    fixed: Precision | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> UnitRule:
        if (self.precisions is None) == (self.fixed is None):
            raise ValueError("give either precisions or fixed")
        if self.precisions is not None and not self.precisions:
            raise ValueError("precisions must not be empty")
        return self


class SpaceConfig(_Section):
    """The plans that a search may choose from, and how row-wise precisions choose the range of a row."""

    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)] = tuple(Precision)
    row_range: RowRange = RowRange.MSE
    row_alignment: Annotated[int, Field(gt=0)] = 1
    units: tuple[UnitRule, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()


class CostConfig(_Section):
    """What a plan costs, bytes or serving latency (by a file that `lowprec calibrate` wrote), and what it may cost."""

    minimize: Literal["bytes", "latency"] = "bytes"
    calibration: str | None = None
    max_bytes: Annotated[int, Field(gt=0)] | None = None
    max_latency_ns: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _latency_is_calibrated(self) -> CostConfig:
        if self.calibration is None and (self.minimize == "latency" or self.max_latency_ns is not None):
            raise ValueError("latency needs calibration: a file that lowprec calibrate wrote")
        return self


Budget = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SearchConfig(_Section):
    """How long and how hard to search, and what to accept.

    `budget` is the largest gap accepted, in percent; `budgets` asks for a plan for each of several.
    """

    budget: Budget | None = None
    budgets: tuple[Budget, ...] = ()
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    max_trials: Annotated[int, Field(gt=0)] = 48
    timeout_s: Annotated[float, Field(gt=0)] | None = None
    wave_size: Annotated[int, Field(gt=0)] = 16
    sensitivity_examples: Annotated[int, Field(gt=0)] = 2048
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> SearchConfig:
        if self.budget is not None and self.budgets:
            raise ValueError("give either budget or budgets")
        if len(set(self.budgets)) < len(self.budgets):
            raise ValueError("budgets must differ from each other")
        return self

    @property
    def all_budgets(self) -> tuple[float, ...]:
        """The budgets to find plans for, tightest first."""
        return tuple(sorted(self.budgets)) or (DEFAULT_BUDGET if self.budget is None else self.budget,)


class EvaluationConfig(_Section):
    """Where exact evaluation runs. `address` is a Ray address; null starts Ray on this machine for the command,
    but in a Ray job takes the cluster of the job.

    `num_workers: 0` evaluates in the command's own process, without Ray. `worker_memory`, such as 8GB, is what a worker
    may use: tables that are too large for it are shared among the workers. Without it every worker maps all tables.
    A task of `batches_per_task` batches that takes longer than `task_timeout_s` is taken for hung, and so is a worker
    that does not answer for `hung_after_s`: its process is killed, and what it had is done again. Workers that are not
    started within `start_timeout_s` end the run: a cluster that sets up machines for them takes minutes.
    """

    num_workers: Annotated[int, Field(ge=0)] = 2
    worker_memory: Annotated[int, Field(gt=0)] | None = None
    threads_per_worker: Annotated[int, Field(gt=0)] = 1
    batches_per_task: Annotated[int, Field(gt=0)] = 1
    task_timeout_s: Annotated[float, Field(gt=0)] = TASK_S
    hung_after_s: Annotated[float, Field(gt=0)] = HUNG_S
    start_timeout_s: Annotated[float, Field(gt=0)] = START_S
    address: str | None = None

    @field_validator("worker_memory", mode="before")
    @classmethod
    def _sizes_are_text(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _memory_is_shared_by_workers(self) -> EvaluationConfig:
        if self.worker_memory is not None and self.num_workers == 0:
            raise ValueError("worker_memory needs workers to share tables: set num_workers, or leave it out")
        return self


class ResultsConfig(_Section):
    """Where results go."""

    root: str = "runs"


class Config(_Section):
    """A whole job."""

    name: str
    traffic: TrafficConfig
    windows: WindowsConfig
    model: ModelConfig
    train: TrainConfig = TrainConfig()
    space: SpaceConfig = SpaceConfig()
    cost: CostConfig = CostConfig()
    search: SearchConfig = SearchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    results: ResultsConfig = ResultsConfig()

    def to_json(self) -> str:
        """The resolved config as one JSON document, as saved with a run."""
        return self.model_dump_json()


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
        document = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"config {path}: must be a mapping with keys {', '.join(Config.model_fields)}")
    for override in overrides:
        _apply_override(document, override)
    return _validated(document, str(path))


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f'--set "{override}": expected KEY=VALUE, for example --set search.budget=0.05')
    *parents, last = key.split(".")
    section = document
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f'--set "{override}": "{parent}" is not a section')
    try:
        section[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f'--set "{override}": the value is not YAML') from None


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
        return f"{key}: no such key{_closest(key)}"
    if error["type"] == "missing":
        return f"{key}: is required"
    message = error["msg"].removeprefix("Value error, ").replace("tuple", "list").replace("object", "mapping")
    return f"{key}: {message[0].lower()}{message[1:]}; got {json.dumps(error['input'], default=str)}"


def _closest(key: str) -> str:
    """A hint for a misspelt key: the keys of its section that look like it."""
    from difflib import get_close_matches

    *parents, last = key.split(".")
    section: Any = Config
    for parent in parents:
        annotation = section.model_fields.get(parent.partition("[")[0])
        section = annotation.annotation if annotation else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return ""
    matches = get_close_matches(last, list(section.model_fields), n=1)
    return f'; did you mean "{matches[0]}"?' if matches else f"; known here: {', '.join(section.model_fields)}"
