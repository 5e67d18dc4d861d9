"""Shares of units in a gap, and their growth since the plan was certified."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowprec.monitor.observe import WindowObservation

__all__ = ["UnitShare", "ranked", "unit_shares"]


@dataclass(frozen=True)
class UnitShare:
    """A unit's share of a window's gap, in percent of the reference loss.

    kl_pct: of the label-free gap, which the shares of all units add up to (to second order). first_pct: what labels say
    beside it, with its standard error. growth_pct: by how much kl_pct grew since the certified window.
    """

    unit: str
    precision: str
    kl_pct: float
    kl_error_pct: float
    first_pct: float
    first_error_pct: float
    growth_pct: float = math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; None for what is not known."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any]) -> UnitShare:
        """The inverse of `to_dict`."""
        known: dict[str, Any] = {k: math.nan if v is None else v for k, v in flat.items()}
        return cls(**known)


def unit_shares(observation: WindowObservation, precisions: Mapping[str, str]) -> list[UnitShare]:
    """The share of every low unit; `precisions` are theirs, in the order in which the observation has them."""
    sums = observation.units
    loss, entropy = float(sums.loss[0]), float(sums.entropy[0])
    found = []
    for k, (unit, precision) in enumerate(precisions.items()):
        kl, kl_error = (
            float(100 * v / entropy) if entropy else math.nan for v in (sums.second[k], sums.second_squares[k] ** 0.5)
        )
        first, error = (float(100 * v / loss) if loss else 0.0 for v in (sums.first[k], sums.first_squares[k] ** 0.5))
        found.append(UnitShare(unit, precision, kl, kl_error, first, error))
    return found


def ranked(now: Sequence[UnitShare], certified: Sequence[UnitShare]) -> list[UnitShare]:
    """The shares of a window, those that grew most first.

    By the label-free gap alone: where traffic moves, the reference is wrong in new ways, and the first-order share of
    a unit says by chance whether its errors go along with that or against it. A unit that began to hurt would be named
    last where they help (`make bench NAME=attribution`).
    """
    before = {share.unit: share.kl_pct for share in certified}
    grown = [replace(share, growth_pct=share.kl_pct - before.get(share.unit, 0.0)) for share in now]
    return sorted(grown, key=lambda share: -share.growth_pct if math.isfinite(share.growth_pct) else math.inf)
