"""A model whose rows are at several workers is evaluated and profiled like one in a single process."""

import os
import signal
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from torch import nn

from lowprec.core.errors import CheckpointError, ModelError, WeightError
from lowprec.evaluation.exact.exact_evaluator import ExactEvaluator
from lowprec.evaluation.profile.profile import logit_changes
from lowprec.evaluation.workers.ray import RayWorkers
from lowprec.evaluation.workers.worker import ExactTask, LocalWorkers, ShardLoader, Worker, evaluator_of
from lowprec.plan import TABLE_PRECISIONS, Plan, Precision, RowRange
from lowprec.search.job import open_job
from lowprec.shards.planner import Placement, Shard, TableLoad, place_tables
from lowprec.shards.server import ShardServer
from lowprec.shards.sharded import ShardedTables


@pytest.fixture(params=list(RowRange))
def job(small_config, request):
    return open_job(small_config(f"space.row_range={request.param}"))


def sharded(job, placement):
    """An evaluator for each worker, all in this process."""
    loaders = [ShardLoader(job.spec, placement) for _ in range(placement.num_workers)]
    held = [loader.held([worker]) for worker, loader in enumerate(loaders)]
    servers = [ShardServer(shards.values()) for shards in held]

    def exchange(requests):
        return lambda: {worker: servers[worker].answer(request) for worker, request in requests.items()}

    return [
        ExactEvaluator(loader.adapter, ShardedTables(placement, shards, exchange))
        for loader, shards in zip(loaders, held, strict=True)
    ]


def placed(job, cuts=()):
    """Tables whole at three workers in turn, the first one at all of them; the last one cut where it is asked for."""
    tables = tuple(TableLoad(u.name, u.num_rows, u.dim) for u in job.units)
    first, *others, last = tables
    shards = [Shard(t.name, 0, t.num_rows, k % 3) for k, t in enumerate(others)]
    rows = (0, *cuts, last.num_rows)
    shards += [Shard(last.name, a, b, k % 3) for k, (a, b) in enumerate(pairwise(rows))]
    return Placement(tables, (10**6,) * 3, (first.name,), tuple(sorted(shards)))


def some_plans(job):
    rng = np.random.default_rng(0)
    return [Plan({u.name: Precision(rng.choice(TABLE_PRECISIONS)) for u in job.units}) for _ in range(3)]


def test_whole_tables_give_the_same_bits(job):
    local, batch, plans = evaluator_of(job.spec, job.adapter), job.window("search").batch(1), some_plans(job)
    exact = local.logits(batch, plans)
    reference, changes = logit_changes(local, batch, job.columns)
    for evaluator in sharded(job, placed(job)):
        assert not evaluator.adapter.has_rows
        found = evaluator.logits(batch, plans)
        np.testing.assert_array_equal(found.reference, exact.reference)
        np.testing.assert_array_equal(found.plans, exact.plans)
        found_reference, found_changes = logit_changes(evaluator, batch, job.columns)
        np.testing.assert_array_equal(found_reference, reference)
        np.testing.assert_array_equal(found_changes, changes)
        assert evaluator.lookups == local.lookups


def test_a_table_over_three_workers_changes_the_last_bits_alone(job):
    local, batch, plans = evaluator_of(job.spec, job.adapter), job.window("search").batch(0), some_plans(job)
    exact = local.logits(batch, plans)
    _, changes = logit_changes(local, batch, job.columns)
    first, *others = sharded(job, placed(job, cuts=(10, 500)))
    found = first.logits(batch, plans)
    np.testing.assert_allclose(found.reference, exact.reference, atol=1e-5)
    np.testing.assert_allclose(found.plans, exact.plans, atol=1e-5)
    _, found_changes = logit_changes(first, batch, job.columns)
    # Of a hot table in one process: 16 bits of the largest change in a row.
    np.testing.assert_allclose(found_changes, changes, atol=1e-4 * np.abs(changes).max())
    for other in others:
        np.testing.assert_array_equal(other.logits(batch, plans).plans, found.plans)
        np.testing.assert_array_equal(logit_changes(other, batch, job.columns)[1], found_changes)


def more_workers_than_tables(tables):
    return place_tables(tables, [2 * max(t.num_bytes for t in tables)] * (len(tables) + 3))


def unequal_workers(tables):
    whole = sum(t.num_bytes for t in tables)
    return place_tables(tables, [int(share * whole) for share in (0.7, 0.3, 0.15)])


def an_empty_shard(tables):
    """One of no rows, as a table with fewer rows than workers might get, and a worker with nothing but that."""
    *others, last = tables
    shards = [Shard(t.name, 0, t.num_rows, 0) for t in others]
    shards += [Shard(last.name, 0, 10, 0), Shard(last.name, 10, 10, 1), Shard(last.name, 10, last.num_rows, 2)]
    return Placement(tables, (10**6,) * 3, (), tuple(sorted(shards)))


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_the_same_cuts_give_the_same_bits_on_however_many_workers(job, num_workers):
    before = placed(job, cuts=(10, 500))
    batch, plans = job.window("search").batch(0), some_plans(job)
    first, *_ = sharded(job, before)
    last, *_ = sharded(job, place_tables(before.tables, [10**6] * num_workers, before.cuts))
    np.testing.assert_array_equal(last.logits(batch, plans).plans, first.logits(batch, plans).plans)
    for found, expected in zip(
        logit_changes(last, batch, job.columns), logit_changes(first, batch, job.columns), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("place", [more_workers_than_tables, unequal_workers, an_empty_shard])
def test_odd_placements_give_the_same_numbers(job, place):
    placement = place(tuple(TableLoad(u.name, u.num_rows, u.dim) for u in job.units))
    assert placement.shards and len(placement.replicated) < len(job.units)
    batch, plans = job.window("search").batch(2), some_plans(job)
    exact = evaluator_of(job.spec, job.adapter).logits(batch, plans)
    everywhere = [e.logits(batch, plans) for e in sharded(job, placement)]
    np.testing.assert_allclose(everywhere[0].plans, exact.plans, atol=1e-5)
    for found in everywhere[1:]:
        np.testing.assert_array_equal(found.plans, everywhere[0].plans)
        np.testing.assert_array_equal(found.reference, everywhere[0].reference)


def test_a_worker_reads_its_own_rows_alone(job):
    placement = placed(job, cuts=(10, 500))
    for worker in range(3):
        held = ShardLoader(job.spec, placement).held([worker])
        expected = {(s.table, s.first_row) for s in placement.shards if s.worker == worker}
        assert set(held) == expected | {(name, 0) for name in placement.replicated}
    tables = (*placement.tables[:-1], TableLoad(placement.tables[-1].name, 10**6, placement.tables[-1].dim))
    too_long = Placement(tables, placement.capacities, (), (Shard(tables[-1].name, 500, 10**6, 0),))
    with pytest.raises(CheckpointError, match=r"rows 500 to 1000000 of .* are wanted, but it is 1000 x"):
        ShardLoader(job.spec, too_long).held([0])


def test_a_table_with_a_forward_of_its_own_is_refused(job):
    evaluator, *_ = sharded(job, placed(job))
    bag = next(m for m in evaluator.adapter.model.modules() if isinstance(m, nn.EmbeddingBag))

    class Scaled(type(bag)):
        def forward(self, *args):
            return 2 * super().forward(*args)

    bag.__class__ = Scaled
    with pytest.raises(ModelError, match="is a Scaled with a forward of its own, which other workers do not know"):
        evaluator.logits(job.window("search").batch(0), some_plans(job))


@pytest.fixture
def small(small_config):
    return open_job(small_config())


def evaluated(job, workers, **options):
    plans = some_plans(job)
    return job.evaluate(workers, "search", job.window("search"), plans, quarantine=Path("unused"), **options)


def profiled(job, workers):
    return job.measure_profile(workers, "search", job.window("search"), quarantine=Path("unused")).profile


@contextmanager
def on_ray(job, placement, address=None):
    workers = RayWorkers(job.spec, num_workers=placement.num_workers, address=address, placement=placement)
    try:
        yield workers
    finally:
        workers.close()


# Before the tests with a cluster: Ray starts no other one beside it in the same process.
def test_workers_on_one_machine_map_the_rows_of_each_other(small):
    """And get the same numbers as those that ask each other for them."""
    placement = placed(small, cuts=(10, 500))
    asked = Worker(small.spec, sharded(small, placement)[0])
    with on_ray(small, placement) as workers:
        assert len(set(workers.node_ids())) == 1
        mapped = evaluated(small, workers)
    task = ExactTask(tuple(some_plans(small)), tuple(range(small.window("search").num_batches)))
    np.testing.assert_allclose(asked.run(small.window("search"), task).sums.moments, mapped.sums.moments, rtol=1e-12)


@pytest.fixture(scope="module")
def three_machines():
    """The address of a Ray cluster of three nodes, on this machine: no node maps what another one holds."""
    cluster = Cluster()
    try:
        for _ in range(3):
            cluster.add_node(num_cpus=1, include_dashboard=False)
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_ray_workers_that_share_whole_tables_give_the_bits_of_one_process(small, three_machines):
    local = LocalWorkers(small.spec, small.adapter)
    exact, profile = evaluated(small, local), profiled(small, local)
    with on_ray(small, placed(small), three_machines) as workers:
        assert len(set(workers.node_ids())) == 3
        assert evaluated(small, workers).sums.moments.tobytes() == exact.sums.moments.tobytes()
        np.testing.assert_array_equal(profiled(small, workers).first, profile.first)


def test_killed_workers_are_replaced_and_change_no_bit_of_cut_tables(small, three_machines):
    killed = []
    with on_ray(small, placed(small, cuts=(10, 500)), three_machines) as workers:

        def kill_one(_):
            if len(killed) < 3:
                killed.append(workers.process_ids()[len(killed)])
                os.kill(killed[-1], signal.SIGKILL)

        undisturbed = evaluated(small, workers)
        disturbed = evaluated(small, workers, on_progress=kill_one)
    assert len(set(killed)) == 3
    assert disturbed.metrics == undisturbed.metrics
    assert disturbed.sums.moments.tobytes() == undisturbed.sums.moments.tobytes()
    np.testing.assert_allclose(
        disturbed.sums.moments, evaluated(small, LocalWorkers(small.spec, small.adapter)).sums.moments, rtol=1e-4
    )


def test_a_bad_row_at_another_worker_is_said_as_it_is(small_config, small_folder, tmp_path, three_machines):
    from safetensors.torch import load_file, save_file

    tensors = load_file(small_folder / "model.safetensors")
    tensors["tables.c5.weight"][700, 3] = float("inf")
    save_file(tensors, tmp_path / "bad.safetensors")
    job = open_job(small_config(f"model.checkpoint={tmp_path / 'bad.safetensors'}"))
    with (
        on_ray(job, placed(job, cuts=(10, 500)), three_machines) as workers,
        pytest.raises(WeightError, match='"table:c5": row 700 holds inf in column 3'),
    ):
        evaluated(job, workers)
