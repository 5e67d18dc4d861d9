"""The life-long test: how often it alarms falsely, how fast it alarms rightly, and what it makes of odd windows."""

import math

import numpy as np
import pytest

from lowprec.evaluation.stats.confidence import RatioMoments
from lowprec.monitor.judging.budget_test import BudgetTest, Evidence

BUDGET, LOSS = 5e-4, 0.45
NOTHING = Evidence(RatioMoments(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))


def promise(rate=0.05):
    return BudgetTest(budget=BUDGET, false_alarm_rate=rate, confidence=0.95)


def window(gap, noise=0.0, *, num_units=200_000, power=6.0, carried_by=1.0):
    """A window with that gap; `noise` in its own standard errors; a gap of one budget is `power` of them."""
    n = num_units
    deviation = BUDGET * LOSS * math.sqrt(n) / power
    x = n * LOSS * gap + noise * deviation * math.sqrt(n)
    xx = n * deviation**2 + x * x / n
    return Evidence(RatioMoments(n, x, n * LOSS, xx, x * LOSS, 1.5 * n * LOSS**2, 5 * xx * xx / n / carried_by))


def correlated(rng, count, spread, correlation):
    """Noise of windows beyond their own, an autoregression in units of their standard error."""
    found = np.empty(count)
    found[0] = rng.normal() * spread
    for k in range(1, count):
        found[k] = correlation * found[k - 1] + rng.normal() * spread * math.sqrt(1 - correlation**2)
    return found


def began(gaps, noise, told=None, **how):
    """The number of the first window after which the promise is broken; None where it never is."""
    told = told or promise()
    for k, (gap, error) in enumerate(zip(gaps, noise, strict=True)):
        if told.after(window(gap, error, **how)).began:
            return k
    return None


@pytest.mark.parametrize("spread, correlation", [(0, 0), (0.7, 0.5), (1.5, 0.3)])
def test_a_gap_right_at_the_budget_alarms_no_more_often_than_it_may(spread, correlation):
    rng = np.random.default_rng(0)
    lives, length = 120, 120
    alarms = sum(
        began([BUDGET] * length, rng.normal(size=length) + correlated(rng, length, spread, correlation)) is not None
        for _ in range(lives)
    )
    assert alarms <= 0.05 * lives + 3 * math.sqrt(0.05 * 0.95 * lives)


@pytest.mark.parametrize("day", [0, 7, 90])
def test_a_gap_that_doubles_is_found_within_five_windows(day):
    rng = np.random.default_rng(day)
    delays = []
    for _ in range(40):
        gaps = [0.5 * BUDGET] * day + [2 * BUDGET] * 10
        found = began(gaps, rng.normal(size=len(gaps)))
        assert found is not None and found >= day
        delays.append(found - day + 1)
    assert np.quantile(delays, 0.95) <= 5


def test_evidence_is_a_supermartingale_where_windows_vary_as_they_say():
    # E[exp(log evidence)] stays at most 1 right at the budget, at every look: what the bound on alarms rests on.
    rng = np.random.default_rng(1)
    found = []
    for _ in range(400):
        told = promise(1e-9)  # never crossed
        found.append([math.exp(told.after(window(BUDGET, rng.normal())).log_evidence) for _ in range(12)])
    values = np.array(found)
    assert (values.mean(axis=0) <= 1 + 3 * values.std(axis=0) / math.sqrt(len(values))).all()


def test_a_broken_promise_is_kept_again_only_after_evidence_for_it():
    rng = np.random.default_rng(2)
    gaps = [0.3 * BUDGET] * 20 + [3 * BUDGET] * 10 + [0.2 * BUDGET] * 30
    told = promise()
    standings = [told.after(window(gap, rng.normal())) for gap in gaps]
    broke = [k for k, s in enumerate(standings) if s.began]
    mended = [k for k, s in enumerate(standings) if s.ended]
    assert len(broke) == len(mended) == 1
    assert 20 <= broke[0] < 25 and 30 < mended[0] < 60
    assert [s.in_breach for s in standings] == [broke[0] <= k < mended[0] for k in range(len(gaps))]
    assert standings[broke[0]].since >= 18
    assert standings[broke[0]].running.lower > BUDGET
    assert {s.epoch for s in standings[mended[0] + 1 :]} == {1}
    # The second stretch has a quarter of the rate, where the first had half.
    assert standings[-1].log_threshold == pytest.approx(-math.log(0.05 / 4))
    assert standings[0].log_threshold == pytest.approx(-math.log(0.05 / 2))


def test_windows_without_evidence_change_nothing():
    rng = np.random.default_rng(3)
    noise = rng.normal(size=30)
    plain, gaps = promise(), promise()
    for k, error in enumerate(noise):
        a = plain.after(window(BUDGET, error))
        if k % 3 == 0:
            gaps.after(NOTHING)
        b = gaps.after(window(BUDGET, error))
        assert (a.log_evidence, a.running, a.overdispersion) == (b.log_evidence, b.running, b.overdispersion)


def test_nothing_is_said_before_there_is_anything():
    standing = promise().after(NOTHING)
    assert (standing.log_evidence, standing.running.lower, standing.running.upper) == (0, -math.inf, math.inf)
    assert not standing.in_breach


@pytest.mark.parametrize("how", [{"num_units": 50, "power": 200.0}, {"carried_by": 1e-4, "power": 200.0}])
def test_few_units_cannot_break_a_promise(how):
    # A handful of examples that look terrible: the sums are far from normal, so they prove nothing.
    told = promise()
    assert not told.after(window(100 * BUDGET, **how)).began


def test_a_breach_that_was_told_stays_though_later_labels_weaken_it():
    told = promise()
    first = told.after(window(0.4 * BUDGET), is_known_breach=True)
    assert first.began and first.in_breach
    assert told.after(window(0.4 * BUDGET, power=1.0)).in_breach


def test_long_lives_stay_cheap_and_find_late_changes():
    rng = np.random.default_rng(4)
    gaps = [0.5 * BUDGET] * 1500 + [2 * BUDGET] * 8
    told = promise()
    standings = [told.after(window(gap, rng.normal())) for gap in gaps]
    assert not any(s.began for s in standings[:1500])
    assert any(s.began for s in standings[1500:1506])


def test_design_effects_of_windows_weaken_them():
    plain, weak = promise(), promise()
    evidence = window(1.5 * BUDGET)
    strong = plain.after(evidence)
    weaker = weak.after(Evidence(evidence.moments, design_effect=4.0))
    assert weaker.log_evidence < strong.log_evidence
    assert weaker.running.lower < strong.running.lower < strong.running.upper < weaker.running.upper
