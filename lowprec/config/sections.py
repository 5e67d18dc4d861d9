"""The sections of the config file: their keys, defaults and bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lowprec.core.errors import ConfigError
from lowprec.core.section import Section
from lowprec.core.sizes import parse_bytes
from lowprec.core.timeouts import HUNG_S, START_S, TASK_S
from lowprec.traffic.schema import BoundsCheck, MissingDense, Schema, SparseFeature, TimeUnit

__all__ = [
    "Budget",
    "CostConfig",
    "EvaluationConfig",
    "ModelConfig",
    "ResultsConfig",
    "SearchConfig",
    "SparseConfig",
    "TimeBound",
    "TrafficConfig",
    "TrainConfig",
    "WindowConfig",
    "WindowsConfig",
]

TimeBound = int | str | None

DEFAULT_BUDGET = 0.02


class SparseConfig(Section):
    """One sparse feature; see `lowprec.traffic.schema.SparseFeature`."""

    name: str
    column: str = ""
    num_embeddings: Annotated[int, Field(gt=0)] | None = None
    modulo: Annotated[int, Field(gt=0)] | None = None
    weights: str | None = None


class TrafficConfig(Section):
    """Where traffic lies and what its columns mean.

    `version` pins a version of a Delta table; without it a command reads the version that is the latest when it starts.
    """

    path: str
    version: Annotated[int, Field(ge=0)] | None = None
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


class WindowConfig(Section):
    """A half-open time range [start, end); an open end is null. Dates are ISO 8601, UTC unless they say otherwise."""

    start: TimeBound = None
    end: TimeBound = None

    @field_validator("start", "end", mode="before")
    @classmethod
    def _yaml_dates_are_text(cls, value: Any) -> Any:
        return value.isoformat() if hasattr(value, "isoformat") else value


class WindowsConfig(Section):
    """The windows of the main job, in time order. Each command needs those that it reads, and no others."""

    train: WindowConfig | None = None
    validation: WindowConfig | None = None
    search: WindowConfig | None = None
    confirm: WindowConfig | None = None

    def of(self, name: str) -> WindowConfig:
        """The window of that name; raises `ConfigError` where the config has none."""
        bounds: WindowConfig | None = getattr(self, name, None)
        if bounds is None:
            raise ConfigError(f"windows.{name}: is required here; give it a start and an end")
        return bounds


class ModelConfig(Section):
    """Which model, where its weights are, and what it returns.

    `outputs: probabilities` is for a model that ends in a sigmoid: its outputs are converted by
    logit(p) = log(p) - log(1 - p), with p clamped to [2^-24, 1 - 2^-24]. Left out, outputs are logits, and a window
    whose outputs all lie in [0, 1] is refused. `unchecked_logits` accepts such logits.
    """

    factory: str = "lowprec.models.dlrm:build"
    args: dict[str, Any] = Field(default_factory=dict)
    checkpoint: str
    outputs: Literal["logits", "probabilities", "unchecked_logits"] = "logits"


class TrainConfig(Section):
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


class CostConfig(Section):
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


Budget = Annotated[float, Field(gt=0)]


class SearchConfig(Section):
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


class EvaluationConfig(Section):
    """Where exact evaluation runs. `address` is a Ray address; null starts Ray on this machine for the command,
    but in a Ray job takes the cluster of the job.

    `num_workers: 0` evaluates in the command's own process, without Ray. `auto` does so where that is faster than
    starting Ray, and else takes a worker for each `threads_per_worker` CPUs of this machine, 8 at most; with an
    `address`, a `worker_memory` or in a Ray job it takes two. Results are the same. `worker_memory`, such as 8GB,
    is what a worker may use: tables that are too large for it are shared among the workers. Without it every worker
    maps all tables. A task of `batches_per_task` batches that takes longer than `task_timeout_s` is taken for hung,
    and so is a worker that does not answer for `hung_after_s`: its process is killed, and what it had is done
    again. Workers that are not started within `start_timeout_s` end the run: a cluster that sets up machines for
    them takes minutes.
    """

    num_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
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

    @property
    def num_worker_machines(self) -> int:
        """Workers where they are wanted for more than speed, on a cluster or to share tables; `auto` is two."""
        return 2 if self.num_workers == "auto" else self.num_workers


class ResultsConfig(Section):
    """Where results go."""

    root: str = "runs"
