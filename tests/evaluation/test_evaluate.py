"""The same bits for any number of workers, and every row accounted for."""

from dataclasses import replace

import pytest
import ray

from lowprec.core.errors import ModelError, TrafficError, WorkerError
from lowprec.evaluation.evaluate import evaluate_plans
from lowprec.evaluation.workers.ray import RayWorkers, Timeouts
from lowprec.evaluation.workers.worker import Chunk, ExactTask, LocalWorkers
from lowprec.plan import Plan, Precision
from lowprec.search import open_job


@pytest.fixture
def job(small_config):
    return open_job(small_config())


@pytest.fixture(scope="module")
def one_ray():
    """A Ray of two CPUs for the tests with workers, which would start one each."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def plans_of(job):
    return [Plan.uniform(job.units, p) for p in (Precision.INT8, Precision.INT4, Precision.INT2)]


def evaluate(job, workers, **options):
    window = job.window("search")
    return evaluate_plans(workers, window, plans_of(job), confidence=0.95, batches_per_task=2, **options)


def test_every_batch_is_counted_once_and_progress_is_told(job):
    told = []
    evaluation = evaluate(job, LocalWorkers(job.spec, job.adapter), on_progress=told.append)
    window = job.window("search")
    assert evaluation.rows.num_read == evaluation.metrics[0].num_examples == window.num_rows
    assert sum(told) == window.num_batches


def test_a_sample_of_batches(job):
    evaluation = evaluate(job, LocalWorkers(job.spec, job.adapter), batches=[4, 1])
    assert evaluation.rows.num_read == 2 * 1024


# Before the tests with a Ray: who has one looks for no other.
def test_a_cluster_that_is_not_there_is_one_sentence(job):
    with pytest.raises(WorkerError, match="127.0.0.1:1: cannot be reached"):
        RayWorkers(job.spec, num_workers=1, address="127.0.0.1:1")


def test_one_two_or_no_ray_workers_give_equal_bits(one_ray, job):
    local = evaluate(job, LocalWorkers(job.spec, job.adapter))
    for num_workers in (1, 2):
        workers = RayWorkers(job.spec, num_workers=num_workers, address=None)
        try:
            remote = evaluate(job, workers)
        finally:
            workers.close()
        assert remote.metrics == local.metrics
        assert remote.sums.moments.tobytes() == local.sums.moments.tobytes()


def test_errors_of_ours_arrive_as_they_were_raised(one_ray, job):
    workers = RayWorkers(replace(job.spec, factory="no.such:model"), num_workers=1, address=None)
    try:
        with pytest.raises(ModelError, match="no.such"):
            evaluate(job, workers)
    finally:
        workers.close()


def test_an_id_out_of_range_stops_with_its_place(small_config):
    """The traffic says that c0 has 10 rows, fewer than its ids and its table."""
    sizes = ", ".join(f"{{name: c{k}, num_embeddings: {n}}}" for k, n in enumerate((10, 80, 160, 320, 640, 1000)))
    table = "model.args.tables={c0: {features: [c0], num_embeddings: 40}}"
    job = open_job(small_config(f"traffic.sparse=[{sizes}]", table))
    with pytest.raises(TrafficError, match=r"row \d+.*c0"):
        evaluate(job, LocalWorkers(job.spec, job.adapter))


def test_chunks_of_a_task_do_not_depend_on_what_the_worker_did_before(job):
    window = job.window("search")
    task = ExactTask(tuple(plans_of(job)), (2, 3))
    fresh: Chunk = next(LocalWorkers(job.spec, job.adapter).run(window, [task]))
    used = LocalWorkers(job.spec, job.adapter)
    list(used.run(window, [ExactTask(tuple(plans_of(job)[::-1]), (0, 1, 2))]))
    again: Chunk = next(used.run(window, [task]))
    assert again.sums.moments.tobytes() == fresh.sums.moments.tobytes()


def test_dropped_ids_and_unlabelled_rows_are_counted(small_config, small_folder, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(small_folder / "traffic")
    first = table["c0"].to_pylist()
    first[9000], first[9001] = -5, 4000
    labels = table["label"].to_pylist()
    labels[9002] = None
    for name, values in (("c0", first), ("label", labels)):
        table = table.set_column(table.column_names.index(name), name, pa.array(values, table[name].type))
    pq.write_table(table, tmp_path / "changed.parquet")
    job = open_job(small_config(f"traffic.path={tmp_path / 'changed.parquet'}", "traffic.bounds_check=drop"))
    rows = evaluate(job, LocalWorkers(job.spec, job.adapter)).rows
    assert (rows.num_bad, rows.num_unlabelled, rows.out_of_range) == (0, 1, {"c0": 2})


def test_a_window_that_is_nearly_all_bad_is_given_up_early(small_config, small_folder, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    import lowprec.evaluation.rows as module

    monkeypatch.setattr(module, "MAX_BAD_ROWS_HELD", 3000)
    table = pq.read_table(small_folder / "traffic")
    bad = pa.array([7] * len(table), pa.int8())
    table = table.set_column(table.column_names.index("label"), "label", bad)
    pq.write_table(table, tmp_path / "changed.parquet")
    job = open_job(small_config(f"traffic.path={tmp_path / 'changed.parquet'}"))
    workers = LocalWorkers(job.spec, job.adapter)
    with pytest.raises(TrafficError, match="4096 of 4096 rows are bad"):
        job.evaluate(workers, "search", job.window("search"), plans_of(job), quarantine=tmp_path / "q")
    assert pq.read_metadata(tmp_path / "q" / "search.parquet").num_rows == 4096


def test_a_cluster_that_is_too_small_is_said_instead_of_waited_for(one_ray, job):
    with pytest.raises(WorkerError, match="started [012] of 3 workers .* lower evaluation.num_workers"):
        RayWorkers(job.spec, num_workers=3, address=None, timeouts=Timeouts(start_s=2.0))
