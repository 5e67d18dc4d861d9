"""Requirements of a placement: worker memory, network bytes, lookup time, and the tightest limit.

Of what is sent, arrays are counted and not what frames them, which is next to nothing for a few thousand examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowprec.shards.planner import Placement, Shard

__all__ = ["MAX_KEPT_BYTES", "Limit", "NetworkLoad", "WorkerNeeds", "kept_bytes", "limits_of", "network_load"]

_MB = 10**6

# What a worker keeps of batches that it will come back to, at most, and of its memory where that is limited.
MAX_KEPT_BYTES = 256 << 20
_KEPT_SHARE = 1 / 50

# A row number and a length of a bag, as they are sent; a value, a score.
ID_BYTES, LENGTH_BYTES, VALUE_BYTES = 4, 1, 4


@dataclass(frozen=True)
class WorkerNeeds:
    """Memory that a worker needs beside its tables, in bytes.

    process: Python, PyTorch and Ray. dense: the dense part and its gradients. batch: the inputs and pooled vectors of
    the batches at work. caches: what it keeps of batches, a share of its memory, and of small tables.
    """

    process: int
    dense: int
    batch: int
    caches: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.process + self.dense + self.batch + self.caches

    @classmethod
    def of(
        cls,
        memory: int,
        *,
        dense_bytes: int,
        hot_bytes: int,
        batch_size: int,
        ids: float,
        values: float,
        precisions: int,
    ) -> WorkerNeeds:
        """Of a worker with `memory` bytes.

        hot_bytes: what is kept of small tables. ids, values: ids and pooled values of one example, over all tables.
        precisions: how many pooled vectors of a call are held at once.
        """
        of_example = 8 * (ids + 1) + VALUE_BYTES * values * (precisions + 2)
        return cls(
            process=320 * _MB,
            dense=4 * dense_bytes,
            batch=int(2 * batch_size * of_example),
            caches=kept_bytes(memory) + hot_bytes,
        )


def kept_bytes(memory: int | None) -> int:
    """What a worker with so many bytes keeps of batches; None where nobody said."""
    return MAX_KEPT_BYTES if memory is None else min(MAX_KEPT_BYTES, int(memory * _KEPT_SHARE))


@dataclass(frozen=True)
class NetworkLoad:
    """Bytes that cross between workers for one example, by what is done with it; workers evaluate equal shares.

    by_worker: bytes in and out of each worker while all evaluate one example each, for the exact evaluation.
    """

    profile_bytes: float
    exact_bytes: float
    by_worker: tuple[float, ...]


def network_load(placement: Placement, *, profile_precisions: int, exact_precisions: int) -> NetworkLoad:
    """What a profile of some low precisions sends, and what plans send that use some precisions (fp32 included).

    A profile asks for fp32 vectors, then sends their gradients and gets a score for each precision; both times it says
    which rows. Exact evaluation gets a vector for each precision that some plan uses. Only bags with ids in a shard
    take part in it.
    """
    others = (placement.num_workers - 1) / placement.num_workers if placement.num_workers else 0.0
    profile, exact = 0.0, 0.0
    by_worker = [0.0] * placement.num_workers
    for shard in placement.shards:
        ids, bags = _asked(placement, shard)
        vector = bags * VALUE_BYTES * placement.table[shard.table].dim
        which = ids * ID_BYTES + bags * LENGTH_BYTES
        profile += others * (2 * which + 2 * vector + bags * VALUE_BYTES * profile_precisions)
        of_exact = others * (which + vector * exact_precisions)
        exact += of_exact
        # All workers but the shard's own ask it; each of them gets an equal part of what it answers.
        by_worker[shard.worker] += placement.num_workers * of_exact
        for worker in range(placement.num_workers):
            if worker != shard.worker:
                by_worker[worker] += placement.num_workers * of_exact / (placement.num_workers - 1)
    return NetworkLoad(profile, exact, tuple(by_worker))


def _asked(placement: Placement, shard: Shard) -> tuple[float, float]:
    """Ids and bags with at least one of them, of one example, in a shard; ids of a bag fall independently."""
    table = placement.table[shard.table]
    share = table.share(shard.first_row, shard.end_row)
    if table.bags == 0:
        return 0.0, 0.0
    length = table.ids / table.bags
    touched = 1 - (1 - share) ** length if length > 1 else length * share
    return table.ids * share, table.bags * touched


@dataclass(frozen=True)
class Limit:
    """How much of something is used, 1 being all of it, and what that means in words."""

    name: str
    used: float
    says: str


def limits_of(
    placement: Placement,
    needs: Sequence[WorkerNeeds],
    network: NetworkLoad,
    *,
    lookup_ns: Callable[[int], float] | None,
    network_bytes_per_s: float,
) -> tuple[Limit, ...]:
    """Memory, lookups and network, the most used first.

    lookup_ns: nanoseconds that a worker spends on lookups while all evaluate one example each, where that is known.
    Memory is compared with what workers have, lookups of the busiest worker with the average (who waits is of no use),
    sending with the time of lookups and sending.
    """
    memory = [
        (held + need.total) / (capacity + need.total)
        for held, capacity, need in zip(placement.held_bytes, placement.capacities, needs, strict=True)
    ]
    fullest = max(range(len(memory)), key=lambda w: memory[w])
    found = [Limit("memory", memory[fullest], f"worker {fullest} is {memory[fullest]:.0%} full")]
    busiest = max(range(placement.num_workers), key=lambda w: placement.lookups[w])
    average = sum(placement.lookups) / placement.num_workers
    if average > 0:
        over = placement.lookups[busiest] / average
        waiting = f", so the others wait up to {1 - 1 / over:.0%} of their time" if over > 1.01 else ""
        found.append(Limit("lookups", 1 - 1 / over, f"worker {busiest} looks up {over:.2f} times the average{waiting}"))
    if lookup_ns is not None and max(network.by_worker) > 0:
        slowest = max(range(placement.num_workers), key=lambda w: network.by_worker[w])
        sending = network.by_worker[slowest] / network_bytes_per_s * 1e9
        used = sending / (sending + lookup_ns(slowest))
        found.append(
            Limit(
                "network",
                used,
                f"worker {slowest} would send and receive for {used:.0%} of the time of its lookups and sending",
            )
        )
    return tuple(sorted(found, key=lambda limit: -limit.used))
