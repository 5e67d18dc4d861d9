"""The lifetime test of a deployment: whether its gap is within the budget.

With x the loss change of the plan and y the reference loss of a unit of evidence, d = x - budget y has an expectation
of at most 0 while the promise holds. From every window j on, S is the sum of d since then and V its variance, and

    e_j = sqrt(4 rho / (V + rho)) exp(S^2 / (2 (V + rho))) Phi(S / sqrt(V + rho))

is the one-sided normal mixture supermartingale (Howard, Ramdas, McAuliffe, Sekhon, "Time-uniform, nonparametric,
nonasymptotic confidence sequences", 2021, section 3.2, here with estimated variances). It is fastest for a change whose
size follows from rho, so the mean over three sizes is taken. The change, if there is one, may begin in
any window: the mean of all e_j, with weights w_j that add up to 1 over all windows there will ever be, is a
supermartingale as well, so it reaches 1 / alpha with a chance of at most alpha, however long one looks and however
often. That is the price of a change that comes late: a few windows more, because its weight is small, but no waiting
for a life's average to move (compare Shin, Ramdas, Rinaldo, "E-detectors", 2022, which fix the average run length
instead; here most deployments without a change never alarm).

The variance of a window is that within it, times by how much windows of this deployment vary more than that, with
their correlation in time: days differ, and one good or bad day says little about the next month.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lowprec.core.sums import add_fields
from lowprec.evaluation.stats.confidence import MIN_EFFECTIVE_UNITS, MIN_UNITS, Interval, RatioMoments, ratio_interval
from lowprec.evaluation.stats.mixture import log_one_sided_mixture

__all__ = ["BudgetState", "BudgetTest", "Evidence"]

Float = NDArray[np.float64]

# A change has the same chance to begin in each of about so many first windows, and ever less later.
TYPICAL_LIFE = 100
# Before windows have said how much they vary among each other, they are taken to vary as if this many of them had been
# seen to have this factor of variance. With less, days that are correlated at the budget alarm too often in the
# first weeks (make bench NAME=alarms).
PRIOR_OVERDISPERSION, PRIOR_WINDOWS = 3.0, 6
MIN_WINDOWS = 4
# Standard errors that are added to what is estimated of it.
OVERDISPERSION_ERRORS = 1.0
# Starts of a change that are all kept; older ones are thinned out, which costs a little power and no validity.
RECENT_STARTS, THINNED = 512, 32
# Changes that are looked for, over one that doubles the gap from the budget: small windows can only show large ones.
CHANGES = (1.0, 4.0, 16.0)
_MOMENTS = ("num_units", "x", "y", "xx", "xy", "yy", "xxxx")
# A running interval is tightest after so many windows like the first.
TUNED_WINDOWS = 10


@dataclass(frozen=True)
class Evidence:
    """What one window says: moments of (loss change, reference loss), and how much its time blocks vary beyond them."""

    moments: RatioMoments
    design_effect: float = 1.0

    @property
    def is_usable(self) -> bool:
        """Whether there is anything to add up."""
        return self.moments.num_units > 0 and self.moments.y > 0


@dataclass(frozen=True)
class BudgetState:
    """How the promise stands after a window.

    epoch: counts the stretches between breaches, from 0. log_evidence: natural logarithm of the evidence against what
    holds now (the promise, or in a breach that it is broken), which changes the state at `log_threshold`.
    running: the gap over the windows from number `since` on (from 0), as a fraction, at the confidence asked for at all
    windows together: those since the deployment, or since the last breach began or ended; where one begins, those that
    show it best. overdispersion: the factor of variance between windows that was reckoned with. breach_at: the number
    of the window in which the breach was found that stands now, None where none does.
    """

    in_breach: bool
    began: bool
    ended: bool
    epoch: int
    log_evidence: float
    log_threshold: float
    running: Interval
    running_gap: float
    since: int
    overdispersion: float
    breach_at: int | None = None

    @property
    def has_crossed(self) -> bool:
        """Whether there is evidence enough to change the state."""
        return self.log_evidence >= self.log_threshold


class BudgetTest:
    """The promise of a deployment, told one window after the other, in time order.

    The chance that a promise which holds is ever called broken is at most `false_alarm_rate` over the whole life: the
    first stretch has half of it, the one after the first breach a quarter, and so on. A breach ends when the same test,
    at `false_alarm_rate`, says that the gap is no longer above the budget.
    """

    def __init__(self, *, budget: float, false_alarm_rate: float, confidence: float) -> None:
        """budget: a fraction. confidence: of the running interval."""
        self._budget, self._rate, self._confidence = budget, false_alarm_rate, confidence
        self._epoch, self._num_windows, self._in_breach = 0, 0, False
        self._breach_at: int | None = None
        self._test = self._next_test(PRIOR_OVERDISPERSION)

    def after(self, window: Evidence, *, is_known_breach: bool = False) -> BudgetState:
        """How it stands after one more window.

        is_known_breach: a breach was found to begin here before; it did, whatever the evidence says since then.
        """
        standing = self._test.after(window)
        began = not self._in_breach and (is_known_breach or standing.has_crossed)
        ended = self._in_breach and standing.has_crossed
        if began:
            standing = self._test.at_change(standing)
            self._breach_at = self._num_windows
        self._num_windows += 1
        self._in_breach = began or (self._in_breach and not ended)
        found = replace(
            standing,
            in_breach=self._in_breach,
            began=began,
            ended=ended,
            epoch=self._epoch,
            breach_at=self._breach_at if self._in_breach else None,
        )
        if began or ended:
            self._epoch += ended
            self._test = self._next_test(max(PRIOR_OVERDISPERSION, standing.overdispersion))
        return found

    def _next_test(self, prior: float) -> _MixtureTest:
        alpha = self._rate if self._in_breach else self._rate / 2 ** (self._epoch + 1)
        sign = -1.0 if self._in_breach else 1.0
        return _MixtureTest(self._budget, alpha, self._confidence, prior, sign=sign, begins=self._num_windows)


class _MixtureTest:
    """The test of one stretch: d adds up towards a breach (sign 1), or in a breach towards its end (sign -1)."""

    def __init__(
        self, budget: float, alpha: float, confidence: float, prior: float, *, sign: float, begins: int
    ) -> None:
        self._budget, self._confidence, self._prior, self._sign = budget, confidence, prior, sign
        self._begins = begins
        self._log_threshold = -math.log(alpha)
        self._history: list[Evidence] = []
        # How many windows came before the one of `_history`, by window that was usable; and of every start of a change
        # that is kept its position there, with the sums since then of d, of its variance and of all moments.
        self._numbers: list[int] = []
        self._deviations: list[float] = []
        self._seen = 0
        self._starts = np.empty(0, dtype=np.int64)
        self._sums = np.empty((2 + len(_MOMENTS), 0))
        self._total: RatioMoments | None = None
        self._plain_variance = 0.0

    def after(self, window: Evidence) -> BudgetState:
        """The standing with one more window; who asks says whether it changes the state."""
        if window.is_usable:
            self._add(window)
        self._seen += 1
        phi = self._overdispersions()
        # That of the first start: there windows are not told apart.
        of_all = float(phi[0]) if len(phi) else self._prior
        return BudgetState(
            in_breach=False,
            began=False,
            ended=False,
            epoch=0,
            log_evidence=self._log_evidence(phi),
            log_threshold=self._log_threshold,
            running=self._interval(self._total, of_all),
            running_gap=self._total.ratio if self._total else math.nan,
            since=self._begins,
            overdispersion=of_all,
        )

    def at_change(self, standing: BudgetState) -> BudgetState:
        """A standing with the gap of the windows that show best that there is a change."""
        if self._total is None:
            return standing
        phi = self._overdispersions()
        best = int(np.argmax(self._terms(phi)[:-1]))
        moments = RatioMoments(*self._sums[2:, best].tolist())
        return replace(
            standing,
            running=self._interval(moments, float(phi[best])),
            running_gap=moments.ratio,
            overdispersion=float(phi[best]),
            since=self._begins + self._numbers[int(self._starts[best])],
        )

    def _add(self, window: Evidence) -> None:
        m, b = window.moments, self._budget
        d = m.x - b * m.y
        variance = max(m.xx - 2 * b * m.xy + b * b * m.yy - d * d / m.num_units, 0.0) * window.design_effect
        self._starts = np.append(self._starts, len(self._history))
        self._sums = np.concatenate([self._sums, np.zeros((len(self._sums), 1))], axis=1)
        self._sums += np.array([self._sign * d, variance, *(getattr(m, name) for name in _MOMENTS)])[:, None]
        self._history.append(window)
        self._deviations.append(self._sign * d / math.sqrt(variance) if variance > 0 else 0.0)
        self._numbers.append(self._seen)
        age = len(self._history) - self._starts
        kept = (age <= RECENT_STARTS) | (self._starts % THINNED == 0)
        self._starts, self._sums = self._starts[kept], self._sums[:, kept]
        self._total = m if self._total is None else add_fields(self._total, m)
        self._plain_variance += variance / window.design_effect

    def _log_evidence(self, phi: Float) -> float:
        if self._total is None:
            return 0.0
        terms = self._terms(phi)
        top = float(terms.max())
        return top + math.log(float(np.exp(terms - top).sum()))

    def _terms(self, phi: Float) -> Float:
        """Logarithms of the weighted evidence for a change at every start that is kept, and of what is yet to come."""
        assert self._total is not None
        d, variance, n, _, _, xx, _, _, xxxx = self._sums
        v = phi * variance
        # The least change that is looked for: the gap doubles from the budget, or in a breach goes back to half of it.
        wanted = self._budget * self._total.y / self._total.num_units * (1.0 if self._sign > 0 else 0.5)
        of_unit = float(variance[0] / n[0])
        log_e = np.zeros(len(d))
        if of_unit > 0 and wanted > 0:
            scaled = []
            for times in CHANGES:
                scaled.append(log_one_sided_mixture(d, v, (phi * of_unit / (times * wanted)) ** 2))
            log_e = np.logaddexp.reduce(scaled, axis=0) - math.log(len(CHANGES))
        # Sums of few units, or of few that carry the change, are not normal: they may speak for the promise only.
        with np.errstate(divide="ignore", invalid="ignore"):
            is_normal = (n >= MIN_UNITS) & (xx * xx >= MIN_EFFECTIVE_UNITS * xxxx)
        log_e = np.where(is_normal, log_e, np.minimum(log_e, 0.0))
        weights = TYPICAL_LIFE / ((self._starts + TYPICAL_LIFE) * (self._starts + TYPICAL_LIFE + 1.0))
        # Starts that have not come yet stand at 1; those that were thinned out count for nothing.
        yet_to_come = TYPICAL_LIFE / (len(self._history) + TYPICAL_LIFE)
        return np.append(np.log(weights) + log_e, math.log(yet_to_come))

    def _overdispersions(self) -> Float:
        """For every start that is kept: by how much windows vary more than what is within them says; at least 1.

        Correlation in time is included (the long-run variance of Newey and West, 1987). Windows before and after a
        start are compared with their own mean, or the change that is looked for would hide itself as noise.
        """
        u = np.array(self._deviations)
        m = len(u)
        if m < MIN_WINDOWS:
            return np.full(len(self._starts), self._prior)
        lags = min(int(4 * (m / 100) ** (2 / 9)) + 1, m - 2)
        starts = self._starts
        sums = np.concatenate([[0.0], np.cumsum(u)])
        factor = np.zeros(len(starts))
        for lag in range(lags + 1):
            products = np.concatenate([[0.0], np.cumsum(u[lag:] * u[: m - lag])])
            weight = (1.0 if lag == 0 else 2.0) * (1 - lag / (lags + 1))
            for begin, end in ((np.zeros_like(starts), starts), (starts, np.full_like(starts, m))):
                count = np.maximum(end - begin, 1)
                mean = (sums[end] - sums[begin]) / count
                last = np.maximum(end - lag, begin)
                pairs = last - begin
                both = (sums[end] - sums[np.minimum(begin + lag, end)]) + (sums[last] - sums[begin])
                own = products[np.minimum(last, m - lag)] - products[np.minimum(begin, m - lag)]
                factor += weight * (own - mean * both + pairs * mean**2)
        factor = np.maximum(factor, 0.0) / (m - 2) * (1 + OVERDISPERSION_ERRORS * math.sqrt((2 + 4 / 3 * lags) / m))
        return np.asarray(np.maximum(1.0, (PRIOR_WINDOWS * self._prior + m * factor) / (PRIOR_WINDOWS + m)))

    def _interval(self, moments: RatioMoments | None, phi: float) -> Interval:
        if moments is None:
            return Interval(-math.inf, math.inf)
        planned = TUNED_WINDOWS * self._history[0].moments.num_units
        # Of all windows: by how much their time blocks vary more, on average.
        design = float(self._sums[1, 0]) / self._plain_variance if self._plain_variance > 0 else 1.0
        return ratio_interval(moments, 1 - self._confidence, tuned_for=planned, inflation=phi * max(design, 1.0))
