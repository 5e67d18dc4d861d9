"""Arithmetic of the kernels that NumPy does not have: fused multiply-add, and rounding to fp16 in a direction."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "fma", "half", "half_down", "half_up"]

Floats = NDArray[np.float32]


def fma(a: Floats | np.float32, b: Floats, c: Floats) -> Floats:
    """The float32 a * b + c, rounded once."""
    product = np.multiply(a, b, dtype=np.float64)  # exact: 24 and 24 bits
    wide = np.asarray(c, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        total = product + wide
        # What rounding to float64 lost (Knuth's two-sum). A lost part makes the last bit odd, so that rounding to
        # float32 sees it: 53 bits are more than two times 24 and two.
        part = total - product
        lost = (product - (total - part)) + (wide - part)
    bits = total.view(np.int64) if total.ndim else np.asarray(total)[None].view(np.int64)[0]
    even = (bits & 1) == 0
    toward = np.where((lost > 0), np.inf, -np.inf)
    odd = np.where(even & (lost != 0) & np.isfinite(total), np.nextafter(total, toward), total)
    return np.asarray(odd, dtype=np.float64).astype(np.float32)


def half(x: Floats) -> Floats:
    """Rounded to fp16, nearest even; beyond its range infinity."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def half_down(x: Floats) -> Floats:
    """Rounded to fp16 towards minus infinity."""
    near = half(x).astype(np.float16)
    return np.where(near > x, np.nextafter(near, np.float16(-np.inf)), near).astype(np.float32)


def half_up(x: Floats) -> Floats:
    """Rounded to fp16 towards plus infinity."""
    return -half_down(-x)
