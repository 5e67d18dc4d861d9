"""Confirmation: what is tried, what is told, and how often a plan that is over its budget is certified."""

import math

import numpy as np
import pytest

from lowprec.core.errors import ModelError
from lowprec.evaluation.metrics import PlanMetrics
from lowprec.evaluation.rows import RowAccount
from lowprec.evaluation.stats.confidence import Interval
from lowprec.plan import TABLE_PRECISIONS, Plan
from lowprec.search.confirm.alpha_spending import confidence_of_attempt
from lowprec.search.confirm.choice import LADDER, LATER_TRIES
from lowprec.search.confirm.confirm import Tries, confirm
from lowprec.search.record.trial import Trial
from lowprec.search.rule import Forecast

ROWS = RowAccount(1000, 0, 0, {})
CONFIDENCE = 0.95
# Both windows have as many examples.
FORECAST = Forecast(1.0, 1.0)


def plan_of(number):
    """A plan for every number."""
    return Plan({f"table:{k}": TABLE_PRECISIONS[number // 5**k % 5] for k in range(4)})


def metrics(gap, lower, upper, confidence=CONFIDENCE):
    return PlanMetrics(
        1000, 1000, 1000, gap, Interval(lower, upper), gap, Interval(lower, upper),
        0.8, 0.8, 0.7, 0.7, 0.0, 1.0, 1.0, confidence, 1000.0, (upper - lower) / 2,
    )  # fmt: skip


def trial(number, cost, gap, half=0.0, *, wave=0, found=None):
    m = found or metrics(gap, gap - half, gap + half)
    return Trial(f"k{number}", number, wave, "t", plan_of(number), int(cost), None, cost, None, m, None, ROWS)


class Window:
    """A confirm window on which plan n has the gap `gaps[n]`, and the calls made to it."""

    def __init__(self, gaps, half=0.0):
        self.gaps, self.half = gaps, half
        self.calls, self.notes = [], []

    def evaluate(self, chosen, confidence, attempt):
        self.calls.append(([t.number for t in chosen], confidence, attempt))
        done = []
        for t in chosen:
            gap = self.gaps[t.number]
            found = metrics(gap, gap - self.half, gap + self.half, confidence)
            done.append(trial(t.number, t.cost, gap, wave=attempt, found=found))
        return done

    def confirm(self, trials, budgets, found=(), num_spent=0, **options):
        tries = Tries(self.evaluate, confidence=CONFIDENCE, found=found, num_spent=num_spent)
        return confirm(trials, budgets, FORECAST, tries, note=self.notes.append, **options)


# Seven plans, cheaper and worse from the first on; for a budget of 1 the fourth is certified almost surely, the fifth
# with a probability of 0.85, the sixth of 0.53.
LADDER_OF_ONE = [trial(0, 900, 0.0), trial(1, 700, 0.08, 0.005), trial(2, 600, 0.2, 0.01)]
LADDER_OF_ONE += [trial(3, 500, 0.4, 0.06), trial(4, 400, 0.65, 0.11), trial(5, 300, 0.95, 0.028), trial(6, 200, 3.0)]


def tried(recommendation):
    return [(c.choice.trial.number, c.verdict, c.attempt) for c in recommendation.tried]


def test_the_boldest_of_the_finalists_is_recommended_where_all_are_certified():
    window = Window(dict.fromkeys(range(7), 0.5))
    (found,) = window.confirm(LADDER_OF_ONE, [1.0])
    assert tried(found) == [(3, "certified", 0), (4, "certified", 0), (5, "certified", 0)]
    assert found.best.choice.trial.number == 5 and found.best.metrics.gap_pct == 0.5 and found.budget_pct == 1.0
    ((numbers, confidence, attempt),) = window.calls  # evaluated together, on one reading of the window
    assert (sorted(numbers), attempt) == ([3, 4, 5], 0)
    assert confidence == confidence_of_attempt(CONFIDENCE, 0) > CONFIDENCE
    assert window.notes == []


def test_finalists_report_their_probability():
    (found,) = Window(dict.fromkeys(range(7), 0.5)).confirm(LADDER_OF_ONE, [1.0])
    probabilities = [c.choice.probability for c in found.tried]
    assert probabilities == [pytest.approx(p, abs=0.005) for p in (1.0, 0.853, 0.525)]
    assert ["over 99.9%" in c.choice.because for c in found.tried] == [True, False, False]
    assert "(estimated: 52.5%)" in found.tried[2].choice.because
    # On a window that was used before, bounds are at a stricter confidence.
    (later,) = Window(dict.fromkeys(range(7), 0.5)).confirm(LADDER_OF_ONE, [1.0], num_spent=1)
    assert [c.choice.trial.number for c in later.tried] == [3, 4]
    assert later.tried[1].choice.probability == pytest.approx(0.66, abs=0.01)


def test_testing_stops_at_the_first_that_is_not_certified_and_all_are_reported():
    window = Window({3: 0.5, 4: 2.0, 5: 0.5})
    (found,) = window.confirm(LADDER_OF_ONE, [1.0])
    assert tried(found) == [(3, "certified", 0), (4, "rejected", 0), (5, "certified", 0)]
    assert found.best.choice.trial.number == 3 and len(window.calls) == 1


def test_where_all_fail_safer_plans_are_tried_one_by_one_at_stricter_confidence():
    window = Window({k: 2.0 for k in range(7)} | {1: 0.5})
    (found,) = window.confirm(LADDER_OF_ONE, [1.0])
    assert [numbers for numbers, _, _ in window.calls] == [[5, 4, 3], [2], [1]] or [
        sorted(numbers) for numbers, _, _ in window.calls
    ] == [[3, 4, 5], [2], [1]]
    confidences = [confidence for _, confidence, _ in window.calls]
    assert confidences == sorted(confidences) and len(set(confidences)) == 3
    assert sum(1 - c for c in confidences) < 1 - CONFIDENCE
    assert [verdict for _, verdict, _ in tried(found)] == ["rejected"] * 4 + ["certified"]
    assert [attempt for _, _, attempt in tried(found)] == [0, 0, 0, 1, 2]
    assert found.best.choice.trial.number == 1 and found.best.verdict == "certified" and found.best.attempt == 2
    assert len(window.notes) == 2 and all("trying a safer one at" in note for note in window.notes)
    assert f"{100 * confidences[1]:.5g} percent" in window.notes[0]


def test_a_plan_that_fails_is_reported_as_failed_and_the_safest_is_kept():
    window = Window(dict.fromkeys(range(7), 2.0), half=1.5)
    (found,) = window.confirm(LADDER_OF_ONE, [1.0])
    assert found.best is found.tried[0] and found.best.verdict == "inconclusive"
    assert found.best.choice.trial.number == 3 and found.best.metrics.gap_pct == 2.0
    # The tries end; plans too bold for a later one are not tried.
    assert len(window.calls) == 1 + len(LATER_TRIES)
    assert [n for n, _, _ in tried(found)] == [3, 4, 5, 2, 1]


def test_without_a_safer_plan_there_is_no_later_try():
    window = Window({4: 2.0, 5: 2.0})
    (found,) = window.confirm(LADDER_OF_ONE[4:], [1.0])
    assert tried(found) == [(4, "rejected", 0), (5, "rejected", 0)] and len(window.calls) == 1


def test_a_budget_that_nobody_meets_is_said():
    window = Window({5: 0.95, 6: 3.0})
    (found,) = window.confirm(LADDER_OF_ONE[5:], [0.1])
    assert tried(found) == [(5, "rejected", 0)] and not found.best.choice.meets_budget
    assert "no plan meets the budget of 0.1 percent" in window.notes


def test_a_plan_that_saves_nothing_is_no_success():
    """All fp32, or no cheaper than that by the cost that was minimised."""
    window = Window({0: 0.0})
    (found,) = window.confirm(LADDER_OF_ONE[:1], [1.0], reference_cost=900.0)
    assert found.best.verdict == "certified" and found.verdict == "inconclusive" and not found.saves
    assert any("saves nothing" in note for note in window.notes)
    (cheaper,) = Window({0: 0.0}).confirm(LADDER_OF_ONE[:1], [1.0], reference_cost=901.0)
    assert cheaper.saves and cheaper.verdict == "certified"


def test_tries_of_other_runs_on_the_window_have_spent_their_part():
    """All tries of all runs together keep the error rate."""
    spent = [Window(dict.fromkeys(range(7), 0.5)) for _ in range(4)]
    for num_spent, window in enumerate(spent):
        window.confirm(LADDER_OF_ONE, [1.0], num_spent=num_spent)
    tries = [window.calls[0] for window in spent]
    assert [attempt for _, _, attempt in tries] == [0, 1, 2, 3]
    assert [confidence for _, confidence, _ in tries] == [confidence_of_attempt(CONFIDENCE, k) for k in range(4)]
    assert sum(1 - confidence for _, confidence, _ in tries) < 1 - CONFIDENCE
    assert spent[0].notes == [] and "was used 3 times before" in spent[3].notes[0] and "newer" in spent[3].notes[0]


def test_later_tries_go_on_from_what_other_runs_have_spent():
    window = Window({k: 2.0 for k in range(7)} | {1: 0.5})
    (found,) = window.confirm(LADDER_OF_ONE, [1.0], num_spent=2)
    assert [attempt for _, _, attempt in window.calls] == [2, 3, 4]
    assert found.best.choice.trial.number == 1 and found.best.attempt == 4


def test_a_resumed_run_tries_what_it_would_have_tried():
    """Another run may have used the window in the meantime."""
    world = {k: 2.0 for k in range(7)} | {1: 0.5}
    window = Window(world)
    window.confirm(LADDER_OF_ONE, [1.0], num_spent=1)
    first = Window(world).evaluate([LADDER_OF_ONE[k] for k in (3, 4, 5)], 0.99, 1)
    resumed = Window(world)
    (found,) = resumed.confirm(LADDER_OF_ONE, [1.0], found=first, num_spent=4)
    assert [numbers for numbers, _, _ in resumed.calls] == [numbers for numbers, _, _ in window.calls[1:]]
    assert [attempt for _, _, attempt in resumed.calls] == [4, 5]
    assert found.best.choice.trial.number == 1


def test_without_a_finite_gap_there_is_nothing_to_recommend():
    broken = trial(0, 100, math.nan)
    window = Window({})
    with pytest.raises(ModelError, match="no plan gives finite logits"):
        window.confirm([broken], [1.0])
    assert not window.calls


def test_several_budgets_share_one_evaluation_and_keep_their_own_verdicts():
    trials = [trial(k, 1000 - 100 * k, gap) for k, gap in enumerate((0.0, 0.08, 0.2, 0.4, 0.65, 0.95, 1.9))]
    window = Window({k: gap for k, gap in enumerate((0.0, 0.08, 0.2, 0.4, 0.65, 0.95, 1.9))})
    found = window.confirm(trials, [0.2, 1.0, 2.0])
    assert [r.budget_pct for r in found] == [0.2, 1.0, 2.0]
    assert [r.best.choice.trial.number for r in found] == [2, 5, 6]
    ((numbers, _, _),) = window.calls
    assert sorted(numbers) == [2, 5, 6]
    for recommendation in found:
        costs = [c.choice.trial.cost for c in recommendation.tried]
        assert costs == sorted(costs, reverse=True)  # safest first
        assert all(c.verdict == "certified" for c in recommendation.tried)


def test_one_budget_may_fail_alone():
    trials = [trial(k, 1000 - 100 * k, gap) for k, gap in enumerate((0.0, 0.02, 0.2, 0.4, 0.65, 0.95))]
    window = Window({0: 0.0, 1: 0.02, 2: 0.3, 3: 0.4, 4: 0.65, 5: 0.95})
    tight, loose = window.confirm(trials, [0.3, 1.0])
    assert (loose.best.choice.trial.number, loose.best.verdict) == (5, "certified")
    assert all(attempt == 0 for _, _, attempt in tried(loose))
    assert tight.best.verdict == "certified" and tight.best.choice.trial.number in (1, 2)


def test_after_a_resumption_what_was_confirmed_is_not_read_again():
    first = Window({k: 2.0 for k in range(7)} | {1: 0.5})
    (before,) = first.confirm(LADDER_OF_ONE, [1.0])
    found = [
        trial(c.choice.trial.number, c.choice.trial.cost, c.metrics.gap_pct, wave=c.attempt, found=c.metrics)
        for c in before.tried
    ]
    again = Window({})
    assert again.confirm(LADDER_OF_ONE, [1.0], found) == [before]
    assert again.calls == [] and again.notes == []


def test_after_a_kill_between_tries_the_rest_is_done_as_it_would_have_been():
    gaps = {k: 2.0 for k in range(7)} | {1: 0.5}
    whole = Window(gaps)
    expected = whole.confirm(LADDER_OF_ONE, [1.0])
    done = [t for t in Window(gaps).evaluate([LADDER_OF_ONE[k] for k in (3, 4, 5)], *whole.calls[0][1:])]
    rest = Window(gaps)
    assert rest.confirm(LADDER_OF_ONE, [1.0], done) == expected
    assert rest.calls == whole.calls[1:]


def test_new_finalists_of_a_continued_run_are_held_to_a_stricter_level():
    first = Window(dict.fromkeys(range(7), 0.5))
    first.confirm(LADDER_OF_ONE, [1.0])
    done = [t for t in Window(dict.fromkeys(range(7), 0.5)).evaluate(LADDER_OF_ONE[3:6], *first.calls[0][1:])]
    better = trial(7, 250, 0.9)
    second = Window({7: 0.5})
    (found,) = second.confirm([*LADDER_OF_ONE, better], [1.0], done)
    assert second.calls == [([7], confidence_of_attempt(CONFIDENCE, 1), 1)]
    assert found.best.choice.trial.number == 7 and found.best.attempt == 1
    assert "were confirmed on the same window before" in second.notes[0]


def test_all_tries_together_keep_the_confidence():
    assert sum(1 - confidence_of_attempt(0.9, k) for k in range(50)) <= 0.1 + 1e-12
    levels = [confidence_of_attempt(0.9, k) for k in range(5)]
    assert levels == sorted(set(levels))


def false_rates(trials, budgets, true_gap, *, alpha, runs, seed):
    """How often each budget ends with a certificate for a plan whose true gap is `true_gap`.

    Estimates are normal around it, and a plan is certified at the rate that a test of one look may have.
    """
    from statistics import NormalDist

    rng, wrong = np.random.default_rng(seed), np.zeros(len(budgets))
    for _ in range(runs):
        noise = rng.normal(size=len(trials))

        def evaluate(chosen, confidence, attempt, noise=noise):
            half = NormalDist().inv_cdf(confidence)
            done = []
            for t in chosen:
                gap = true_gap + noise[t.number]
                found = metrics(gap, gap - half, gap + half, confidence)
                done.append(trial(t.number, t.cost, gap, wave=attempt, found=found))
            return done

        found = confirm(trials, budgets, FORECAST, Tries(evaluate, confidence=1 - alpha), note=lambda _: None)
        wrong += [r.best.verdict == "certified" and true_gap >= r.budget_pct for r in found]
    return wrong / runs


def test_over_all_finalists_and_tries_plans_at_the_budget_are_certified_at_the_rate_of_one_test():
    alpha, runs = 0.2, 3000
    (rate,) = false_rates(LADDER_OF_ONE, [1.0], 1.0, alpha=alpha, runs=runs, seed=0)
    assert rate <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)
    assert rate > alpha / 2  # it can be seen that the tests are made
    assert len(LADDER) == 4 and len(LATER_TRIES) == 2


def test_several_budgets_keep_the_rate_of_each():
    """The finalist of a tight budget is the later try of a loose one, whose error rate it must not use up twice."""
    alpha, runs = 0.2, 3000
    trials = [*LADDER_OF_ONE]
    rates = false_rates(trials, [0.2, 1.0], 1.0, alpha=alpha, runs=runs, seed=1)
    assert rates[1] <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)
