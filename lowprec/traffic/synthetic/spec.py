"""Synthetic traffic: what to make. The truth behind it is in `synthetic_truth`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from lowprec.core.errors import ConfigError
from lowprec.core.section import Section, no_boolean
from lowprec.traffic.schema import Schema, SparseFeature

__all__ = ["Drift", "LabelShift", "NewIds", "PopularityShift", "SyntheticSpec"]

Share = Annotated[float, Field(gt=0, le=1)]
FeatureNames = Annotated[tuple[str, ...], Field(min_length=1)]


class _Drift(BaseModel):
    """No `Section`: pydantic takes no validator of all keys where one of them says which class it is."""

    model_config = Section.model_config

    _numbers = field_validator("day", "share", "fraction", "offset", mode="before", check_fields=False)(no_boolean)


class PopularityShift(_Drift):
    """From `day` on, `share` of the lookups of `features` follow another order of popularity."""

    kind: Literal["popularity_shift"] = "popularity_shift"
    day: Annotated[float, Field(ge=0)]
    features: FeatureNames
    share: Share = 0.5


class NewIds(_Drift):
    """From `day` on, `share` of the lookups of `features` go to ids that were never seen before.

    They are `fraction` of the table's rows, kept back until then.
    """

    kind: Literal["new_ids"] = "new_ids"
    day: Annotated[float, Field(ge=0)]
    features: FeatureNames
    share: Share = 0.2
    fraction: Annotated[float, Field(gt=0, le=0.25)] = 0.1


class LabelShift(_Drift):
    """From `day` on, every logit moves by `offset`."""

    kind: Literal["label_shift"] = "label_shift"
    day: Annotated[float, Field(ge=0)]
    offset: float


Drift = Annotated[PopularityShift | NewIds | LabelShift, Field(discriminator="kind")]


class SyntheticSpec(Section):
    """Click logs with a known truth; every number has a default, and the same spec gives the same bytes.

    Columns: `ts` (int64, seconds since 1970 UTC, rising), `label` (int8), `d0..` (float32), `c0..` (int64; a list of
    int64 for the `num_multi_hot` features), `user` (int64, where `num_users` > 0) and `true_logit` (float64).

    Ids follow a Zipf law with `zipf_exponent` over tables of `smallest_table` to `largest_table` rows, spread
    geometrically, or of exactly `table_sizes`. Bags of multi-hot features have geometric lengths from 0, on average
    `mean_length`. The logit has a standard deviation of about `signal`, of whose variance `dense_share` comes from the
    dense values, `interaction_share` from `num_interactions` pairs of features and the rest from single ids;
    `user_signal` is what a user adds to all its rows. `click_rate` is the label rate without drift. Traffic spans
    `days` from `start`, with a daily wave of relative height `daily_cycle`.
    """

    num_rows: Annotated[int, Field(gt=0)] = 300_000
    seed: Annotated[int, Field(ge=0)] = 0
    num_sparse: Annotated[int, Field(gt=0)] = 26
    smallest_table: Annotated[int, Field(ge=10)] = 100
    largest_table: Annotated[int, Field(ge=10)] = 50_000
    table_sizes: tuple[Annotated[int, Field(ge=10)], ...] | None = None
    zipf_exponent: Annotated[float, Field(gt=0, le=4)] = 1.2
    num_multi_hot: Annotated[int, Field(ge=0)] = 3
    mean_length: Annotated[float, Field(gt=0)] = 3.0
    num_dense: Annotated[int, Field(ge=0)] = 13
    click_rate: Annotated[float, Field(gt=0, lt=1)] = 0.25
    signal: Annotated[float, Field(gt=0)] = 1.8
    dense_share: Annotated[float, Field(ge=0, le=1)] = 0.15
    interaction_share: Annotated[float, Field(ge=0, le=1)] = 0.25
    num_interactions: Annotated[int, Field(ge=0)] = 13
    interaction_rank: Annotated[int, Field(gt=0)] = 4
    start: int = 1_767_225_600
    days: Annotated[float, Field(gt=0)] = 10.0
    daily_cycle: Annotated[float, Field(ge=0, lt=1)] = 0.6
    num_users: Annotated[int, Field(ge=0)] = 0
    user_signal: Annotated[float, Field(ge=0)] = 0.3
    drifts: tuple[Drift, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, key: str = "traffic.synthetic") -> SyntheticSpec:
        """The spec of a config section called `key`; raises `ConfigError` naming every key that is wrong."""
        try:
            # Through JSON, so that lists are tuples and nothing but plain values gets in.
            return cls.model_validate_json(json.dumps(dict(values)))
        except ValidationError as error:
            raise ConfigError("; ".join(_sentence(key, problem) for problem in error.errors())) from None
        except TypeError as error:
            raise ConfigError(f"{key}: {error}") from None

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        if self.table_sizes is not None and len(self.table_sizes) != self.num_sparse:
            raise ValueError(f"table_sizes must have num_sparse = {self.num_sparse} entries")
        if self.largest_table < self.smallest_table:
            raise ValueError("largest_table must be at least smallest_table")
        if self.num_multi_hot > self.num_sparse:
            raise ValueError("num_multi_hot must be at most num_sparse")
        if self.dense_share + self.interaction_share > 1:
            raise ValueError("dense_share and interaction_share must add up to at most 1")
        kept_back = dict.fromkeys(self.features, 0.0)
        for at, drift in enumerate(self.drifts):
            for name in () if isinstance(drift, LabelShift) else drift.features:
                if name not in kept_back:
                    raise ValueError(f'drifts[{at}]: no feature "{name}"; features are c0 to c{self.num_sparse - 1}')
                kept_back[name] += drift.fraction if isinstance(drift, NewIds) else 0.0
                if kept_back[name] > 0.5:
                    raise ValueError(f'drifts[{at}]: new ids keep back more than half of table "{name}"')
        return self

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the sparse features, which are also their columns."""
        return tuple(f"c{i}" for i in range(self.num_sparse))

    @property
    def multi_hot(self) -> frozenset[str]:
        """The features with a list of ids, spread evenly over the sizes."""
        step = self.num_sparse / max(self.num_multi_hot, 1)
        return frozenset(f"c{int((i + 0.5) * step)}" for i in range(self.num_multi_hot))

    @property
    def num_embeddings(self) -> dict[str, int]:
        """Rows of each feature's table."""
        if self.table_sizes is not None:
            return dict(zip(self.features, self.table_sizes, strict=True))
        sizes = np.geomspace(self.smallest_table, self.largest_table, self.num_sparse).round().astype(int)
        return dict(zip(self.features, sizes.tolist(), strict=True))

    def schema_of_columns(self) -> Schema:
        """How a reader sees this traffic."""
        return Schema(
            label="label",
            dense=tuple(f"d{i}" for i in range(self.num_dense)),
            sparse=tuple(SparseFeature(name, name, size) for name, size in self.num_embeddings.items()),
            time="ts",
            group="user" if self.num_users else None,
        )


def _sentence(key: str, error: Any) -> str:
    place = key
    for part in error["loc"]:
        if part not in ("popularity_shift", "new_ids", "label_shift"):
            place += f"[{part}]" if isinstance(part, int) else f".{part}"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), SyntheticSpec.model_fields, n=1)
        return f"{place}: no such key" + (f'; did you mean "{near[0]}"?' if near else "")
    if error["type"] == "missing":
        return f"{place}: is required"
    message = error["msg"].removeprefix("Value error, ")
    got = "" if error["type"] == "value_error" else f"; got {json.dumps(error['input'], default=str)}"
    return f"{place}: {message[0].lower()}{message[1:]}{got}"
