"""Counts of rows in a window: read, bad, unlabelled, out of range."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowprec.evaluation.workers.worker import Chunk
from lowprec.models.outputs import OutputCount
from lowprec.traffic import BadRow, TrafficWindow

__all__ = ["RowAccount", "RowCounter", "TableUse"]

# Bad rows are kept in memory until they are written; a window that is nearly all bad is given up after so many.
MAX_BAD_ROWS_HELD = 100_000


@dataclass(frozen=True)
class RowAccount:
    """Where the rows of a window went: `num_read` is bad, unlabelled and used ones together.

    `out_of_range` counts ids that `bounds_check` dropped or replaced, by feature. `never_looked_up` names the tables of
    which the window used no row: it says nothing about their precision.
    """

    num_read: int
    num_bad: int
    num_unlabelled: int
    out_of_range: Mapping[str, int]
    never_looked_up: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            **vars(self),
            "out_of_range": dict(self.out_of_range),
            "never_looked_up": list(self.never_looked_up),
        }

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any]) -> RowAccount:
        """The inverse of `to_dict`."""
        return cls(**{**flat, "never_looked_up": tuple(flat["never_looked_up"])})


@dataclass(frozen=True)
class TableUse:
    """How traffic uses a table: bags for each example of a window, and ids for each bag."""

    bags_per_example: float
    ids_per_bag: float


class RowCounter:
    """Adds up what chunks say about their rows."""

    def __init__(self, window: TrafficWindow, max_bad_fraction: float) -> None:
        """Nothing is counted yet."""
        self._max_bad = max(MAX_BAD_ROWS_HELD, max_bad_fraction * window.num_rows)
        self._num_read = 0
        self._out_of_range: Counter[str] = Counter()
        self._lookups: Counter[str] = Counter()
        self._bags: Counter[str] = Counter()
        self._outputs = OutputCount()
        self.bad_rows: list[BadRow] = []

    def add(self, chunk: Chunk[Any]) -> None:
        """Count a chunk."""
        self._num_read += chunk.num_rows_read
        self.bad_rows.extend(chunk.bad_rows)
        self._out_of_range.update(chunk.out_of_range)
        self._lookups.update(chunk.lookups)
        self._bags.update(chunk.bags)
        self._outputs += chunk.outputs

    @property
    def is_hopeless(self) -> bool:
        """Whether the window has more bad rows than it may, and reading on would only fill memory with them."""
        return len(self.bad_rows) > self._max_bad

    def check_outputs(self) -> None:
        """Raise `ModelError` where the model returned nothing but probabilities, and they are not declared."""
        self._outputs.check()

    def account(self, num_unlabelled: int) -> RowAccount:
        """What was counted."""
        never = tuple(name for name, count in self._lookups.items() if count == 0)
        return RowAccount(self._num_read, len(self.bad_rows), num_unlabelled, dict(self._out_of_range), never)

    def use(self) -> dict[str, TableUse]:
        """How the good rows use each table."""
        num_examples = max(self._num_read - len(self.bad_rows), 1)
        return {
            table: TableUse(bags / num_examples, self._lookups[table] / bags if bags else 0.0)
            for table, bags in self._bags.items()
        }
