"""Sensitivity of each choice: predicted from the profile, and exact on a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.evaluation.profile.profile import Profile
from lowprec.evaluation.race.race_sums import RaceSums
from lowprec.evaluation.stats.confidence import Interval
from lowprec.plan import Plan, Precision
from lowprec.search.space.space import SearchSpace
from lowprec.search.surrogate.shrinkage import FirstOrder

__all__ = ["Sensitivity", "Swap", "sensitivities", "single_swaps"]


@dataclass(frozen=True)
class Swap:
    """The reference with one decision's units at one precision."""

    decision: str
    precision: Precision
    plan: Plan


@dataclass(frozen=True)
class Sensitivity:
    """One decision at one precision, all else fp32; gaps in percent.

    gap, kl: predicted over `num_examples` of the window, `interval` that of the gap; `promised` is the gap with its
    label noise shrunk away. sampled_kl, predicted_kl: the KL gap on the `num_exact` examples of the sample, exact and
    predicted: what the linear prediction misses. It is told from KL, because labels would drown it.
    """

    decision: str
    precision: Precision
    bytes_saved: int
    num_examples: int
    num_exact: int
    gap_pct: float
    interval: Interval
    promised_pct: float
    kl_pct: float
    sampled_kl_pct: float
    predicted_kl_pct: float

    @property
    def linearization_error(self) -> float:
        """The exact KL gap on the sample over the predicted one, less 1; 0 where nothing changes."""
        if self.predicted_kl_pct <= 0:
            return 0.0
        return self.sampled_kl_pct / self.predicted_kl_pct - 1

    def to_row(self) -> dict[str, Any]:
        """The columns of the `sensitivities` table that come from here; an infinite end of an interval is None."""
        lower, upper = (v if np.isfinite(v) else None for v in (self.interval.lower, self.interval.upper))
        saved_mb = self.bytes_saved / 1e6
        return {
            "unit": self.decision,
            "precision": str(self.precision),
            "bytes_saved": self.bytes_saved,
            "gap_pct": self.gap_pct,
            "gap_lower_pct": lower,
            "gap_upper_pct": upper,
            "promised_pct": self.promised_pct,
            "kl_pct": self.kl_pct,
            "gap_pct_per_mb": self.promised_pct / saved_mb if saved_mb > 0 else None,
            "sampled_kl_pct": self.sampled_kl_pct,
            "predicted_kl_pct": self.predicted_kl_pct,
            "linearization_error": self.linearization_error,
            "num_examples": self.num_examples,
            "num_exact": self.num_exact,
        }


def single_swaps(space: SearchSpace) -> list[Swap]:
    """Every decision at each of its choices but fp32, all other units at fp32."""
    reference = Plan.uniform(space.units, Precision.FP32)
    return [
        Swap(d.name, p, reference.replace(dict.fromkeys(d.units, p)))
        for d in space.decisions
        for p in d.choices
        if p is not Precision.FP32
    ]


def sensitivities(
    space: SearchSpace,
    profile: Profile,
    first_order: FirstOrder,
    swaps: Sequence[Swap],
    sampled: Sequence[RaceSums],
    *,
    confidence: float,
) -> list[Sensitivity]:
    """The sensitivity of every swap; `sampled` holds the races of consecutive groups of them on the same batches."""
    z = profile.selected([swap.plan for swap in swaps])
    gap, kl = profile.gaps_pct(z)
    shrunk: NDArray[np.float64] = np.pad(first_order.sums, (0, z.shape[1] - len(first_order.sums)))
    promised, _ = profile.gaps_pct(z, shrunk)
    intervals = profile.intervals_pct(z, confidence=confidence)
    exact_kl = [kl for sums in sampled for kl in sums.exact.totals()[sums.exact.num_plans : -2] / sums.kl.y]
    residual_kl = [e for sums in sampled for e in sums.kl.e / sums.kl.y]
    base = space.fp32_bytes
    return [
        Sensitivity(
            decision=swap.decision,
            precision=swap.precision,
            bytes_saved=base - space.size_bytes(swap.plan),
            num_examples=profile.num_rows,
            num_exact=sampled[0].exact.num_rows,
            gap_pct=float(gap[k]),
            interval=intervals[k],
            promised_pct=float(promised[k]),
            kl_pct=float(kl[k]),
            sampled_kl_pct=100 * float(exact_kl[k]),
            predicted_kl_pct=100 * float(exact_kl[k] - residual_kl[k]),
        )
        for k, swap in enumerate(swaps)
    ]
