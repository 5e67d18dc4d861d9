"""Which worker does which piece of work next, and what follows when one is lost. It knows no Ray, no clock, no work.

Work is numbered in the order in which its results are wanted. What a lost worker had is done again elsewhere; only the
piece that it was at is held against it, and that piece then goes alone to a worker that it has not been with.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Dispatch", "Failure"]


@dataclass(frozen=True)
class Failure:
    """One try at a piece of work that came to nothing: at which worker, and how."""

    worker: int
    how: str


class Dispatch:
    """Pieces of work 0 to n - 1 among workers that come and go."""

    def __init__(self, num_pieces: int, num_workers: int, *, in_flight: int, ahead: int) -> None:
        """A worker has `in_flight` pieces at once; pieces further than `ahead` from the first unfinished one wait."""
        self._waiting = list(range(num_pieces))
        self._at: list[list[int]] = [[] for _ in range(num_workers)]
        self._unfinished = [True] * num_pieces
        self._first_unfinished = 0
        self._in_flight, self._ahead = in_flight, ahead
        self.failures: dict[int, list[Failure]] = {}

    def at(self, worker: int) -> tuple[int, ...]:
        """The pieces that a worker has; it is at the first of them."""
        return tuple(self._at[worker])

    def next(self, up: Sequence[int]) -> tuple[int, int] | None:
        """The next piece and the worker, of those that are `up`, to give it to; None while there is nothing to give."""
        reserved: set[int] = set()
        for piece in self._waiting:
            if piece >= self._first_unfinished + self._ahead:
                return None
            free = [w for w in up if w not in reserved]
            if piece in self.failures and free:
                worker = self._for_suspect(piece, free)
                if self._at[worker]:
                    reserved.add(worker)  # nothing else until it is free for this one
                    continue
            else:
                free = [w for w in free if len(self._at[w]) < self._in_flight and not self._has_suspect(w)]
                if not free:
                    return None
                worker = min(free, key=lambda w: len(self._at[w]))
            self._waiting.remove(piece)
            self._at[worker].append(piece)
            return piece, worker
        return None

    def finished(self, piece: int) -> None:
        """A result is there."""
        self._at[self._holder(piece)].remove(piece)
        self._unfinished[piece] = False
        while self._first_unfinished < len(self._unfinished) and not self._unfinished[self._first_unfinished]:
            self._first_unfinished += 1

    def failed(self, piece: int, how: str) -> None:
        """A try came to nothing, but the worker goes on."""
        worker = self._holder(piece)
        self._at[worker].remove(piece)
        self._blame(piece, Failure(worker, how))
        insort(self._waiting, piece)

    def lost(self, worker: int, how: str) -> int | None:
        """A worker is gone with all that it had; returns the piece that it was at, which this counts as a try of."""
        had, self._at[worker] = self._at[worker], []
        for piece in had:
            insort(self._waiting, piece)
        if had:
            self._blame(had[0], Failure(worker, how))
        return had[0] if had else None

    def _holder(self, piece: int) -> int:
        return next(worker for worker, pieces in enumerate(self._at) if piece in pieces)

    def _blame(self, piece: int, failure: Failure) -> None:
        self.failures.setdefault(piece, []).append(failure)

    def _has_suspect(self, worker: int) -> bool:
        return any(piece in self.failures for piece in self._at[worker])

    def _for_suspect(self, piece: int, free: Sequence[int]) -> int:
        """A worker that the piece was not with, where there is one; of those, the one that is free first."""
        seen = {failure.worker for failure in self.failures[piece]}
        return min(free, key=lambda w: (w in seen, len(self._at[w])))
