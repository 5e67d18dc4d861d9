"""What is normal between the windows of a deployment: users who come and go do not warn, a real change does."""

import json
import math

import numpy as np
import pytest

from lowprec.monitor.inputs.counts import Inputs, Touched
from lowprec.monitor.inputs.drift import DriftRule, Novelty, feature_drift
from lowprec.monitor.inputs.normal_drift import MIN_STEPS, NAMED_FOR, History, InputSketch, sketches_of
from lowprec.traffic import Schema, SparseFeature

RULE = DriftRule(false_discovery_rate=0.01, min_distance=0.1)
NUM_IDS, NUM_BLOCKS = 1000, 20
SCHEMA = Schema(
    label="l",
    dense=("x",),
    sparse=(SparseFeature("user", "user", NUM_IDS), SparseFeature("item", "item", NUM_IDS)),
)


class Traffic:
    """Days of a log: each user is replaced by a new one with some probability a day; items and a dense value stay."""

    def __init__(self, seed, turnover, days_of_week=False):
        self.rng = np.random.default_rng(seed)
        self.turnover, self.days_of_week = turnover, days_of_week
        self.users = self.rng.choice(NUM_IDS, 200, replace=False)
        self.items = self.rng.dirichlet(np.full(NUM_IDS, 0.3))
        self.weekend = self.rng.dirichlet(np.full(NUM_IDS, 0.3))
        self.dense = self.rng.dirichlet(np.full(30, 2.0))
        self.day = 0

    def window(self, **changed):
        """The inputs of the next day; `changed` gives other shares of a feature."""
        inputs = Inputs(SCHEMA, NUM_BLOCKS)
        leaving = self.rng.random(len(self.users)) < self.turnover
        self.users = np.where(leaving, self.rng.choice(NUM_IDS, len(self.users)), self.users)
        users = np.bincount(self.users, minlength=NUM_IDS) / len(self.users)
        items = self.weekend if self.days_of_week and self.day % 7 >= 5 else self.items
        for name, shares in {"user": users, "item": items, **changed}.items():
            alike = self.rng.dirichlet(2000 * shares + 1e-6, NUM_BLOCKS)
            inputs.coarse[name] += np.array([self.rng.multinomial(500, p) for p in alike])
        inputs.histograms["x"][:, 300:330] += np.array(
            [self.rng.multinomial(500, self.dense) for _ in range(NUM_BLOCKS)]
        )
        self.day += 1
        return inputs


def named(windows, certified, rule=RULE):
    """The features that each window names, judged one after the other with the rows of those before it."""
    rows, found = [], []
    novelty = Novelty(certified, {f.name: Touched(NUM_IDS) for f in SCHEMA.sparse}, {})
    for now in windows:
        drift = feature_drift(certified, now, novelty, rule, History(rows, certified))
        sketches = {name: sketch.to_list() for name, sketch in sketches_of(now).items()}
        rows.append(json.dumps({"features": [f.to_dict() for f in drift], "sketches": sketches}))
        found.append({f.feature for f in drift if f.is_warning})
    return found


def test_users_who_come_and_go_stop_to_warn_after_a_few_windows():
    """Over eight deployments of twenty days, at several rates of turnover."""
    late = early = 0
    for seed in range(8):
        traffic = Traffic(seed, turnover=(0.05, 0.2, 0.5, 1.0)[seed % 4])
        certified = traffic.window()
        found = named([traffic.window() for _ in range(20)], certified)
        early += sum("user" in names for names in found[: MIN_STEPS + 1])
        late += sum(bool(names) for names in found[MIN_STEPS + 1 :])
    assert early >= 16  # by the distance from the certified window alone
    assert late == 0


def test_seasons_of_a_week_are_normal_from_the_second_one_on():
    traffic = Traffic(1, turnover=0.3, days_of_week=True)
    certified = traffic.window()
    found = named([traffic.window() for _ in range(16)], certified)
    assert "item" in found[4]  # the first weekend
    assert not any(found[7:])


@pytest.mark.parametrize("turnover", [0.0, 0.3])
def test_a_change_is_named_when_it_comes_and_for_as_long_as_it_is_new(turnover):
    for seed in range(3):
        traffic = Traffic(seed, turnover)
        certified = traffic.window()
        other = 0.6 * traffic.items + 0.4 * np.roll(traffic.items[::-1], 17)
        days = [traffic.window() for _ in range(8)]
        days += [traffic.window(item=other) for _ in range(8)]
        found = named(days, certified)
        assert [k for k, names in enumerate(found) if "item" in names] == [8 + k for k in range(NAMED_FOR)]
        assert not any("user" in names for names in found[MIN_STEPS + 1 :])


def test_a_change_of_a_feature_that_moves_anyway_is_named():
    traffic = Traffic(3, turnover=0.2)
    certified = traffic.window()
    garbage = np.zeros(NUM_IDS)
    garbage[:3] = 1 / 3
    days = [*(traffic.window() for _ in range(10)), traffic.window(user=garbage), *(traffic.window() for _ in range(5))]
    found = named(days, certified)
    assert [k for k, names in enumerate(found[MIN_STEPS + 1 :], MIN_STEPS + 1) if "user" in names] == [10]


def test_a_change_before_the_first_window_is_named():
    """Without history: silence would take it for normal."""
    traffic = Traffic(4, turnover=0.0)
    certified = traffic.window()
    other = traffic.items[::-1]
    found = named([traffic.window(item=other) for _ in range(10)], certified)
    assert ["item" in names for names in found] == [True] * (MIN_STEPS + 1) + [False] * (9 - MIN_STEPS)


def test_features_that_are_expected_to_move_are_never_named():
    traffic = Traffic(5, turnover=1.0)
    certified = traffic.window()
    days = [traffic.window() for _ in range(6)]
    assert any("user" in names for names in named(days, certified))
    assert not any(named(days, certified, DriftRule(0.01, 0.1, frozenset({"user"}))))


def test_sketches_have_the_hellinger_distance():
    rng = np.random.default_rng(6)
    errors = []
    for _ in range(50):
        p, q = rng.dirichlet(np.full(500, 0.5), 2)
        a, b = rng.multinomial(200_000, p), rng.multinomial(100_000, q)
        exact = math.sqrt(((np.sqrt(p) - np.sqrt(q)) ** 2).sum() / 2)
        errors.append(InputSketch.of(a).distance(InputSketch.of(b)) / exact - 1)
    assert abs(np.mean(errors)) < 0.05 and np.std(errors) < 0.12
    alike = [
        InputSketch.of(rng.multinomial(n, p)).distance(InputSketch.of(rng.multinomial(5000, p))) for n in (3000, 50_000)
    ]
    assert max(alike) < 0.1
    empty = InputSketch.of(np.zeros(500, np.int64))
    assert math.isnan(empty.distance(InputSketch.of(a))) and empty.num_used == 0


def test_a_sketch_comes_back_the_same_from_a_row():
    sketch = InputSketch.of(np.random.default_rng(7).multinomial(1000, np.full(50, 0.02)))
    again = InputSketch.from_list(json.loads(json.dumps(sketch.to_list())))
    assert np.array_equal(again.code, sketch.code)
    assert (again.num_counts, again.num_used) == (sketch.num_counts, sketch.num_used)
    # The same on every machine: what is kept today is compared with what is made tomorrow.
    assert InputSketch.of(np.array([0, 4, 0, 0], np.int64)).code.tolist()[:8] == [1, -1, -1, -1, -1, -1, 1, 1]
