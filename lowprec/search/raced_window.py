"""A window on which plans are raced: its slices in random order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowprec.evaluation.profile.profile import Column
from lowprec.evaluation.race.race_sums import RaceSums, RaceTask
from lowprec.evaluation.workers.worker import Workers
from lowprec.plan import Forms, Plan
from lowprec.traffic import TrafficWindow

__all__ = ["RacedWindow", "Slice", "slices_of"]

# Examples of a slice, about.
SLICE_EXAMPLES = 1024
# Slices that a worker does at once.
SLICES_PER_TASK = 4

# A batch, which part of it, and of how many.
Slice = tuple[int, int, int]


@dataclass(frozen=True)
class RacedWindow:
    """A window with its slices.

    order: the one random order in which slices are raced: plans of different waves meet on the same slices. name: of
    the window, for what workers keep of it. columns: of the profile, the control variate. forms: of layers.
    """

    window: TrafficWindow
    workers: Workers
    slices: tuple[Slice, ...]
    order: tuple[int, ...]
    name: str
    columns: tuple[Column, ...]
    forms: Forms

    @classmethod
    def of(
        cls,
        window: TrafficWindow,
        workers: Workers,
        *,
        seed: int,
        name: str,
        columns: tuple[Column, ...],
        forms: Forms,
    ) -> RacedWindow:
        """The slices of a window, and their order for a seed."""
        slices = slices_of(window)
        order = np.random.default_rng(seed).permutation(len(slices))
        return cls(window, workers, tuple(slices), tuple(map(int, order)), name, columns, forms)

    def lap(self, plans: Sequence[Plan], slices: Sequence[int]) -> RaceSums:
        """The sums of plans over slices, counted in the order of the window."""
        total: RaceSums | None = None
        for chunk in self.workers.run(self.window, self._tasks(plans, [self.slices[k] for k in sorted(slices)])):
            total = chunk.sums if total is None else total + chunk.sums
        assert total is not None, "a lap has at least one slice"
        return total

    def sample(self, num_examples: int) -> tuple[int, ...]:
        """The first slices of the order with about so many examples."""
        return self.order[: -(-num_examples // SLICE_EXAMPLES)]

    def _tasks(self, plans: Sequence[Plan], slices: Sequence[Slice]) -> list[RaceTask]:
        """Plans on slices, in their order, a few to a task."""
        tasks = []
        for first in range(0, len(slices), SLICES_PER_TASK):
            parts: dict[tuple[int, int], list[int]] = {}
            for batch, part, num_parts in slices[first : first + SLICES_PER_TASK]:
                parts.setdefault((batch, num_parts), []).append(part)
            tasks.append(
                RaceTask(
                    plans=tuple(plans),
                    columns=self.columns,
                    batches=tuple(batch for batch, _ in parts),
                    parts=tuple(tuple(found) for found in parts.values()),
                    num_parts=tuple(num_parts for _, num_parts in parts),
                    keep=self.name,
                    forms=self.forms,
                )
            )
        return tasks


def slices_of(window: TrafficWindow) -> list[Slice]:
    """Every slice of a window, of about equal sizes, also in the end."""
    found: list[Slice] = []
    for batch in range(window.num_batches):
        num_rows = min(window.batch_size, window.num_rows - batch * window.batch_size)
        num_parts = max(1, num_rows // SLICE_EXAMPLES)
        found += [(batch, part, num_parts) for part in range(num_parts)]
    return found
