"""A profile measured over a window: work split by time block, parts added in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lowprec.evaluation.evaluate import NUM_BLOCKS, pieces_of
from lowprec.evaluation.profile.profile import Column, Profile, ProfilePart, ProfileTask
from lowprec.evaluation.rows import RowAccount, RowCounter, TableUse
from lowprec.evaluation.workers.worker import Workers
from lowprec.plan import Forms
from lowprec.traffic import BadRow, TrafficWindow

__all__ = ["NUM_BLOCKS", "MeasuredProfile", "measure_profile"]


@dataclass(frozen=True)
class MeasuredProfile:
    """A profile, how its window uses the tables (by unit name), and what happened to the rows on the way.

    forms: of the layers that were profiled.
    """

    profile: Profile
    use: Mapping[str, TableUse]
    rows: RowAccount
    bad_rows: tuple[BadRow, ...] = ()
    is_complete: bool = True
    forms: Forms = field(default_factory=dict)


def measure_profile(
    workers: Workers,
    window: TrafficWindow,
    columns: tuple[Column, ...],
    *,
    forms: Forms | None = None,
    by_group: bool,
    batches_per_task: int,
    max_bad_fraction: float = 0.0,
    label_free: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> MeasuredProfile:
    """Profile `columns` over the window; `by_group` says that traffic has a group key.

    forms: of layers. label_free: by what the reference predicts, instead of by labels.

    Block b holds the batches k with floor(k * NUM_BLOCKS / num_batches) = b, so blocks are equal stretches of the
    window's rows. The result is the same to the bit for any number of workers.
    """
    tasks, block_of = [], []
    for block in range(NUM_BLOCKS):
        members = [k for k in range(window.num_batches) if k * NUM_BLOCKS // window.num_batches == block]
        for piece in pieces_of(window, members, batches_per_task):
            tasks.append(ProfileTask(columns, NUM_BLOCKS, piece, label_free=label_free, forms=forms or {}))
            block_of.append(block)
    counter = RowCounter(window, max_bad_fraction)
    parts = [ProfilePart.zero(len(columns), NUM_BLOCKS, by_group=by_group)] * NUM_BLOCKS
    is_complete = True
    for block, task, chunk in zip(block_of, tasks, workers.run(window, tasks), strict=True):
        parts[block] = parts[block] + chunk.sums
        counter.add(chunk)
        if on_progress:
            on_progress(len(task.batches))
        if counter.is_hopeless:
            is_complete = False
            break
    counter.check_outputs()
    evidence = parts[0].evidence
    for part in parts[1:]:
        evidence = evidence + part.evidence
    profile = Profile(columns, tuple(part.block for part in parts), evidence)
    num_unlabelled = sum(part.block.num_unlabelled for part in parts)
    rows = counter.account(num_unlabelled)
    return MeasuredProfile(profile, counter.use(), rows, tuple(counter.bad_rows), is_complete, forms or {})
