"""The output channels of a layer that hurt most, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowprec.debug.sums import ErrorSums
from lowprec.ops.linear import restored_weight

__all__ = ["WeightCodes", "WorstChannel", "weight_codes", "worst_channels"]

# A channel whose largest weight is so many times the median channel's is said to be an outlier.
_WIDE = 4.0
# Inputs beyond their codes are said to be the reason of so much of a layer's error.
_MUCH = 0.3


@dataclass(frozen=True)
class WeightCodes:
    """Of the weights of a layer: how many there are, lie beyond the codes, and became zero."""

    num_values: int
    num_saturated: int
    num_underflowed: int


@dataclass(frozen=True)
class WorstChannel:
    """An output channel: its share of the layer's squared error, its SQNR, and why."""

    channel: int
    share: float
    sqnr_db: float | None
    max_error: float
    why: str

    def to_dict(self) -> dict[str, Any]:
        """For documents."""
        return dict(vars(self))


def weight_codes(weight: Tensor, stored: Mapping[str, Tensor]) -> WeightCodes:
    """Of a weight float32[out, in] and what is stored of it."""
    restored = restored_weight(stored)
    if "codes" in stored:
        beyond = (weight - restored).abs() > 0.501 * stored["scales"].reshape(-1, 1) + 1e-6 * weight.abs()
    else:
        beyond = ~torch.isfinite(restored)
    lost = (weight != 0) & (restored == 0)
    return WeightCodes(weight.numel(), int(beyond.sum()), int(lost.sum()))


def worst_channels(
    alone: ErrorSums, weight: Tensor, stored: Mapping[str, Tensor], count: int, *, saturated_share: float = 0.0
) -> list[WorstChannel]:
    """Those with the largest squared error; none where the layer is exact.

    saturated_share: of the layer's squared error, the part in rows with an input beyond its codes.
    """
    total = alone.error2.sum()
    order = [int(c) for c in np.argsort(-alone.error2, kind="stable")[:count] if alone.error2[c] > 0]
    sqnr = alone.sqnr_db_by_channel
    return [
        WorstChannel(
            channel=c,
            share=float(alone.error2[c] / total),
            sqnr_db=float(sqnr[c]) if np.isfinite(sqnr[c]) else None,
            max_error=float(alone.largest[c]),
            why=_why(c, weight, stored, saturated_share),
        )
        for c in order
    ]


def _why(channel: int, weight: Tensor, stored: Mapping[str, Tensor], saturated_share: float) -> str:
    restored = restored_weight(stored)[channel]
    values = weight[channel]
    if not torch.isfinite(restored).all():
        return "its weights do not restore to finite values"
    codes = stored["codes"][channel] if "codes" in stored else restored
    if bool((codes == 0).all()) and bool((values != 0).any()):
        return "all its weights became zero" + (" but for outliers" if bool(restored.any()) else "")
    peaks = weight.abs().amax(dim=1)
    median = float(peaks.median())
    if "codes" in stored and len(stored["scales"]) == 1 < len(weight) and median:
        widest = int(peaks.argmax())
        if float(peaks[widest]) > _WIDE * median:
            return (
                f"channel {widest} has a weight of {float(peaks[widest]):g}, {float(peaks[widest]) / median:.0f} times "
                "the median channel, and all channels share its scale"
            )
    if median and float(peaks[channel]) > _WIDE * median:
        return f"its largest weight is {float(peaks[channel]) / median:.1f} times the median channel's"
    if saturated_share > _MUCH:
        return f"inputs beyond their codes: rows with one have {saturated_share:.0%} of the layer's squared error"
    error = (restored - values).square().sum()
    if float(error) == 0:
        return "its weights are exact: the error is that of its inputs or its sums"
    return "rounding of weights and inputs"
