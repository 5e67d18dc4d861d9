"""Every row has a place, no worker is overfull, and the same question gets the same answer."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.core.errors import ConfigError
from lowprec.shards.planner import Placement, Shard, TableLoad, place_tables

GB = 10**9


def zipf(num=64, exponent=1.2):
    shares = [1 / (k + 1) ** exponent for k in range(num)]
    return tuple(share / sum(shares) for share in shares)


def check(placement: Placement, *, joined: bool = True) -> None:
    for table in placement.tables:
        shards = placement.shards_of.get(table.name, ())
        assert (table.name in placement.replicated) != bool(shards)
        rows = [0, *(shard.end_row for shard in shards)]
        assert [shard.first_row for shard in shards] == rows[:-1] and rows[-1] in (0, table.num_rows)
        assert all(shard.num_rows > 0 and 0 <= shard.worker < placement.num_workers for shard in shards)
        neighbours = [(one.worker, other.worker) for one, other in pairwise(shards)]
        assert not joined or all(one != other for one, other in neighbours), "neighbours are one shard"
    for held, capacity in zip(placement.held_bytes, placement.capacities, strict=True):
        assert held <= capacity
    assert math.isclose(sum(placement.lookups), sum(table.ids for table in placement.tables), abs_tol=1e-9)


@st.composite
def tables(draw):
    return [
        TableLoad(
            f"t{k}",
            draw(st.integers(1, 100_000)),
            draw(st.sampled_from([1, 16, 64])),
            ids=draw(st.floats(0, 50)),
            bags=draw(st.sampled_from([0, 1, 3])),
            lookups=draw(st.sampled_from([(), zipf(), tuple(reversed(zipf())), (0.0, 1.0), (1.0, 0.0)])),
            row_overhead=draw(st.sampled_from([0, 12])),
        )
        for k in range(draw(st.integers(1, 12)))
    ]


@settings(max_examples=300)
@given(
    tables=tables(), shares=st.lists(st.floats(0.05, 1), min_size=1, max_size=9), fill=st.sampled_from([0.3, 0.9, 1.0])
)
def test_what_fits_is_placed(tables, shares, fill):
    needed = sum(table.num_bytes for table in tables)
    # Where rows are wide and workers many, up to a row of each worker's memory is of no use.
    lost = len(shares) * max(table.row_bytes for table in tables)
    capacities = [math.ceil((needed + lost) / fill * share / sum(shares)) + lost for share in shares]
    placement = place_tables(tables, capacities)
    check(placement)
    assert placement == place_tables(tables, capacities)
    assert placement.shards == place_tables(list(reversed(tables)), capacities).shards


def test_a_table_over_three_workers():
    placement = place_tables([TableLoad("large", 3_000_000, 64), TableLoad("small", 1000, 64)], [300_000_000] * 3)
    check(placement)
    assert placement.replicated == ("small",)
    assert sorted(shard.worker for shard in placement.shards) == [0, 1, 2]
    assert all(abs(shard.num_rows - 1_000_000) <= 1 for shard in placement.shards)


def test_a_busy_table_is_cut_by_its_lookups():
    busy = TableLoad("busy", 1_000_000, 64, ids=100, lookups=zipf())
    quiet = [TableLoad(f"quiet{k}", 1_000_000, 64) for k in range(6)]
    placement = place_tables([busy, *quiet], [500_000_000] * 4)
    check(placement)
    assert max(placement.lookups) < 1.3 * sum(placement.lookups) / 4
    first, *_, last = placement.shards_of["busy"]
    assert first.num_rows < 50_000 < last.num_rows, "few rows of the beginning are as busy as many of the end"


def test_more_workers_than_tables_leave_some_without_shards():
    placement = place_tables([TableLoad("one", 10, 4), TableLoad("two", 20, 4)], [1000] * 5)
    check(placement)
    assert placement.replicated == ("one", "two") and placement.shards == ()
    # No room for copies, and nothing to cut: two rows and three empty workers.
    placement = place_tables([TableLoad("one", 1, 250), TableLoad("two", 1, 240)], [1000] * 5)
    check(placement)
    assert placement.shards == (Shard("one", 0, 1, 0), Shard("two", 0, 1, 1))


def test_unequal_workers_hold_unequal_shares():
    tables = [TableLoad(f"t{k}", 100_000, 64) for k in range(80)]
    placement = place_tables(tables, [400_000_000, 400_000_000, 1_600_000_000, 800_000_000])
    check(placement)
    assert placement.held_bytes[0] < placement.held_bytes[3] < placement.held_bytes[2]
    fills = [held / capacity for held, capacity in zip(placement.held_bytes, placement.capacities, strict=True)]
    assert min(fills) > 0.5, "lookups are to be even as well, which would leave the large ones half empty"


def test_the_smallest_of_numbers_is_no_load():
    placement = place_tables([TableLoad("t", 4, 4, ids=5e-324), TableLoad("u", 4, 4, ids=0.0)], [100, 100])
    assert sum(placement.held_bytes) == 128


def test_one_worker_holds_everything():
    placement = place_tables([TableLoad("only", 10, 4)], [160])
    assert placement.replicated == ("only",) and placement.held_bytes == (160,)


@settings(max_examples=100)
@given(tables=tables(), num_workers=st.integers(1, 9))
def test_pieces_stay_as_they_were_on_other_workers(tables, num_workers):
    needed = sum(table.num_bytes for table in tables)
    widest = max(table.row_bytes for table in tables)
    before = place_tables(tables, [needed // 3 + 3 * widest] * 4)
    room = needed // num_workers + max(table.num_bytes for table in tables)  # for any piece, whatever was packed before
    again = place_tables(tables, [room] * num_workers, before.cuts)
    check(again, joined=False)
    assert again.cuts == before.cuts


def test_pieces_that_must_not_be_cut_and_do_not_fit():
    tables = [TableLoad("a", 100, 25), TableLoad("b", 50, 25)]
    assert place_tables(tables, [11_000, 6_000], {}).shards == (Shard("a", 0, 100, 0), Shard("b", 0, 50, 1))
    with pytest.raises(ConfigError, match='"a" does not fit: rows 0 to 100 must stay together, .* 9 KB left'):
        place_tables(tables, [9_000] * 3, {})


def test_thousands_of_tables_are_balanced():
    tables = [
        TableLoad(f"t{k}", 1000 + k**3 // 20, 64, ids=(1, 1, 5, 20)[k % 4], lookups=zipf(1024)) for k in range(2000)
    ]
    needed = sum(table.num_bytes for table in tables)
    placement = place_tables(tables, [int(1.5 * needed / 50)] * 50)
    check(placement)
    assert max(placement.lookups) < 1.1 * min(placement.lookups)
    assert max(placement.held_bytes) < 1.3 * min(placement.held_bytes)


@pytest.mark.parametrize(
    ("capacities", "said"),
    [
        ([], "no workers"),
        (
            [100 * GB] * 2,
            r"tables of 256 GB do not fit on 2 workers that have 200 GB for them; use 3 workers like ",
        ),
        ([100 * GB] * 2, r"or give each 129 GB$"),
        ([-5, 200], "use workers with more memory"),
    ],
)
def test_what_does_not_fit_says_what_would(capacities, said):
    with pytest.raises(ConfigError, match=said):
        place_tables([TableLoad("large", GB, 64)], capacities)


def test_full_to_the_last_row():
    wide = [TableLoad(f"t{k}", 3, 100) for k in range(2)]
    with pytest.raises(ConfigError, match="full to the last row"):
        place_tables(wide, [700, 700, 700, 300])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_rows": 0}, "num_rows must be a whole number above 0; got 0"),
        ({"dim": 1.5}, "dim must be a whole number"),
        ({"ids": -1}, "ids of an example must be 0 or more; got -1"),
        ({"bags": float("nan")}, "bags of an example must be 0 or more"),
        ({"lookups": (0.5, 0.4)}, "add up to 1; they add up to 0.9"),
        ({"lookups": (1.5, -0.5)}, "shares from 0"),
    ],
)
def test_a_table_that_cannot_be_is_refused(wrong, said):
    with pytest.raises(ConfigError, match=f'table "t": .*{said}'):
        TableLoad(**{"name": "t", "num_rows": 10, "dim": 4, **wrong})


def test_shares_of_rows():
    table = TableLoad("t", 100, 4, lookups=(0.5, 0.3, 0.2, 0.0))
    assert table.share(0, 100) == 1 and table.share(0, 25) == 0.5 and table.share(25, 50) == pytest.approx(0.3)
    assert table.share(10, 20) == pytest.approx(0.2)
    assert [table.row_at(share) for share in (0, 0.25, 0.5, 0.8, 1)] == [0, 13, 25, 50, 100]
    assert Shard("t", 5, 25, 0).num_rows == 20
