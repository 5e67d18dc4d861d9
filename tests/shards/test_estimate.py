"""Bytes that shards exchange, by hand and by counting made-up traffic; memory and limits."""

from itertools import pairwise

import numpy as np
import pytest

from lowprec.shards.estimate import MAX_KEPT_BYTES, WorkerNeeds, kept_bytes, limits_of, network_load
from lowprec.shards.planner import Placement, Shard, TableLoad, place_tables


def test_bytes_of_a_whole_table_by_hand():
    table = TableLoad("t", 1000, 16, ids=10, bags=2)
    placement = Placement((table,), (10**6,) * 4, (), (Shard("t", 0, 1000, 2),))
    load = network_load(placement, profile_precisions=4, exact_precisions=5)
    # Three of four examples are evaluated elsewhere. Which rows: ten ids, two lengths. A vector of each bag: 64 bytes.
    assert load.exact_bytes == 0.75 * (10 * 4 + 2 * 1 + 2 * 64 * 5)
    assert load.profile_bytes == 0.75 * (2 * 42 + 2 * 128 + 2 * 4 * 4)
    # While four examples are evaluated, the worker with the table sends to all others, each of which gets a third.
    assert load.by_worker == pytest.approx([4 * load.exact_bytes * share for share in (1 / 3, 1 / 3, 1, 1 / 3)])


def test_copies_are_never_asked_for():
    placement = place_tables([TableLoad("t", 1000, 16)], [10**6] * 4)
    load = network_load(placement, profile_precisions=4, exact_precisions=5)
    assert (load.profile_bytes, load.exact_bytes, load.by_worker) == (0, 0, (0, 0, 0, 0))


@pytest.mark.parametrize("length", [1, 5, 40])
def test_bags_of_a_cut_table_touch_the_shards_that_are_expected(length):
    rng = np.random.default_rng(length)
    weights = 1 / np.arange(1, 65) ** 1.3
    table = TableLoad("t", 6400, 16, ids=length, lookups=tuple(weights / weights.sum()))
    cuts = [0, 100, 900, 6400]
    shards = tuple(Shard("t", first, end, w) for w, (first, end) in enumerate(pairwise(cuts)))
    placement = Placement((table,), (10**6,) * 3, (), shards)
    load = network_load(placement, profile_precisions=0, exact_precisions=1)
    ids = rng.choice(64, (20_000, length), p=weights / weights.sum()) * 100 + rng.integers(0, 100, (20_000, length))
    counted = 0.0
    for shard in shards:
        within = (ids >= shard.first_row) & (ids < shard.end_row)
        counted += 2 / 3 * (within.sum() * 4 + within.any(axis=1).sum() * (1 + 64)) / len(ids)
    assert load.exact_bytes == pytest.approx(counted, rel=0.02)


def test_the_fullest_worker_breaks_first():
    table = TableLoad("t", 1000, 25)
    needs = WorkerNeeds(process=100_000, dense=0, batch=0, caches=0)
    placement = Placement((table,), (150_000, 110_000), (), (Shard("t", 0, 500, 0), Shard("t", 500, 1000, 1)))
    network = network_load(placement, profile_precisions=4, exact_precisions=5)
    found = limits_of(placement, [needs] * 2, network, lookup_ns=lambda worker: 1000.0, network_bytes_per_s=1e9)
    assert [limit.name for limit in found] == ["memory", "network", "lookups"]
    assert found[0].says == "worker 1 is 71% full" and found[0].used == pytest.approx(150 / 210)
    assert found[1].used == pytest.approx(max(network.by_worker) / (max(network.by_worker) + 1000))
    without = limits_of(placement, [needs] * 2, network, lookup_ns=None, network_bytes_per_s=1e9)
    assert [limit.name for limit in without] == ["memory", "lookups"]


def test_needs_grow_with_batches_and_precisions():
    def needs(**other):
        given = {
            "dense_bytes": 10**6,
            "hot_bytes": 10**6,
            "batch_size": 1000,
            "ids": 30,
            "values": 416,
            "precisions": 5,
            **other,
        }
        return WorkerNeeds.of(8 * 10**9, **given)

    assert needs().total == sum(vars(needs()).values())
    # A fiftieth of the memory for batches, and what small tables take.
    assert needs().caches == 160 * 10**6 + 10**6 and WorkerNeeds.of(10**9, **_given()).caches == 20 * 10**6 + 10**6
    assert kept_bytes(None) == kept_bytes(10**12) == MAX_KEPT_BYTES
    assert needs(batch_size=2000).batch == 2 * needs().batch
    assert needs(precisions=12).batch == pytest.approx(2 * needs().batch, rel=0.03)


def _given():
    return {"dense_bytes": 10**6, "hot_bytes": 10**6, "batch_size": 1000, "ids": 30, "values": 416, "precisions": 5}
