"""Evidence by mixtures of normal distributions (Robbins, 1970; Howard et al., 2021)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import special

__all__ = ["log_one_sided_mixture"]

Float = NDArray[np.float64]


def log_one_sided_mixture(s: Float | float, v: Float | float, rho: Float | float) -> Float:
    """The logarithm of the one-sided normal mixture: an e-value against a mean of at most 0.

    Args:
        s: Sums of observations, float64[...].
        v: Their variance.
        rho: The variance at which the mixture is tightest, up to a factor; positive.
    """
    z = np.asarray(s) / np.sqrt(np.asarray(v) + rho)
    return np.asarray(0.5 * np.log(4 * rho / (np.asarray(v) + rho)) + 0.5 * z * z + special.log_ndtr(z))
