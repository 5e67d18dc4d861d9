"""The solver finds the front of the quadratic model, keeps limits, and says how far from the optimum it can be."""

import numpy as np
import pytest

import lowprec.search.surrogate.bound as bound_module
import lowprec.search.surrogate.front_solver as sweep_module
import lowprec.search.surrogate.proxy as proxy_module
from lowprec.config import SpaceConfig
from lowprec.core.errors import ConfigError
from lowprec.plan import TABLE_PRECISIONS, Plan, Precision, Unit
from lowprec.search.space.space import build_space
from lowprec.search.surrogate.bound import cost_bounds
from lowprec.search.surrogate.front_solver import solve_front
from lowprec.search.surrogate.local_search import PlanFront
from lowprec.search.surrogate.proxy import build_proxy
from lowprec.session.costs import Limit

LENGTH = {"fp16": 1e-4, "int8": 1e-3, "int4": 2e-2, "int2": 0.15}


def parts(num_units, seed, dtype=np.float64, **space):
    """Tables of random sizes whose errors are random vectors of growing length, correlated between tables."""
    rng = np.random.default_rng(seed)
    units = tuple(Unit(f"table:{k}", int(n), 16) for k, n in enumerate(rng.integers(10, 10_000, num_units)))
    columns = tuple((unit.name, p) for unit in units for p in TABLE_PRECISIONS if p is not Precision.FP32)
    length = np.array([LENGTH[p] for _, p in columns]) * np.exp(rng.normal(0, 1, len(columns)))
    s = length[:, None] * (rng.normal(size=(len(columns), 300)) + 0.5 * rng.normal(size=(1, 300)))
    first, second = s @ rng.normal(0, 0.2, 300), (0.15 * s @ s.T).astype(dtype)
    return build_space(units, SpaceConfig.model_validate(space)), columns, first, second


def build(space, columns, first, second, limits=()):
    return build_proxy(space, columns, first, second, cost=space.size_of, limits=limits)


def problem(num_units, seed, limits=(), **space):
    return build(*parts(num_units, seed, **space), limits=limits)


def latency(num_units, seed, fraction, name="latency"):
    """A limit that has nothing to do with bytes, at a fraction of the way from the least to the most of it."""
    rng = np.random.default_rng([seed, 99])
    of = {(f"table:{k}", p): float(rng.uniform(0.3, 3)) for k in range(num_units) for p in TABLE_PRECISIONS}
    ends = [sum(end(of[f"table:{k}", p] for p in TABLE_PRECISIONS) for k in range(num_units)) for end in (min, max)]
    return Limit(name, lambda unit, p: of[unit, p], ends[0] + fraction * (ends[1] - ends[0]))


@pytest.fixture
def both(monkeypatch):
    """The exact front of a model, and the one of the sweep."""

    def solve(model):
        assert model.space.num_plans <= 200_000
        exact = solve_front(model)
        with monkeypatch.context() as patch:
            patch.setattr(sweep_module, "MAX_EXHAUSTIVE", 0)
            swept = solve_front(model)
        assert exact.is_exact and not swept.is_exact
        return exact, swept

    return solve


def hypervolume(points, worst_cost, worst_gap):
    """Area between the front and the corner of the worst cost and gap."""
    area, ceiling = 0.0, worst_gap
    for cost, gap in sorted(points):
        if gap < ceiling:
            area += (worst_cost - cost) * (ceiling - gap)
            ceiling = gap
    return area


def hypervolume_ratio(model, exact, swept):
    corner = model.space.fp32_bytes * 1.01, max(p.gap_pct for p in exact.points) + 1e-9
    areas = [hypervolume([(p.cost, p.gap_pct) for p in front.points], *corner) for front in (swept, exact)]
    return areas[0] / areas[1]


def assert_consistent(model, front):
    """Points are what the model says of their plans, keep the limits, and none beats another."""
    picks = np.array([list(p.picks) for p in front.points])
    gaps = [p.gap_pct for p in front.points]
    np.testing.assert_allclose(gaps, model.gaps(picks), rtol=0, atol=1e-9 * (np.abs(model.own).max() or 1))
    np.testing.assert_allclose([p.cost for p in front.points], model.costs(picks), rtol=1e-12)
    assert (model.usages(picks) <= model.at_most[:, None]).all()
    assert all(model.space.holds(p.plan) for p in front.points[:: max(1, len(picks) // 20)])
    costs = [p.cost for p in front.points]
    assert costs == sorted(set(costs)) and gaps == sorted(set(gaps), reverse=True)


def assert_valid_bounds(model, exact, front):
    """No bound is above what a plan reaches, before it is cut off at the cost of its own point."""
    for points in (exact.points, front.points):
        cost, gap = np.array([[p.cost, p.gap_pct] for p in points]).T
        plans = PlanFront.of(model, cost, gap, np.array([list(p.picks) for p in points], dtype=np.uint8))
        for bound, reached in zip(cost_bounds(model, plans), plans.gap, strict=True):
            best = exact.cheapest_within(reached + 1e-9 * max(1, abs(reached)))
            assert bound <= best.cost + 1e-9 * model.cost.sum()
    assert all(p.cost_bound <= p.cost for p in front.points)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("max_bytes", [400_000_000, 0])
def test_gaps_and_costs_are_those_of_the_definition(dtype, max_bytes, monkeypatch):
    monkeypatch.setattr(proxy_module, "MAX_DOUBLE_BYTES", max_bytes)
    groups = {"groups": [["table:1", "table:2"]], "units": [{"match": "table:4", "fixed": "int8"}]}
    space, columns, first, second = parts(5, 0, dtype, **groups)
    model = build(space, columns, first, second)
    assert model.second.dtype == (np.float64 if max_bytes else np.float32) and model.second.flags.c_contiguous
    rng = np.random.default_rng(1)
    picks = np.stack([rng.integers(0, n, 5_000) for n in model.num_choices], axis=1)
    largest = float(max(np.abs(first).max(), np.abs(second).max()))
    for row, gap, cost in zip(picks[::100], model.gaps(picks)[::100], model.costs(picks)[::100], strict=True):
        plan = model.plan(row)
        z = np.array([plan[unit] is p for unit, p in columns], dtype=float)
        assert model.space.holds(plan)
        assert gap == pytest.approx(z @ first + 0.5 * z @ second.astype(float) @ z, rel=0, abs=1e-6 * largest)
        assert cost == model.space.size_bytes(plan)
        np.testing.assert_array_equal(model.picks(plan), row)


def test_only_the_symmetric_part_counts_and_the_order_of_columns_does_not():
    space, columns, first, second = parts(4, 0)
    model = build(space, columns, first, second)
    skew = np.random.default_rng(0).normal(size=second.shape)
    order = np.random.default_rng(1).permutation(len(columns))
    mixed = (second + skew - skew.T)[np.ix_(order, order)]
    other = build(space, tuple(columns[k] for k in order), first[order], mixed)
    np.testing.assert_allclose(other.second, model.second, atol=1e-12)
    np.testing.assert_array_equal(other.first, model.first)


def test_what_the_space_needs_must_be_there_and_more_does_no_harm():
    space, columns, first, second = parts(3, 0, precisions=["fp32", "int8"])
    assert len(build(space, columns, first, second).first) == 6
    few = [k for k, key in enumerate(columns) if key != ("table:1", Precision.INT8)]
    with pytest.raises(ConfigError, match=r"table:1 may be int8.*no statistics"):
        build(space, tuple(columns[k] for k in few), first[few], second[np.ix_(few, few)])
    with pytest.raises(ConfigError, match=r"12 columns need"):
        build(space, columns, first[:-1], second)
    second[3, 4] = np.nan
    with pytest.raises(ConfigError, match="NaN"):
        build(space, columns, first, second)


@pytest.mark.parametrize("seed", range(6))
def test_the_sweep_finds_nearly_the_exhaustive_front(seed, both):
    model = problem(6, seed)
    assert model.space.num_plans == 15_625
    exact, swept = both(model)
    assert_consistent(model, exact)
    assert_consistent(model, swept)
    assert hypervolume_ratio(model, exact, swept) >= 0.995
    assert exact.worst_distance == 0.0 < swept.worst_distance
    assert_valid_bounds(model, exact, swept)


@pytest.mark.parametrize("seed", range(12))
def test_limits_are_kept_and_the_front_under_them_is_found(seed, both):
    fraction = (0.03, 0.1, 0.3, 0.5)[seed % 4]
    limits = [latency(6, seed, fraction)] + [latency(6, seed + 1000, 0.6, "energy")] * (seed >= 8)
    model = problem(6, seed, limits)
    exact, swept = both(model)
    free, _ = both(problem(6, seed))
    if exact.infeasible:
        assert swept.infeasible and not swept.points
        return
    assert_consistent(model, swept)
    # the limit binds: without it the front is another
    assert {p.picks for p in exact.points} != {p.picks for p in free.points}
    assert hypervolume_ratio(model, exact, swept) >= 0.995
    assert swept.points[0].cost == exact.points[0].cost
    assert_valid_bounds(model, exact, swept)


@pytest.mark.parametrize("seed", [0, 3, 4, 7])
def test_tight_limits_of_a_larger_space_are_met_close_to_the_optimum(seed):
    """Tight: not one of 20,000 random plans keeps them."""
    limits = [latency(26, seed, 0.1)] if seed else [latency(26, seed, 0.25), latency(26, seed + 1000, 0.25, "energy")]
    model = problem(26, seed, limits)
    rng = np.random.default_rng(seed)
    picks = np.stack([rng.integers(0, n, 20_000) for n in model.num_choices], axis=1)
    assert not (model.usages(picks) <= model.at_most[:, None]).all(axis=0).any()
    front = solve_front(model)
    assert_consistent(model, front)
    assert front.infeasible is None and front.points[0].distance < 0.045


def test_limits_that_no_plan_keeps_are_named_with_what_can_be_reached(both):
    for front in both(problem(4, 0, [latency(4, 0, 0.5), Limit("bytes", lambda u, p: 1.0, 3.0)])):
        assert not front.points and front.cheapest_within(1e9) is None and front.worst_distance == 0.0
        assert 'limit "bytes": no plan' in front.infeasible and "reaches is 4" in front.infeasible
    # each can be kept alone
    opposed = [Limit("bits", lambda u, p: p.bits, 8.0), Limit("loss", lambda u, p: -p.bits, -128.0)]
    exact, swept = both(problem(4, 0, opposed))
    assert "no plan of the space keeps" in exact.infeasible and "no plan was found" in swept.infeasible
    assert all('"bits" and "loss"' in f.infeasible and not f.points for f in (exact, swept))
    assert all(front.infeasible is None for front in both(problem(4, 0, [Limit("bits", lambda u, p: p.bits, 8.0)])))


@pytest.mark.parametrize("seed", range(4))
def test_bounds_hold_for_every_kind_of_second_order_matrix(seed, both, monkeypatch):
    space, columns, first, second = parts(5, seed)
    rng = np.random.default_rng(seed)
    scale = np.sqrt(np.diagonal(second))
    noise = rng.normal(size=second.shape) * np.outer(scale, scale)
    noise += noise.T
    same = [[unit == other for other, _ in columns] for unit, _ in columns]
    for changed in (second, noise, second + 0.3 * noise, -second, np.where(same, 0.0, noise)):
        model = build(space, columns, first, changed)
        exact, swept = both(model)
        assert_valid_bounds(model, exact, swept)
    # too large for a spectrum: taken to be positive semidefinite
    monkeypatch.setattr(bound_module, "MAX_SPECTRUM", 0)
    monkeypatch.setattr(proxy_module, "MAX_DOUBLE_BYTES", 0)
    model = build(space, columns, first, second, [latency(5, seed, 0.2)])
    exact, swept = both(model)
    assert_valid_bounds(model, exact, swept)


def test_points_of_a_larger_front_go_from_cheap_to_exact():
    model = problem(26, 0)
    front = solve_front(model)
    assert_consistent(model, front)
    assert len(front.points) > 50 and not front.is_exact and front.infeasible is None
    inside = front.cheapest_within(0.01)
    assert inside is not None and inside.gap_pct <= 0.01
    assert np.median([p.distance for p in front.points]) < 0.05
    assert front.cheapest_within(-1e9) is None


def test_a_huge_front_is_thinned_to_points_that_keep_nearly_all_of_it(monkeypatch):
    model = problem(26, 0)
    whole = solve_front(model)
    monkeypatch.setattr("lowprec.search.surrogate.local_search.MAX_POINTS", 200)
    thin = solve_front(model)
    assert_consistent(model, thin)
    assert len(thin.points) <= 202 < len(whole.points)
    assert hypervolume_ratio(model, whole, thin) >= 0.98
    assert [thin.points[k].cost for k in (0, -1)] == pytest.approx([whole.points[k].cost for k in (0, -1)], rel=0.02)


def test_everything_fixed_or_one_table(both):
    for front in both(problem(3, 0, precisions=["int8"])):
        assert [p.plan for p in front.points] == [Plan.uniform(front.points[0].model.space.units, Precision.INT8)]
    model = problem(1, 0)
    exact, swept = both(model)
    assert 1 <= len(exact.points) <= 5 and [p.picks for p in swept.points] == [p.picks for p in exact.points]


def test_units_fixed_beside_free_ones_are_scored_with_them(both):
    model = problem(7, 3, groups=[["table:0", "table:6"]], units=[{"match": "table:[234]", "fixed": "int4"}])
    exact, swept = both(model)
    for front in (exact, swept):
        assert_consistent(model, front)
        assert {p.plan["table:3"] for p in front.points} == {Precision.INT4}
    assert [p.picks for p in swept.points] == [p.picks for p in exact.points]


def test_of_identical_precisions_the_cheaper_is_taken(both):
    space, columns, first, second = parts(4, 1)
    same = [columns.index((unit, {"int4": Precision.INT8}.get(p, p))) for unit, p in columns]
    for front in both(build(space, columns, first[same], second[np.ix_(same, same)])):
        assert not any(p is Precision.INT8 for point in front.points for p in point.plan.values())


def test_a_unit_that_is_never_looked_up_is_as_cheap_as_can_be(both):
    space, columns, first, second = parts(4, 2)
    seen = np.array([unit != "table:2" for unit, _ in columns], dtype=float)
    model = build(space, columns, first * seen, second * np.outer(seen, seen))
    exact, swept = both(model)
    assert {p.plan["table:2"] for f in (exact, swept) for p in f.points} == {Precision.INT2}
    assert hypervolume_ratio(model, exact, swept) >= 0.995


def test_without_second_order_terms_or_with_gains_only(both):
    space, columns, first, second = parts(5, 3)
    for model in (build(space, columns, np.abs(first), 0 * second), build(space, columns, -np.abs(first), second)):
        exact, swept = both(model)
        assert_consistent(model, swept)
        assert hypervolume_ratio(model, exact, swept) >= 0.995
        assert_valid_bounds(model, exact, swept)
    # where low precision only ever helps, and nothing curves: one best plan, known to be so
    gains = {Precision.FP16: -1.0, Precision.INT8: -2.0, Precision.INT4: -3.0, Precision.INT2: -4.0}
    for front in both(build(space, columns, np.array([gains[p] for _, p in columns]), 0 * second)):
        assert [p.plan for p in front.points] == [space.cheapest] and front.worst_distance == 0.0
    for front in both(build(space, columns, 0 * first, 0 * second)):
        assert [(p.plan, p.gap_pct) for p in front.points] == [(space.cheapest, 0.0)]
