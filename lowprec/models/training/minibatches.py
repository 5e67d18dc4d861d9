"""Mini-batches for training: traffic shuffled row by row within bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lowprec.traffic.batch import Bags, Batch

__all__ = ["labelled", "shuffled_minibatches", "take_rows"]

# Traffic held and mixed at once: 280,000 rows of 26 ids and 13 dense values. With the copies
# made meanwhile, memory grew by 500 MB.
SHUFFLED_BYTES = 128 << 20


def shuffled_minibatches(batches: Iterable[Batch], size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Batches of `size` labelled rows, in random order within chunks of `SHUFFLED_BYTES`; a chunk's last is smaller.

    Chunks follow each other in the order of `batches`: reading in order is many times cheaper than random access, and
    traffic that does not fit a chunk ends with the latest rows.
    """
    chunk: list[Batch] = []
    chunk_bytes = 0
    for batch in batches:
        chunk.append(labelled(batch))
        chunk_bytes += _size_bytes(chunk[-1])
        if chunk_bytes >= SHUFFLED_BYTES:
            yield from _minibatches(chunk, size, rng)
            chunk, chunk_bytes = [], 0
    yield from _minibatches(chunk, size, rng)


def labelled(batch: Batch) -> Batch:
    """The rows of `batch` whose label is known."""
    known = np.flatnonzero(~np.isnan(batch.labels))
    return batch if len(known) == batch.num_rows else take_rows(batch, known)


def take_rows(batch: Batch, rows: NDArray[np.int64]) -> Batch:
    """The given rows of `batch`, in the given order; bad rows and counts stay behind."""
    return Batch(
        index=batch.index,
        labels=batch.labels[rows],
        dense=batch.dense[rows],
        sparse={name: _take_bags(bags, rows) for name, bags in batch.sparse.items()},
        times=batch.times[rows],
        weights=None if batch.weights is None else batch.weights[rows],
        groups=None if batch.groups is None else batch.groups[rows],
    )


def _minibatches(chunk: Sequence[Batch], size: int, rng: np.random.Generator) -> Iterator[Batch]:
    chunk = [batch for batch in chunk if batch.num_rows]
    if not chunk:
        return
    mixed = _concatenated(chunk)
    mixed = take_rows(mixed, rng.permutation(mixed.num_rows))
    for start in range(0, mixed.num_rows, size):
        yield _slice(mixed, start, min(start + size, mixed.num_rows))


def _size_bytes(batch: Batch) -> int:
    bags = sum(b.values.nbytes + b.offsets.nbytes for b in batch.sparse.values())
    return batch.dense.nbytes + bags


def _take_bags(bags: Bags, rows: NDArray[np.int64]) -> Bags:
    lengths = np.diff(bags.offsets)[rows]
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    ids = np.arange(offsets[-1]) + np.repeat(bags.offsets[rows] - offsets[:-1], lengths)
    return Bags(bags.values[ids], offsets, None if bags.weights is None else bags.weights[ids])


def _slice(batch: Batch, start: int, stop: int) -> Batch:
    sparse = {}
    for name, bags in batch.sparse.items():
        first, last = bags.offsets[start], bags.offsets[stop]
        weights = None if bags.weights is None else bags.weights[first:last]
        sparse[name] = Bags(bags.values[first:last], bags.offsets[start : stop + 1] - first, weights)
    return Batch(
        index=batch.index,
        labels=batch.labels[start:stop],
        dense=batch.dense[start:stop],
        sparse=sparse,
        times=batch.times[start:stop],
        weights=None if batch.weights is None else batch.weights[start:stop],
        groups=None if batch.groups is None else batch.groups[start:stop],
    )


def _concatenated(batches: Sequence[Batch]) -> Batch:
    first = batches[0]
    return Batch(
        index=first.index,
        labels=np.concatenate([b.labels for b in batches]),
        dense=np.concatenate([b.dense for b in batches]),
        sparse={name: _joined([b.sparse[name] for b in batches]) for name in first.sparse},
        times=np.concatenate([b.times for b in batches]),
        weights=None
        if first.weights is None
        else np.concatenate([b.weights for b in batches if b.weights is not None]),
    )


def _joined(parts: Sequence[Bags]) -> Bags:
    starts = np.cumsum([0, *(len(part.values) for part in parts)])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts, strict=False)]
    weights = [part.weights for part in parts if part.weights is not None]
    return Bags(
        values=np.concatenate([part.values for part in parts]),
        offsets=np.concatenate([*offsets, starts[-1:]]),
        weights=np.concatenate(weights) if weights else None,
    )
