"""Slices: the stretches of batches on which plans are raced."""

from __future__ import annotations

from lowprec.traffic import TrafficWindow

__all__ = ["SLICE_EXAMPLES", "slices_of"]

# Examples of a slice, about.
SLICE_EXAMPLES = 1024


def slices_of(window: TrafficWindow) -> list[tuple[int, int, int]]:
    """Every slice of a window: its batch, which part of it, and of how many; of about equal sizes, also in the end."""
    found = []
    for batch in range(window.num_batches):
        num_rows = min(window.batch_size, window.num_rows - batch * window.batch_size)
        num_parts = max(1, num_rows // SLICE_EXAMPLES)
        found += [(batch, part, num_parts) for part in range(num_parts)]
    return found
