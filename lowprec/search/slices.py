"""Slices: the stretches of batches on which plans are raced."""

from __future__ import annotations

from collections.abc import Sequence

from lowprec.evaluation.profile.profile import Column
from lowprec.evaluation.race.race_sums import RaceTask
from lowprec.plan import Forms, Plan
from lowprec.traffic import TrafficWindow

__all__ = ["SLICE_EXAMPLES", "Slice", "race_tasks", "slices_of"]

# Examples of a slice, about.
SLICE_EXAMPLES = 1024
# Slices that a worker does at once.
SLICES_PER_TASK = 4

# A batch, which part of it, and of how many.
Slice = tuple[int, int, int]


def slices_of(window: TrafficWindow) -> list[Slice]:
    """Every slice of a window, of about equal sizes, also in the end."""
    found: list[Slice] = []
    for batch in range(window.num_batches):
        num_rows = min(window.batch_size, window.num_rows - batch * window.batch_size)
        num_parts = max(1, num_rows // SLICE_EXAMPLES)
        found += [(batch, part, num_parts) for part in range(num_parts)]
    return found


def race_tasks(
    plans: Sequence[Plan],
    columns: tuple[Column, ...],
    slices: Sequence[Slice],
    *,
    keep: str,
    forms: Forms | None = None,
) -> list[RaceTask]:
    """Plans on slices, in their order, a few to a task; `keep` names the window, `forms` are those of layers."""
    tasks = []
    for first in range(0, len(slices), SLICES_PER_TASK):
        parts: dict[tuple[int, int], list[int]] = {}
        for batch, part, num_parts in slices[first : first + SLICES_PER_TASK]:
            parts.setdefault((batch, num_parts), []).append(part)
        tasks.append(
            RaceTask(
                plans=tuple(plans),
                columns=columns,
                batches=tuple(batch for batch, _ in parts),
                parts=tuple(tuple(found) for found in parts.values()),
                num_parts=tuple(num_parts for _, num_parts in parts),
                keep=keep,
                forms=forms or {},
            )
        )
    return tasks
