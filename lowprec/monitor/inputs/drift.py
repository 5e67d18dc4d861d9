"""How far the inputs of a window are from those of the certified window, feature by feature.

Whether a feature moved at all is a permutation test on time blocks (Anderson, "A new method for non-parametric
multivariate analysis of variance", 2001): where traffic is the same, the blocks of both windows are exchangeable, so
what varies from hour to hour is not taken for drift as it would be if examples were independent. Over all features the
false discovery rate is kept (Benjamini, Hochberg, 1995), and a feature is named only if it also moved far enough to
matter: from the certified window, and beyond what is normal between the windows of the deployment (`normal_drift`). By
itself drift never breaks a promise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lowprec.config import MonitorConfig
from lowprec.core.errors import ConfigError
from lowprec.monitor.inputs.counts import IdCounts, Inputs, Touched, dense_quantile
from lowprec.monitor.inputs.normal_drift import History, sketches_of
from lowprec.traffic import Schema

__all__ = [
    "DriftRule",
    "FeatureDrift",
    "Novelty",
    "block_test",
    "discoveries",
    "drift_rule",
    "feature_drift",
    "js_distance",
]

Float = NDArray[np.float64]
Int = NDArray[np.int64]

NUM_PERMUTATIONS = 1999
# Fewer permutations than this beyond the statistic are too few to count: the tail is then a fitted gamma law.
MIN_EXCEEDANCES = 10
# An id with at most so many lookups in the certified window is cold; the ids with the most lookups are its top.
COLD_LOOKUPS, NUM_TOP = 3, 100
QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class DriftRule:
    """When a feature is named: false discovery rate over the features of a window, and the least distance.

    expected: features that are known to move, which are never named.
    """

    false_discovery_rate: float
    min_distance: float
    expected: frozenset[str] = frozenset()


@dataclass(frozen=True)
class FeatureDrift:
    """One feature of a window beside the certified one.

    distance: Jensen-Shannon distance (0 to 1) on buckets, less what samples of these sizes differ by anyway. p_value:
    of no drift. step: to the nearest earlier window; normal_step: the largest normal one, None while that is unknown.
    is_expected: known to move, and never named. Shares are of lookups: `unseen` to ids without one in the certified
    window, `cold` to ids with few. churn: the share of the certified window's top ids that are no longer on top.
    ids_per_bag, quantiles (5, 50, 95 percent): now and then.
    """

    feature: str
    kind: str
    distance: float
    p_value: float
    is_warning: bool = False
    step: float | None = None
    normal_step: float | None = None
    is_expected: bool = False
    unseen: float | None = None
    cold: float | None = None
    churn: float | None = None
    ids_per_bag: tuple[float, float] | None = None
    quantiles: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; None for what does not apply."""
        return {k: _plain(v) for k, v in vars(self).items() if v is not None}


def drift_rule(config: MonitorConfig, schema: Schema) -> DriftRule:
    """The rule of a config; raises `ConfigError` where `monitor.expected_drift` names no feature."""
    features = [*(feature.name for feature in schema.sparse), *schema.dense]
    expected: set[str] = set()
    for position, pattern in enumerate(config.expected_drift):
        found = [name for name in features if fnmatchcase(name, pattern)]
        if not found:
            near = get_close_matches(pattern, features, n=3) or features[:6]
            raise ConfigError(
                f'monitor.expected_drift[{position}]: "{pattern}" matches no feature; features are called, for '
                f"example, {', '.join(near)}"
            )
        expected.update(found)
    return DriftRule(config.drift.false_discovery_rate, config.drift.min_distance, frozenset(expected))


class Novelty:
    """Counts the lookups of a window by whether their ids are known from the certified one, as batches come."""

    def __init__(self, known: Inputs, touched: Mapping[str, Touched], tables: Mapping[str, str]) -> None:
        """known, touched: of the certified window, by feature. tables: the table of each feature."""
        self._known, self._touched, self._tables = known, touched, tables
        self.lookups = dict.fromkeys(known.sparse, 0)
        self._unseen = dict.fromkeys(known.sparse, 0)
        self._cold = dict.fromkeys(known.sparse, 0)
        self._of_table: dict[str, list[int]] = {table: [0, 0] for table in tables.values()}

    def add(self, sparse: Mapping[str, IdCounts]) -> None:
        """The lookups of some rows."""
        for name, found in sparse.items():
            seen = self._touched[name].holds(found.ids)
            cold = seen & (self._known.fine_counts(name, found.ids) <= COLD_LOOKUPS)
            self.lookups[name] += found.num_lookups
            self._unseen[name] += int(found.counts[~seen].sum())
            self._cold[name] += int(found.counts[cold].sum())
            if (table := self._tables.get(name)) is not None:
                others = [self._touched[f].holds(found.ids) for f, t in self._tables.items() if t == table]
                touched = np.logical_or.reduce(others)
                self._of_table[table][0] += int(found.counts[~touched].sum())
                self._of_table[table][1] += found.num_lookups

    def unseen(self, feature: str) -> float:
        """The share of a feature's lookups that go to ids without one in the certified window."""
        if not self.lookups[feature]:
            return 0.0
        # An id that is new may share its bit with one that is known.
        missed = 1 - self._touched[feature].fill
        return min(1.0, self._unseen[feature] / self.lookups[feature] / missed) if missed > 0 else math.nan

    def cold(self, feature: str) -> float:
        """The share of its lookups that go to ids with few lookups in the certified window."""
        return self._cold[feature] / self.lookups[feature] if self.lookups[feature] else 0.0

    def untouched(self) -> dict[str, float]:
        """For each table the share of lookups to rows that the certified window did not touch by any feature."""
        return {table: n / total if total else 0.0 for table, (n, total) in self._of_table.items()}


def feature_drift(
    certified: Inputs, now: Inputs, novelty: Novelty, rule: DriftRule, history: History
) -> list[FeatureDrift]:
    """Every feature, the ones that moved furthest first."""
    found = []
    steps = {name: history.step(name, sketch) for name, sketch in sketches_of(now).items()}
    for name in certified.sparse:
        before, after = certified.coarse[name], now.coarse[name]
        found.append(
            FeatureDrift(
                feature=name,
                kind="sparse",
                distance=js_distance(before.sum(axis=0), after.sum(axis=0)),
                p_value=block_test(before, after),
                unseen=novelty.unseen(name),
                cold=novelty.cold(name),
                churn=_churn(certified.fine[name], now.fine[name]),
                ids_per_bag=(_ids_per_bag(now, name), _ids_per_bag(certified, name)),
            )
        )
    for name in certified.dense:
        before, after = certified.histograms[name], now.histograms[name]
        totals = after.sum(axis=0), before.sum(axis=0)
        found.append(
            FeatureDrift(
                feature=name,
                kind="dense",
                distance=js_distance(totals[1], totals[0]),
                p_value=block_test(before, after),
                quantiles=tuple(tuple(dense_quantile(t, q) for q in QUANTILES) for t in totals),  # type: ignore[arg-type]
            )
        )
    tested = [f for f in found if f.feature not in rule.expected]
    rejected = discoveries([f.p_value for f in tested], rule.false_discovery_rate)
    moved = {
        f.feature for f, is_new in zip(tested, rejected, strict=True) if is_new and f.distance >= rule.min_distance
    }
    named = [
        replace(
            f,
            is_warning=f.feature in moved and not steps[f.feature].is_normal(rule.min_distance),
            step=None if math.isnan(steps[f.feature].distance) else steps[f.feature].distance,
            normal_step=steps[f.feature].normal,
            is_expected=f.feature in rule.expected,
        )
        for f in found
    ]
    return sorted(named, key=lambda f: (not f.is_warning, -f.distance))


def js_distance(a: Int, b: Int) -> float:
    """The Jensen-Shannon distance of two histograms, base 2: the root of the divergence, less its expectation where
    both are samples of one law ((buckets - 1) (1 / n + 1 / m) / (8 ln 2), to first order). NaN where one is empty.
    """
    n, m = int(a.sum()), int(b.sum())
    if not n or not m:
        return math.nan
    used = (a + b) > 0
    p, q = a[used] / n, b[used] / m
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log2(p / middle), 0.0) + np.where(q > 0, q * np.log2(q / middle), 0.0)
    expected = (int(used.sum()) - 1) * (1 / n + 1 / m) / (8 * math.log(2))
    return math.sqrt(max(float(terms.sum()) / 2 - expected, 0.0))


def block_test(before: Int, after: Int) -> float:
    """The p-value of "the blocks of both windows are exchangeable"; int64[blocks, buckets] each.

    The statistic is the squared distance of mean block shares, each bucket in units of the root of its overall share,
    of as many counts from each block. 1 where a window has no block.
    """
    before, after = _full(before), _full(after)
    if not len(before) or not len(after):
        return 1.0
    rng = np.random.default_rng(0)
    counts = np.concatenate([before, after])
    # Of larger blocks a random part: those with more rows vary less, and could be told from the others by that alone.
    size = int(counts.sum(axis=1).min())
    drawn_counts = np.array([rng.multivariate_hypergeometric(block, size, method="marginals") for block in counts])
    shares = drawn_counts / size
    used = shares.sum(axis=0) > 0
    scaled = shares[:, used] / np.sqrt(shares[:, used].mean(axis=0))
    scaled -= scaled.mean(axis=0)
    gram = scaled @ scaled.T
    contrasts = _contrasts(len(before), len(after))
    statistic, *others = np.einsum("pi,pi->p", contrasts @ gram, contrasts).tolist()
    drawn = np.array(others)
    beyond = int((drawn >= statistic * (1 - 1e-12)).sum())
    counted = (beyond + 1) / (NUM_PERMUTATIONS + 1)
    if beyond >= MIN_EXCEEDANCES:
        return counted
    # No test of few blocks can say more than how many ways there are to choose them.
    return max(min(counted, _gamma_tail(statistic, drawn)), 1 / math.comb(len(counts), len(after)))


@cache
def _contrasts(num_before: int, num_after: int) -> Float:
    """What takes the mean of blocks before from that of blocks after, float64[1 + NUM_PERMUTATIONS, blocks]: of the
    blocks as they are, then permuted; the same permutations for every feature.
    """
    contrast = np.concatenate([np.full(num_before, -1 / num_before), np.full(num_after, 1 / num_after)])
    permuted = np.random.default_rng(1).permuted(np.tile(contrast, (NUM_PERMUTATIONS, 1)), axis=1)
    return np.concatenate([contrast[None], permuted])


def discoveries(p_values: Sequence[float], rate: float) -> list[bool]:
    """Which hypotheses are rejected at that false discovery rate (Benjamini and Hochberg)."""
    return [bool(p <= rate) for p in stats.false_discovery_control(p_values)] if p_values else []


def _full(blocks: Int) -> Int:
    """The blocks that have at least half as many counts as most: a short last one would speak for all."""
    sizes = blocks.sum(axis=1)
    present = sizes[sizes > 0]
    return blocks[(sizes > 0) & (2 * sizes >= np.median(present))] if len(present) else blocks[:0]


def _gamma_tail(statistic: float, drawn: Float) -> float:
    """The tail beyond a statistic of the gamma law (Pearson's type III) with the moments of those drawn."""
    mean, deviation = float(drawn.mean()), float(drawn.std())
    if deviation == 0:
        return 1.0
    skewness = max(0.0, float(((drawn - mean) ** 3).mean()) / deviation**3)
    return float(stats.pearson3.sf(statistic, skewness, loc=mean, scale=deviation))


def _churn(before: Int, after: Int) -> float:
    num_top = min(NUM_TOP, int((before > 0).sum()) // 2)
    if not num_top or not after.sum():
        return 0.0
    top = [set(np.argsort(-counts, kind="stable")[:num_top].tolist()) for counts in (before, after)]
    return 1 - len(top[0] & top[1]) / num_top


def _ids_per_bag(inputs: Inputs, name: str) -> float:
    return float(inputs.fine[name].sum() / inputs.num_bags[name]) if inputs.num_bags[name] else 0.0


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
