"""Places rows on workers by memory, then by lookup frequency.

Small and busy tables are held by every worker, so that they are never asked for over the network. The others are cut
into ranges of rows where one worker cannot hold them, or would do most of the lookups, and the pieces are packed: the
largest first, each to the worker that is then the least full of both memory and lookups. Where tables were cut once,
they can be placed on other workers in the same pieces.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from lowprec.core.errors import ConfigError
from lowprec.core.sizes import bytes_text, bytes_text_above

__all__ = ["Cuts", "Placement", "Shard", "TableLoad", "place_tables"]

_VALUE_BYTES = 4

Cuts = Mapping[str, Sequence[int]]
"""By table, for those in several pieces: the first row of each piece, in order."""

# A table of this share of an even worker's lookups, or more, is cut for their sake.
_BUSY_SHARE = 1.25
# A table of more than this many times an even share of a worker's memory is cut, into pieces of at most this share,
# which leave room for other tables beside them: as many for every worker where they are many.
_LARGE_TABLE, _PIECE = 1.2, 0.5
# Copies are made until workers are this full: the fuller, the less choice is left for the other tables, and the less a
# further copy saves. Where workers are fuller than that, copies may still take this share of their memory.
_FULL_WITH_COPIES, _FEW_COPIES = 0.8, 0.01


@dataclass(frozen=True)
class TableLoad:
    """A table, and what one example asks of it on average.

    ids: how many ids; bags: how many bags they are pooled into. lookups: the share of the ids in each of equal ranges
    of rows, in order, adding up to 1; even when left out. row_overhead: bytes that are kept for a row beside its
    values. Raises `ConfigError` for what cannot be.
    """

    name: str
    num_rows: int
    dim: int
    ids: float = 1.0
    bags: float = 1.0
    lookups: tuple[float, ...] = ()
    row_overhead: int = 0

    def __post_init__(self) -> None:
        for what in ("num_rows", "dim"):
            value = getattr(self, what)
            if type(value) is not int or value < 1:
                raise ConfigError(f'table "{self.name}": {what} must be a whole number above 0; got {value!r}')
        for what in ("ids", "bags"):
            value = getattr(self, what)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f'table "{self.name}": {what} of an example must be 0 or more; got {value!r}')
        if self.lookups and not (min(self.lookups) >= 0 and abs(sum(self.lookups) - 1) < 1e-6):
            raise ConfigError(
                f'table "{self.name}": lookups must be shares from 0 that add up to 1; they add up to '
                f"{sum(self.lookups):g}"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of a row where it is held."""
        return _VALUE_BYTES * self.dim + self.row_overhead

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole table where it is held."""
        return self.num_rows * self.row_bytes

    @cached_property
    def _cumulative(self) -> tuple[float, ...]:
        """The share of lookups before each range of rows, and 1 at the end."""
        shares = self.lookups or (1.0,)
        total = sum(shares)
        return (0.0, *(value / total for value in accumulate(shares)))

    def share(self, first_row: int, end_row: int) -> float:
        """The share of the table's lookups in rows [first_row, end_row)."""
        return self._share_before(end_row) - self._share_before(first_row)

    def row_at(self, share: float) -> int:
        """The first row that has at least `share` of the lookups before it."""
        if share >= 1:
            return self.num_rows
        k = max(0, bisect_right(self._cumulative, share) - 1)
        k = min(k, len(self._cumulative) - 2)
        width = self._cumulative[k + 1] - self._cumulative[k]
        within = (share - self._cumulative[k]) / width if width else 0.0
        return min(self.num_rows, math.ceil((k + within) * self.num_rows / (len(self._cumulative) - 1)))

    def _share_before(self, row: int) -> float:
        num_ranges = len(self._cumulative) - 1
        position = row * num_ranges / self.num_rows
        k = min(int(position), num_ranges - 1)
        return self._cumulative[k] + (position - k) * (self._cumulative[k + 1] - self._cumulative[k])


@dataclass(frozen=True, order=True)
class Shard:
    """Rows [first_row, end_row) of a table, at a worker."""

    table: str
    first_row: int
    end_row: int
    worker: int

    @property
    def num_rows(self) -> int:
        """How many rows."""
        return self.end_row - self.first_row


@dataclass(frozen=True)
class Placement:
    """Every row at one worker, or at all of them.

    replicated: the tables that every worker holds. shards: the rows of the others, in order of tables and rows.
    capacities: bytes that each worker has for tables.
    """

    tables: tuple[TableLoad, ...]
    capacities: tuple[int, ...]
    replicated: tuple[str, ...]
    shards: tuple[Shard, ...]

    def __post_init__(self) -> None:
        """Leave out shards without rows: nobody asks for them, and their first row is another one's."""
        object.__setattr__(self, "shards", tuple(shard for shard in self.shards if shard.num_rows))

    @property
    def num_workers(self) -> int:
        """How many workers."""
        return len(self.capacities)

    @cached_property
    def table(self) -> dict[str, TableLoad]:
        """The tables by name."""
        return {table.name: table for table in self.tables}

    @cached_property
    def shards_of(self) -> dict[str, tuple[Shard, ...]]:
        """The shards of every table that is not replicated, in order of rows."""
        found: dict[str, list[Shard]] = {}
        for shard in self.shards:
            found.setdefault(shard.table, []).append(shard)
        return {name: tuple(shards) for name, shards in found.items()}

    @property
    def cuts(self) -> dict[str, list[int]]:
        """Where tables are cut, which decides the last bits of what they give."""
        shards = self.shards_of.items()
        return {name: [shard.first_row for shard in pieces] for name, pieces in shards if len(pieces) > 1}

    @cached_property
    def held_bytes(self) -> tuple[int, ...]:
        """Bytes of tables at each worker."""
        copies = sum(self.table[name].num_bytes for name in self.replicated)
        held = [copies] * self.num_workers
        for shard in self.shards:
            held[shard.worker] += shard.num_rows * self.table[shard.table].row_bytes
        return tuple(held)

    @cached_property
    def lookups(self) -> tuple[float, ...]:
        """Ids that each worker looks up for an example, where all workers evaluate as many examples."""
        even = sum(self.table[name].ids for name in self.replicated) / self.num_workers
        found = [even] * self.num_workers
        for shard in self.shards:
            table = self.table[shard.table]
            found[shard.worker] += table.ids * table.share(shard.first_row, shard.end_row)
        return tuple(found)


def place_tables(
    tables: Sequence[TableLoad], capacities: Sequence[int], cuts: Cuts | None = None, *, own_bytes: int = 0
) -> Placement:
    """Place tables on workers that have `capacities` bytes for them; the same arguments give the same placement.

    cuts: cut tables there and nowhere else. own_bytes: what a worker needs beside them, for advice. Raises
    `ConfigError` where they do not fit, with what would be enough.
    """
    if not capacities:
        raise ConfigError("no workers to place tables on")
    if len({table.name for table in tables}) < len(tables):
        raise ConfigError("tables must have different names")
    _check_fit(tables, capacities, own_bytes)
    replicated = _replicated(tables, capacities)
    if cuts is None:
        return _placed(tables, capacities, replicated, None)
    try:
        return _placed(tables, capacities, replicated - cuts.keys(), cuts)
    except ConfigError:  # pieces that may not be cut need more room
        return _placed(tables, capacities, frozenset(), cuts)


def _placed(
    tables: Sequence[TableLoad], capacities: Sequence[int], replicated: frozenset[str], cuts: Cuts | None
) -> Placement:
    copies = sum(table.num_bytes for table in tables if table.name in replicated)
    rest = [table for table in tables if table.name not in replicated]
    shards = _packed(rest, [capacity - copies for capacity in capacities], cuts)
    return Placement(
        tuple(tables),
        tuple(capacities),
        tuple(table.name for table in tables if table.name in replicated),
        tuple(sorted(shards)),
    )


def _check_fit(tables: Sequence[TableLoad], capacities: Sequence[int], own_bytes: int) -> None:
    needed = sum(table.num_bytes for table in tables)
    held = sum(max(0, capacity) for capacity in capacities)
    widest = max((table.row_bytes for table in tables), default=0)
    if needed <= held and max(capacities) >= widest:
        return
    average = held / len(capacities)
    more = f"{math.ceil(needed / average)} workers like these" if average > widest else "workers with more memory"
    raise ConfigError(
        f"tables of {bytes_text(needed)} do not fit on {len(capacities)} workers that have {bytes_text(held)} for "
        f"them; use {more}, or give each {bytes_text_above(needed / len(capacities) + widest + own_bytes)}"
        + (f" ({bytes_text(own_bytes)} of it for itself)" if own_bytes else "")
    )


def _replicated(tables: Sequence[TableLoad], capacities: Sequence[int]) -> frozenset[str]:
    """The tables worth a copy at every worker: those that save the most traffic for their bytes, while all fits."""
    if len(capacities) == 1:
        return frozenset(table.name for table in tables)
    left = sum(table.num_bytes for table in tables)
    all_room, num_workers = sum(capacities), len(capacities)
    room = min(max(_FULL_WITH_COPIES * all_room, left + _FEW_COPIES * all_room), (1 - _FEW_COPIES) * all_room)
    chosen: set[str] = set()
    copies = 0

    def saved(table: TableLoad) -> float:
        return (table.bags * table.dim + table.ids) / table.num_bytes

    for table in sorted(tables, key=lambda t: (-saved(t), t.name)):
        copies_then = copies + table.num_bytes
        left_then = left - table.num_bytes
        if copies_then > _FULL_WITH_COPIES * min(capacities) or left_then + num_workers * copies_then > room:
            continue
        chosen.add(table.name)
        copies, left = copies_then, left_then
    return frozenset(chosen)


@dataclass(frozen=True)
class _Piece:
    """A range of rows to be packed, and its sizes."""

    table: TableLoad
    first_row: int
    end_row: int

    @property
    def num_bytes(self) -> int:
        return (self.end_row - self.first_row) * self.table.row_bytes

    @cached_property
    def ids(self) -> float:
        return self.table.ids * self.table.share(self.first_row, self.end_row)

    def cut_at(self, row: int) -> tuple[_Piece, _Piece]:
        return _Piece(self.table, self.first_row, row), _Piece(self.table, row, self.end_row)


def _packed(tables: Sequence[TableLoad], capacities: Sequence[int], cuts: Cuts | None) -> list[Shard]:
    """Shards of all rows. Largest pieces first, to the worker that is then least full; one that fits nowhere is cut."""
    if not tables:
        return []
    even_fill = sum(table.num_bytes for table in tables) / sum(capacities)
    # Without lookups, and with the smallest of numbers of them, which would become 0, all are as even.
    even_ids = math.fsum(table.ids for table in tables) / len(capacities) or 1.0  # the same in any order
    average = sum(capacities) / len(capacities)

    def size(piece: _Piece) -> float:
        return max(piece.num_bytes / average / even_fill, piece.ids / even_ids)

    def pieces(table: TableLoad) -> list[_Piece]:
        if cuts is None:
            return _pieces(table, len(capacities), max(capacities), even_fill * average, even_ids)
        bounds = [*cuts.get(table.name, [0]), table.num_rows]
        return [_Piece(table, first, end) for first, end in pairwise(bounds)]

    waiting = [(-size(piece), piece.table.name, piece.first_row, piece) for table in tables for piece in pieces(table)]
    heapq.heapify(waiting)
    held, asked = [0] * len(capacities), [0.0] * len(capacities)
    shards: list[Shard] = []
    while waiting:
        *_, piece = heapq.heappop(waiting)
        fitting = [w for w, capacity in enumerate(capacities) if held[w] + piece.num_bytes <= capacity]
        if not fitting:
            room, worker = max((capacity - held[w], -w) for w, capacity in enumerate(capacities))
            num_rows = max(0, room) // piece.table.row_bytes
            if cuts is not None:
                raise ConfigError(
                    f'"{piece.table.name}" does not fit: rows {piece.first_row} to {piece.end_row} must stay together, '
                    f"as they were before, and take {bytes_text(piece.num_bytes)}, but no worker has more than "
                    f"{bytes_text(max(0, room))} left"
                )
            if num_rows == 0:
                raise ConfigError(
                    f'rows of "{piece.table.name}" do not fit: {len(capacities)} workers are full to the last row; use '
                    "one more, or a little more memory for each"
                )
            parts = piece.cut_at(piece.first_row + num_rows)
            for part in parts:
                heapq.heappush(waiting, (-size(part), part.table.name, part.first_row, part))
            continue
        worker = min(
            fitting,
            key=lambda w: (
                max((held[w] + piece.num_bytes) / capacities[w] / even_fill, (asked[w] + piece.ids) / even_ids),
                w,
            ),
        )
        held[worker] += piece.num_bytes
        asked[worker] += piece.ids
        shards.append(Shard(piece.table.name, piece.first_row, piece.end_row, worker))
    return _joined(shards) if cuts is None else shards


def _pieces(table: TableLoad, num_workers: int, capacity: int, even_bytes: float, even_ids: float) -> list[_Piece]:
    """The table in ranges of rows that one worker can hold, none of them large or too busy for one worker."""
    is_large = table.num_bytes > min(capacity, _LARGE_TABLE * even_bytes)
    largest = max(table.row_bytes, min(capacity, int(_PIECE * even_bytes)) if is_large else capacity)
    by_bytes = math.ceil(table.num_bytes / largest)
    if by_bytes > num_workers / 2 and is_large:
        by_bytes = math.ceil(by_bytes / num_workers) * num_workers
    by_ids = math.ceil(table.ids / even_ids) if table.ids > _BUSY_SHARE * even_ids else 1
    num_pieces = min(max(by_bytes, by_ids), table.num_rows)
    if num_pieces == 1:
        return [_Piece(table, 0, table.num_rows)]
    most_rows = largest // table.row_bytes
    found, first = [], 0
    while first < table.num_rows:
        before = table.share(0, first)
        end = table.row_at(before + 1 / num_pieces) if by_ids > 1 else first + -(-table.num_rows // num_pieces)
        end = min(max(end, first + 1), first + most_rows, table.num_rows)
        found.append(_Piece(table, first, end))
        first = end
    return found


def _joined(shards: list[Shard]) -> list[Shard]:
    """Neighbouring ranges of a table at one worker made one."""
    joined: list[Shard] = []
    for shard in sorted(shards):
        last = joined[-1] if joined else None
        if last and (last.table, last.worker, last.end_row) == (shard.table, shard.worker, shard.first_row):
            joined[-1] = Shard(last.table, last.first_row, shard.end_row, last.worker)
        else:
            joined.append(shard)
    return joined
