"""Plans race until each is decided, and who raced beside whom decides nothing but who is dominated."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowprec.evaluation.metrics import Sums
from lowprec.evaluation.profile.profile import BlockSums, Profile
from lowprec.evaluation.race.estimate import MIN_SLICES
from lowprec.evaluation.race.race_sums import RaceSums, Residuals
from lowprec.evaluation.stats.confidence import Interval
from lowprec.evaluation.stats.second_moment import DenseMoment
from lowprec.plan import Plan, Precision, Unit
from lowprec.search.race_policy import MAX_SHARE, MAX_SLICES, laps, race
from lowprec.search.rule import Forecast


@given(st.integers(1, 5000))
def test_laps_rise_and_end_at_the_end(num_slices):
    seen = laps(num_slices)
    assert seen == sorted(set(seen)) and seen[-1] <= num_slices
    if num_slices <= MAX_SLICES:
        assert seen[-1] == num_slices  # the whole of a short window
    else:
        assert MAX_SLICES <= seen[-1] == max(MAX_SLICES, int(MAX_SHARE * num_slices))
    assert seen == [num_slices] or seen[0] == MIN_SLICES
    for before, after in pairwise(seen):
        assert after - before >= before // 5  # every lap is worth its while
        assert after <= 2 * before
    # So looks are few: their number grows with the logarithm of the window.
    assert len(seen) <= 3 + math.log(max(seen[-1] / MIN_SLICES, 1)) / math.log(1.4)


def test_a_window_of_few_slices_is_one_lap():
    assert [laps(k) for k in (1, 7, 15)] == [[1], [7], [15]]
    assert laps(16)[0] == MIN_SLICES


# The confirm window has as many examples as this one.
FORECAST = Forecast.of(confidence=0.95, num_search=1, num_confirm=1)


@dataclass(frozen=True)
class Known:
    """A rival."""

    cost: float
    risk_on_window: Interval


class World:
    """A window of slices of 100 rows: P plans, one unit each, with the gaps that the profile predicts, and residuals.

    gaps: the gap of each plan on the window in percent; noise: float64[P, M], what the exact loss change of a slice has
    beyond that which was predicted, in percent of the loss of the window; its sum is 0 for each plan.
    """

    SIZE = 100

    def __init__(self, gaps, noise, *, spread=0.02):
        self.gaps, (num_plans, self.num_slices) = np.asarray(gaps, dtype=float), noise.shape
        self.noise, self.spread = noise, spread
        self.units = [Unit(f"table:{k}", 10, 4) for k in range(num_plans)]
        self.columns = tuple((unit.name, Precision.INT4) for unit in self.units)
        self.plans = [Plan.uniform(self.units, Precision.FP32).replace({u.name: Precision.INT4}) for u in self.units]
        self.calls = []
        self.loss = float(self.num_slices * self.SIZE)  # a loss of 1 for each row
        d, n = num_plans + 2, int(self.loss)
        second = DenseMoment(np.zeros((d, d)))
        evidence = np.zeros((d + 1, d + 1))
        np.fill_diagonal(evidence, n * spread**2)
        evidence[-1, -1] = 2 * n
        first = np.concatenate([self.gaps / 100 * self.loss, np.zeros(2)])
        blocks = tuple(
            BlockSums(n // 20, 0, n / 20, n / 40, n / 40, self.loss / 20, self.loss / 20, first / 20, second)
            for _ in range(20)
        )
        self.profile = Profile(self.columns, blocks, DenseMoment(evidence))

    def lap(self, plans, slices):
        numbers = [self.plans.index(plan) for plan in plans]
        self.calls.append((numbers, list(slices)))
        total = None
        for k in slices:
            e = np.repeat(self.noise[numbers, k][:, None] / 100 * self.loss / self.SIZE, self.SIZE, axis=1)
            y = np.ones(self.SIZE)
            share = self.SIZE / self.loss
            change = self.gaps[numbers] / 100 * self.loss * share + e.sum(axis=1)
            n, p, squares = self.SIZE, len(numbers), self.SIZE * self.spread**2
            moments = np.zeros((p, 2, 10))  # x, y, xx, xy, yy, xxxx and third powers, of gap and of KL gap
            moments[:, 0, 0], moments[:, 0, 2], moments[:, 0, 5] = change, squares, 3 * squares**2 / n
            moments[:, :, 1], moments[:, :, 4] = n, 2 * n
            exact = Sums(
                n, 0, n, n / 2, n, np.concatenate([[n], n + change]), np.full(p + 1, n / 2),
                np.ones((p + 1, 2, 1)), moments, None,
            )  # fmt: skip
            residuals = replace(Residuals.of_slice(e, y), yy_rows=2.0 * n)
            lap = RaceSums(
                1,
                exact,
                residuals,
                residuals,
                np.full(p, squares),
                np.full(p, squares),
            )
            total = lap if total is None else total + lap
        return total

    def race(self, costs=None, *, order=None, budgets=(0.05,), rivals=(), plans=None, confidence=0.95):
        chosen = self.plans if plans is None else [self.plans[k] for k in plans]
        costs = list(range(len(chosen))) if costs is None else costs
        order = range(self.num_slices) if order is None else order
        return race(
            chosen,
            costs,
            self.lap,
            self.profile,
            list(order),
            forecast=FORECAST,
            corrections_pct=[0.0] * len(chosen),
            rivals=rivals,
            budgets=budgets,
            confidence=confidence,
        )


def quiet(gaps, num_slices=64, size=1e-4, seed=0, **options):
    """A world whose residuals are small."""
    noise = size * np.random.default_rng(seed).normal(size=(len(gaps), num_slices))
    return World(gaps, noise - noise.mean(axis=1, keepdims=True), **options)


# A budget that is never decided.
NONE = (math.nan,)


def test_a_plan_stops_when_the_rule_is_decided():
    found = quiet([-0.3, 3.0], spread=0.002).race()
    assert [(f.why, f.num_slices) for f in found] == [("rule", MIN_SLICES)] * 2
    assert [f.risk_on_window.upper <= 0.05 for f in found] == [True, False]
    assert [f.estimate.metrics.verdict(0.05) for f in found] == ["certified", "rejected"]
    assert [f.plan for f in found] == quiet([-3.0, 3.0]).plans and [f.cost for f in found] == [0, 1]


def test_a_gap_below_budget_is_not_enough_for_the_rule():
    """The interval is wider than the budget, so the KL gap (of 0) and half its width are not within the budget."""
    (found,) = quiet([-3.0]).race()
    assert found.why == "rule" and found.estimate.metrics.verdict(0.05) == "certified"
    assert found.risk_on_window.lower > 0.05


def test_the_rule_must_be_decided_for_every_budget():
    risk = quiet([3.0], size=1e-9).race(budgets=NONE)[0].risk_on_window.upper
    one, two = (quiet([3.0], size=0.02).race(budgets=b)[0] for b in ((0.05,), (0.05, risk)))
    assert one.why == "rule" and two.num_slices > one.num_slices


def test_a_plan_that_a_rival_beats_at_its_cost_stops():
    """The rule itself is not decided."""
    world = quiet([0.05], spread=0.002)
    for cost, upper, why in ((0.0, 0.01, "dominated"), (1.0, 0.01, None), (0.0, 0.09, None), (-1.0, 0.01, "dominated")):
        (found,) = world.race([0.0], rivals=[Known(cost, Interval(0.0, upper))], budgets=NONE)
        assert (found.why == "dominated") == (why is not None), (cost, upper, found.why)


def test_plans_of_one_race_are_no_rivals_but_those_of_an_earlier_one_are():
    world = quiet([0.01, 0.09, 0.09], size=0.003)
    together = world.race([1.0, 1.0, 0.5], budgets=NONE)
    assert all(f.why != "dominated" for f in together)
    first = world.race([1.0], plans=[0], budgets=NONE)
    later = world.race([1.0, 0.5], plans=[1, 2], rivals=first, budgets=NONE)
    assert [f.why == "dominated" for f in later] == [True, False]  # the other is cheaper than its rival
    assert later[0].risk_on_window.lower > first[0].risk_on_window.upper
    assert later[0].num_slices < together[1].num_slices


def test_near_a_budget_a_race_goes_on_because_the_half_width_is_an_estimate():
    risk = quiet([0.05], num_slices=256).race(budgets=NONE)[0].risk_on_window.upper
    near, far = (quiet([0.05], num_slices=256).race(budgets=(share * risk,))[0] for share in (0.95, 0.2))
    assert (near.why, near.num_slices) == ("end", laps(256)[-1])
    assert (far.why, far.num_slices) == ("rule", MIN_SLICES)


def test_a_race_ends_with_its_last_lap():
    (found,) = quiet([0.05], size=0.3, num_slices=400).race(budgets=NONE)
    assert (found.why, found.num_slices) == ("end", laps(400)[-1]) == ("end", 100)
    assert found.risk_on_window.lower < found.risk_on_window.upper
    (short,) = quiet([0.05], size=0.3, num_slices=12).race(budgets=NONE)
    assert short.num_slices == 12 and short.risk_on_window.lower == short.risk_on_window.upper


def test_each_slice_is_read_once_and_only_by_plans_that_still_run():
    world = quiet([-3.0, 0.05, 3.0, 0.06], size=0.02, num_slices=100)
    order = np.random.default_rng(1).permutation(100)
    found = world.race(order=order, budgets=(0.12,))
    assert world.calls[0][0] == [0, 1, 2, 3]
    read = [k for _, slices in world.calls for k in slices]
    assert read == list(order[: len(read)]) and len(read) == max(f.num_slices for f in found)
    ends = np.cumsum([len(slices) for _, slices in world.calls])
    for (numbers, _), end in zip(world.calls, ends, strict=True):
        assert numbers == [k for k, f in enumerate(found) if f.num_slices >= end]


@pytest.mark.parametrize("seed", range(3))
def test_a_plan_finishes_the_same_in_any_company(seed):
    """To the bit: a wave that was cut in two must be the same as a whole one."""
    rng = np.random.default_rng(seed)
    world = quiet(np.sort(rng.uniform(-0.2, 0.3, 12)), size=0.001, num_slices=128, seed=seed)
    costs, order = list(rng.permutation(12).astype(float)), rng.permutation(128)
    rivals = [Known(3.0, Interval(-0.1, 0.0))]
    options = {"order": order, "rivals": rivals, "budgets": (0.15,)}
    together = world.race(costs, **options)
    assert len({f.num_slices for f in together}) > 1 and len({f.why for f in together}) > 1
    for k in range(12):
        assert world.race([costs[k]], plans=[k], **options) == [together[k]]
    assert world.race(costs[3:7], plans=range(3, 7), **options) == together[3:7]
    assert world.race(costs[::-1], plans=range(12)[::-1], **options) == together[::-1]


def raced_apart(kind, *, races=10, num_pairs=25, num_slices=200, better=0.0, seed=2):
    """How often the second of a pair is dominated by the first, raced before it at the same cost.

    Both have the same gap on the window, or the first a smaller one by `better`; pairs are no rivals of each other, as
    costs rise where gaps fall. The window is long, so that no race sees all of it.
    """
    rng, dominated = np.random.default_rng(seed), 0
    for _ in range(races):
        shape = (2 * num_pairs, num_slices)
        noise = 0.01 * (rng.normal(size=shape) if kind == "normal" else rng.standard_t(2.5, shape))
        gaps = np.repeat(np.linspace(1000, 40, num_pairs), 2)
        gaps[1::2] += better
        world = World(gaps, noise - noise.mean(axis=1, keepdims=True))
        order, costs = rng.permutation(num_slices), [float(k) for k in range(num_pairs)]
        options = {"order": order, "budgets": NONE}  # all of the race is about which plan beats which
        first = world.race(costs, plans=range(0, 2 * num_pairs, 2), **options)
        assert all(f.num_slices < num_slices and f.risk_on_window.lower < f.risk_on_window.upper for f in first)
        second = world.race(costs, plans=range(1, 2 * num_pairs, 2), rivals=first, **options)
        dominated += sum(f.why == "dominated" for f in second)
    return dominated / (races * num_pairs), races * num_pairs


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_a_plan_as_good_as_another_is_rarely_called_dominated(kind):
    """To be dominated is that two intervals part, of which each fails at a rate of half a percent."""
    rate, count = raced_apart(kind)
    assert rate <= 0.01 + 3 * math.sqrt(0.01 / count)
    assert raced_apart(kind, races=2, better=20.0)[0] > 0.9  # the race can tell


def test_a_gap_that_is_not_finite_runs_to_the_end_and_dominates_nobody():
    world = quiet([math.nan, 0.05], size=0.01)
    found = world.race([0.0, 1.0])
    assert found[0].num_slices == 64 and found[0].why != "rule" and found[1].why != "dominated"
    assert math.isnan(found[0].estimate.metrics.gap_pct)
