"""Which worker does which piece of work next, and what follows when one is lost. It knows no Ray, no clock, no work.

Work is numbered in the order in which its results are wanted. Neighbours in it lie side by side in files, which are
read from their beginning: so a worker has a stretch of it for itself, a long one at first and single pieces at the end,
when all are to end together. What a lost worker had is done again elsewhere; only the piece that it was at is held
against it, and that piece then goes alone to a worker that it has not been with.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable, Sequence
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
        self.ahead = ahead
        self.failures: dict[int, list[Failure]] = {}
        self._in_flight = in_flight
        self._at: list[list[int]] = [[] for _ in range(num_workers)]
        self._unfinished = [True] * num_pieces
        self._first_unfinished = 0
        # What is not at a worker: pieces from `_fresh` on, pieces that came back, and what is left of stretches.
        self._fresh = 0
        self._returned: list[int] = []
        self._stretches: list[deque[int]] = [deque() for _ in range(num_workers)]

    def at(self, worker: int) -> tuple[int, ...]:
        """The pieces that a worker has; it is at the first of them."""
        return tuple(self._at[worker])

    def next(self, up: Sequence[int]) -> tuple[int, int] | None:
        """The next piece and the worker, of those that are `up`, to give it to; None while there is nothing to give."""
        reserved: set[int] = set()
        for piece in [piece for piece in self._returned if piece in self.failures and self._is_near(piece)]:
            free = [w for w in up if w not in reserved]
            if not free:
                return None
            worker = self._for_suspect(piece, free)
            if not self._at[worker]:
                self._returned.remove(piece)
                return self._give(piece, worker)
            reserved.add(worker)  # nothing else until it is free for this one
        able = [w for w in up if w not in reserved and len(self._at[w]) < self._in_flight and not self._has_suspect(w)]
        for worker in sorted(able, key=lambda w: len(self._at[w])):
            chosen = self._next_of(worker)
            if chosen is not None:
                return self._give(chosen, worker)
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
        self._return([piece])

    def lost(self, worker: int, how: str) -> int | None:
        """A worker is gone with all that it had; returns the piece that it was at, which this counts as a try of."""
        had, self._at[worker] = self._at[worker], []
        self._return([*had, *self._stretches[worker]])
        self._stretches[worker].clear()
        if had:
            self._blame(had[0], Failure(worker, how))
        return had[0] if had else None

    def _give(self, piece: int, worker: int) -> tuple[int, int]:
        self._at[worker].append(piece)
        return piece, worker

    def _is_near(self, piece: int) -> bool:
        return piece < self._first_unfinished + self.ahead

    def _next_of(self, worker: int) -> int | None:
        """What came back, for which results wait; then the worker's stretch; where that is too far, another one's."""
        came_back = next((piece for piece in self._returned if piece not in self.failures), None)
        if came_back is not None and self._is_near(came_back):
            self._returned.remove(came_back)
            return came_back
        if not self._stretches[worker]:
            self._stretches[worker].extend(self._new_stretch())
        near = [s for s in self._stretches if s and self._is_near(s[0])]
        if self._stretches[worker] in near:
            return self._stretches[worker].popleft()
        return min(near, key=lambda s: s[0]).popleft() if near else None

    def _new_stretch(self) -> Sequence[int]:
        """What nobody had yet; where that is all gone, the second half of the longest stretch of another worker."""
        left, num_workers = len(self._unfinished) - self._fresh, len(self._at)
        if left:
            # Two stretches a worker lie within `ahead`, so that one may be twice as slow as the others.
            length = max(min(-(-left // (2 * num_workers)), self.ahead // (2 * num_workers)), 1)
            self._fresh += length
            return range(self._fresh - length, self._fresh)
        longest = max(self._stretches, key=len)
        return [longest.pop() for _ in range(-(-len(longest) // 2))][::-1]

    def _return(self, pieces: Iterable[int]) -> None:
        for piece in pieces:
            insort(self._returned, piece)

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
