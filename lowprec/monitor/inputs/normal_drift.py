"""How far the inputs of a feature normally move between the windows of a deployment.

Where users come and go, every window is far from the certified one, and that says nothing new. So each window keeps a
sketch of the inputs of every feature in its row, and a window is compared with those before it: its *step* is the
distance to the nearest earlier window, the certified one included. The nearest one, because traffic has seasons: a
Sunday is compared with earlier Sundays. A step is normal unless it exceeds the largest normal step so far by the least
distance that matters.

A window in which a feature was named is no measure for the next ones, but a change that stays is the new normal at
last: such a window is compared with again `NAMED_FOR` windows later. So a change that stays is named in as many.

Until `MIN_STEPS` steps between windows are known, a feature is named by its distance from the certified window alone.
A change between certification and launch is seen then, at the price of warnings in the first windows of a deployment
whose users come and go. (Without these warnings, such a change would count as normal for good.)

A sketch is 64 random projections of the roots of bucket shares, whose differences have the Hellinger distance. All of
it follows from rows of results, so windows are judged the same whenever and by whichever process.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lowprec.evaluation.stats.second_moment import mixed
from lowprec.monitor.inputs.counts import Inputs

__all__ = ["MIN_STEPS", "NAMED_FOR", "History", "InputSketch", "Step", "sketches_of"]

# Projections: the distance of two windows is known to within 9 percent of itself.
DIMS = 64
# Steps between windows that say what is normal; windows in which a change that stays is named; windows looked back at
# (more than a week of hours, for the seasons of a week).
MIN_STEPS, NAMED_FOR, MAX_EARLIER = 3, 5, 200


@dataclass(frozen=True)
class InputSketch:
    """Projections of the roots of a feature's bucket shares in a window, float16[DIMS].

    num_counts: lookups, or rows of a dense feature. num_used: buckets with a count.
    """

    code: NDArray[np.float16]
    num_counts: int
    num_used: int

    @classmethod
    def of(cls, counts: NDArray[np.int64]) -> Self:
        """The sketch of counts, int64[buckets]."""
        total = int(counts.sum())
        used = np.flatnonzero(counts)
        code = _signs(len(counts))[used].T @ np.sqrt(counts[used] / max(total, 1))
        return cls(code.astype(np.float16), total, len(used))

    def distance(self, other: InputSketch) -> float:
        """The Hellinger distance of two windows (0 to 1); NaN where one has no count."""
        return float(_distances([self, other])[0, 1])

    def to_list(self) -> list[Any]:
        """For a row of results."""
        return [self.num_counts, self.num_used, base64.b64encode(self.code.astype("<f2").tobytes()).decode()]

    @classmethod
    def from_list(cls, flat: Sequence[Any]) -> Self:
        """The inverse of `to_list`."""
        return cls(np.frombuffer(base64.b64decode(flat[2]), "<f2").astype(np.float16), int(flat[0]), int(flat[1]))


@dataclass(frozen=True)
class Step:
    """How far a feature moved to the nearest earlier window, and the largest normal step, None while it is unknown."""

    distance: float
    normal: float | None

    def is_normal(self, min_distance: float) -> bool | None:
        """Whether it is not above the normal ones by so much; None while nothing is known of them."""
        return None if self.normal is None else not self.distance >= self.normal + min_distance


class History:
    """The inputs of the windows before one, as their rows of results have them, and of the certified window."""

    def __init__(self, rows: Sequence[str | None], certified: Inputs) -> None:
        """rows: `inputs_json` of the earlier windows of the deployment in time order, None for one without inputs."""
        self._windows = [_Window.parse(row) if row else _NOTHING for row in rows[-MAX_EARLIER:]]
        self._certified = sketches_of(certified)

    def step(self, feature: str, now: InputSketch) -> Step:
        """The step of a feature to a window with this sketch.

        Where the windows before it are left out, because they are named or have no rows, normal steps are those over as
        many windows: users who come and go are further away after two windows than after one.
        """
        earlier = [(k, w) for k, w in enumerate(self._windows) if w.has(feature)]
        places = np.array([k for k, _ in earlier], np.int64)
        named = np.array([feature in w.named for _, w in earlier], np.bool_)
        sketches = [self._certified[feature], *(w.sketches[feature] for _, w in earlier), now]
        distances = _distances(sketches)
        # Which windows each one is compared with, the last row for the new one; the certified window always.
        at = np.array([*places, len(self._windows)])
        is_near = (places < at[:, None]) & (~named | (places <= at[:, None] - NAMED_FOR))
        if not is_near[-1].any():
            return Step(float(distances[-1, 0]), None)
        lag = len(self._windows) - places[is_near[-1]].max()
        is_near &= places <= at[:, None] - lag
        steps = np.where(is_near, distances[1:, 1:-1], np.inf).min(axis=1)
        has_step = is_near[:-1].any(axis=1) & ~named
        steps = np.fmin(steps, distances[1:, 0])
        normal = steps[:-1][has_step]
        return Step(float(steps[-1]), float(normal.max()) if len(normal) >= MIN_STEPS else None)


@dataclass(frozen=True)
class _Window:
    """What the row of a window says of its inputs. named: features that moved beside earlier windows."""

    sketches: Mapping[str, InputSketch]
    named: frozenset[str]

    @classmethod
    @lru_cache(maxsize=2 * MAX_EARLIER)
    def parse(cls, row: str) -> _Window:
        document = json.loads(row)
        return cls(
            # Rows of earlier versions have none.
            {name: InputSketch.from_list(flat) for name, flat in document.get("sketches", {}).items()},
            frozenset(f["feature"] for f in document["features"] if f["is_warning"] and "normal_step" in f),
        )

    def has(self, feature: str) -> bool:
        """Whether anything was counted of a feature."""
        return feature in self.sketches and self.sketches[feature].num_counts > 0


_NOTHING = _Window({}, frozenset())


def sketches_of(inputs: Inputs) -> dict[str, InputSketch]:
    """The sketch of every feature of a window."""
    found = {name: InputSketch.of(inputs.coarse[name].sum(axis=0)) for name in inputs.sparse}
    return found | {name: InputSketch.of(inputs.histograms[name].sum(axis=0)) for name in inputs.dense}


def _distances(sketches: Sequence[InputSketch]) -> NDArray[np.float64]:
    """The Hellinger distances of windows from each other, less what samples of these sizes differ by anyway.

    That is used / 8 (1 / n + 1 / m) of the square, to first order. NaN where one of two has no count.
    """
    codes = np.stack([sketch.code for sketch in sketches]).astype(np.float64)
    counts, used = (np.array([getattr(s, name) for s in sketches]) for name in ("num_counts", "num_used"))
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1 / counts
        squared = ((codes[:, None] - codes[None]) ** 2).sum(axis=2) / (2 * DIMS)
        expected = np.maximum(used[:, None], used) * (inverse[:, None] + inverse) / 8
        found: NDArray[np.float64] = np.sqrt(np.clip(squared - expected, 0, 1))
    found[(counts == 0)[:, None] | (counts == 0)] = np.nan
    return found


@cache
def _signs(num_buckets: int) -> NDArray[np.int8]:
    """A random sign for each bucket and projection: int8[num_buckets, DIMS], the same on every machine."""
    words = mixed(np.arange(num_buckets, dtype=np.uint64))
    bits = (words[:, None] >> np.arange(DIMS, dtype=np.uint64)) & np.uint64(1)
    return (2 * bits.astype(np.int8) - 1).astype(np.int8)
