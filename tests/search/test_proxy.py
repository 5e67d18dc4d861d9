"""The solver finds the front of the quadratic model, and says how far from it it can be."""

import numpy as np
import pytest

import lowprec.search.proxy as module
from lowprec.config import SpaceConfig
from lowprec.evaluation.profile import Profile, ProfileSums, columns_of
from lowprec.plan import Plan, Precision, Unit
from lowprec.search.proxy import build_proxy, solve_front
from lowprec.search.space import build_space


def problem(num_units, seed, **space):
    """Tables of random sizes whose errors are random vectors of growing length, correlated between tables."""
    rng = np.random.default_rng(seed)
    units = tuple(Unit(f"table:{k}", int(n), 16) for k, n in enumerate(rng.integers(10, 10_000, num_units)))
    columns = columns_of(units, Precision)
    length = np.array([{"fp16": 1e-4, "int8": 1e-3, "int4": 2e-2, "int2": 0.15}[p] for _, p in columns])
    shared = rng.normal(size=(1, 300))
    s = (
        length[:, None]
        * np.exp(rng.normal(0, 1, (len(columns), 1)))
        * (rng.normal(size=(len(columns), 300)) + 0.5 * shared)
    )
    first = s @ rng.normal(0, 0.3, 300)
    sums = ProfileSums(300, 300.0, 150.0, first, 0.2 * s @ s.T, 0.2 * s @ s.T)
    built = build_space(units, SpaceConfig.model_validate(space))
    return build_proxy(Profile(columns, (sums,)), built, cost=lambda u, p: built.size_of(u, p)), sums, columns


def gap_by_hand(plan, sums, columns):
    z = np.array([plan[unit] is p for unit, p in columns], dtype=float)
    return 100 * (z @ sums.first + 0.5 * z @ sums.second @ z) / sums.loss


def test_gaps_and_costs_are_those_of_the_definition():
    model, sums, columns = problem(5, 0, groups=[["table:1", "table:2"]], units=[{"match": "table:4", "fixed": "int8"}])
    rng = np.random.default_rng(1)
    picks = np.stack([rng.integers(0, n, 50) for n in model.num_choices], axis=1)
    for row, gap, cost in zip(picks, model.gaps(picks), model.costs(picks), strict=True):
        plan = model.plan(row)
        assert model.space.holds(plan)
        assert gap == pytest.approx(gap_by_hand(plan, sums, columns), rel=1e-4, abs=1e-6)
        assert cost == model.space.size_bytes(plan)
        np.testing.assert_array_equal(model.picks(plan), row)


def hypervolume(points, worst_cost, worst_gap):
    """Area between the front and the corner of the worst cost and gap."""
    area, ceiling = 0.0, worst_gap
    for cost, gap in sorted(points):
        if gap < ceiling:
            area += (worst_cost - cost) * (ceiling - gap)
            ceiling = gap
    return area


@pytest.mark.parametrize("seed", range(6))
def test_the_sweep_finds_nearly_the_exhaustive_front(seed, monkeypatch):
    model, _, _ = problem(6, seed)
    exact = solve_front(model)
    assert exact.is_exact and model.space.num_plans == 15_625
    monkeypatch.setattr(module, "MAX_EXHAUSTIVE", 0)
    swept = solve_front(model)
    assert not swept.is_exact
    corner = model.space.fp32_bytes, max(p.gap_pct for p in exact.points)
    areas = [hypervolume([(p.cost, p.gap_pct) for p in front.points], *corner) for front in (swept, exact)]
    assert areas[0] >= 0.995 * areas[1]


@pytest.mark.parametrize("seed", range(6))
def test_no_plan_undercuts_the_bound(seed, monkeypatch):
    model, _, _ = problem(6, seed)
    exact = solve_front(model)
    monkeypatch.setattr(module, "MAX_EXHAUSTIVE", 0)
    for point in solve_front(model).points:
        best = exact.cheapest_within(point.gap_pct)
        assert best is not None
        # gaps are scored in single precision
        assert point.cost_bound <= best.cost * (1 + 1e-6) <= point.cost * (1 + 2e-6)


def test_points_of_the_front_go_from_cheap_to_exact():
    model, _, _ = problem(26, 0)
    front = solve_front(model)
    costs, gaps = [p.cost for p in front.points], [p.gap_pct for p in front.points]
    assert costs == sorted(costs) and gaps == sorted(gaps, reverse=True)
    assert len(front.points) > 50
    inside = front.cheapest_within(0.01)
    assert inside is not None and inside.gap_pct <= 0.01
    assert front.cheapest_within(-1e9) is None


def test_everything_fixed_or_one_table():
    model, _, _ = problem(3, 0, precisions=["int8"])
    assert [p.plan for p in solve_front(model).points] == [Plan.uniform(model.space.units, Precision.INT8)]
    model, _, _ = problem(1, 0)
    assert 1 <= len(solve_front(model).points) <= 5


def test_shrunk_first_order_terms_take_the_place_of_the_raw_ones():
    model, sums, columns = problem(4, 0)
    space = model.space
    zero = build_proxy(Profile(columns, (sums,)), space, cost=lambda u, p: 1.0, first=np.zeros(len(columns)))
    assert (zero.first == 0).all() and (zero.second == model.second).all()
