"""The schema of logged traffic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from lowprec.core.errors import ConfigError

__all__ = ["BoundsCheck", "MissingDense", "Schema", "SparseFeature", "TimeUnit"]

BoundsCheck = Literal["error", "drop", "zero"]
MissingDense = Literal["error", "zero"]
TimeUnit = Literal["s", "ms", "us", "ns"]


@dataclass(frozen=True)
class SparseFeature:
    """One categorical input.

    `column` holds one id (integer) or several (list of integers) a row; null and the empty list are an empty bag.
    `modulo` folds raw ids (hashes, say) into [0, modulo) before bounds are checked. `num_embeddings` is the number of
    rows of the feature's table where it is known; ids outside [0, num_embeddings) follow `bounds_check`.
    `weights` names a list<float> column with one weight for each id.
    """

    name: str
    column: str
    num_embeddings: int | None = None
    modulo: int | None = None
    weights: str | None = None


@dataclass(frozen=True)
class Schema:
    """Which column is what. `time=None` counts rows instead: windows are then row positions in file order.

    An integer time column is in `time_unit` since 1970 (or any ordered integer when windows are given as integers).
    `group` names the column whose rows are not independent (user, request): evidence is then counted in groups.
    `log1p` columns become log(1 + max(x, 0)). `missing_dense` is for nulls; NaN and Inf are always bad rows.
    """

    label: str
    dense: tuple[str, ...]
    sparse: tuple[SparseFeature, ...]
    time: str | None = None
    time_unit: TimeUnit = "s"
    weight: str | None = None
    group: str | None = None
    log1p: frozenset[str] = frozenset()
    missing_dense: MissingDense = "error"
    bounds_check: BoundsCheck = "error"

    def __post_init__(self) -> None:
        names = [feature.name for feature in self.sparse]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ConfigError(f"traffic.sparse: each feature is named once; repeated: {', '.join(repeated)}")
        strangers = sorted(self.log1p - set(self.dense))
        if strangers:
            raise ConfigError(f"traffic.log1p: not among traffic.dense: {', '.join(strangers)}")

    def with_num_embeddings(self, num_embeddings: Mapping[str, int]) -> Schema:
        """This schema with the tables' sizes filled in, by feature name, where they are not set already."""
        return replace(
            self,
            sparse=tuple(
                replace(f, num_embeddings=f.num_embeddings or num_embeddings.get(f.name)) for f in self.sparse
            ),
        )
