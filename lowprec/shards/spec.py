"""A written table specification: placement without model, checkpoint or traffic."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from lowprec.core.errors import ConfigError
from lowprec.shards.planner import TableLoad

__all__ = ["TablesSpec", "read_tables_spec"]


class _Entry(BaseModel):
    """A table, or `count` tables alike."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    num_rows: Annotated[int, Field(gt=0)]
    dim: Annotated[int, Field(gt=0)]
    ids: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    bags: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    lookups: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = ()
    count: Annotated[int, Field(gt=0)] = 1

    def loads(self, row_overhead: int) -> list[TableLoad]:
        names = [self.name] if self.count == 1 else [f"{self.name}_{k}" for k in range(self.count)]
        total = sum(self.lookups)
        shares = tuple(share / total for share in self.lookups) if total else ()
        return [TableLoad(n, self.num_rows, self.dim, self.ids, self.bags, shares, row_overhead) for n in names]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    tables: Annotated[tuple[_Entry, ...], Field(min_length=1)]
    dense_bytes: Annotated[int, Field(ge=0)] = 0
    batch_size: Annotated[int, Field(gt=0)] = 4096
    num_examples: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


@dataclass(frozen=True)
class TablesSpec:
    """Tables and what else a placement needs to know. dense_bytes: of the dense part; num_examples: of a window."""

    tables: tuple[TableLoad, ...]
    dense_bytes: int
    batch_size: int
    num_examples: float | None


def read_tables_spec(path: Path, *, row_overhead: int) -> TablesSpec:
    """Read a JSON file with `tables`, and `dense_bytes`, `batch_size`, `num_examples` where they are known.

    A table has `name`, `num_rows`, `dim`; `ids` and `bags` of an example (1); `lookups`, relative weights of equal
    ranges of rows (even); `count` of tables alike (1). Raises `ConfigError` naming the file and each key that is wrong.
    """
    try:
        text = path.read_text()
        document = _Document.model_validate_json(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"tables {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"tables {path}: is not JSON: {error}") from None
    except ValidationError as error:
        problems = error.errors()
        # Where an item of a list is wrong, pydantic also complains of the list being too short without it.
        items = {e["loc"][:-2] for e in problems if len(e["loc"]) > 2}
        sentences = [_said(e, text) for e in problems if not (e["type"] == "too_short" and e["loc"] in items)]
        more = f"; and {len(sentences) - 3} more" if len(sentences) > 3 else ""
        raise ConfigError(f"tables {path}: {'; '.join(sentences[:3])}{more}") from None
    tables = tuple(load for entry in document.tables for load in entry.loads(row_overhead))
    repeated = sorted(name for name, count in Counter(table.name for table in tables).items() if count > 1)
    if repeated:
        raise ConfigError(f"tables {path}: tables need names of their own; repeated: {', '.join(repeated[:3])}")
    idle = [entry.name for entry in document.tables if entry.lookups and not sum(entry.lookups)]
    if idle:
        raise ConfigError(
            f"tables {path}: the lookups of {', '.join(idle[:3])} are all 0; give weights above 0, or leave them out "
            "where lookups are even"
        )
    return TablesSpec(tables, document.dense_bytes, document.batch_size, document.num_examples)


def _said(problem: ErrorDetails, text: str) -> str:
    """What is wrong with a key, of which table, and the value that came."""
    loc = problem["loc"]
    where = ".".join(map(str, loc)) or "the file"
    if problem["type"] == "too_short":
        return f"{where}: must not be empty"
    if len(loc) > 2:
        name = json.loads(text)["tables"][loc[1]].get("name")
        where += f' (table "{name}")' if isinstance(name, str) else ""
    found = problem["input"]
    came = f"; got {json.dumps(found)[:100]}" if loc and isinstance(found, str | int | float) else ""
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}{came}"
