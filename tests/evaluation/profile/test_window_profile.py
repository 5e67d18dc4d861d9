"""A profile of a window is the same whoever measures it, has at least 20 blocks, and predicts what it says it does."""

from dataclasses import replace

import numpy as np
import pytest

from lowprec.evaluation.profile.profile import ProfileTask, logit_changes
from lowprec.evaluation.profile.window_profile import NUM_BLOCKS, measure_profile
from lowprec.evaluation.workers.worker import LocalWorkers, Worker, evaluator_of
from lowprec.plan import TABLE_PRECISIONS, Plan
from lowprec.search import open_job

PLANS = 40


class TwoWorkers:
    """Two workers in this process: every other task each, the last ones first."""

    def __init__(self, spec, adapter):
        self._workers = [Worker(spec, evaluator_of(spec, adapter)) for _ in range(2)]

    def run(self, window, tasks):
        done = {}
        for k in reversed(range(len(tasks))):
            done[k] = self._workers[k % 2].run(window, tasks[k])
        return (done[k] for k in range(len(tasks)))


@pytest.fixture
def job(small_config):
    return open_job(small_config("traffic.batch_size=128"))


@pytest.fixture
def grouped(small_config):
    return open_job(small_config("traffic.batch_size=128", "traffic.group=user"))


def measure(job, workers=None, *, batches_per_task=2, **options):
    options = {"by_group": job.config.traffic.group is not None, **options}
    workers = workers or LocalWorkers(job.spec, job.adapter)
    return measure_profile(workers, job.window("search"), job.columns, batches_per_task=batches_per_task, **options)


def arrays(profile):
    found = [
        np.array([b.num_rows, b.num_unlabelled, b.weight, b.label, b.prediction, b.loss, b.entropy])
        for b in profile.blocks
    ]
    found += [b.first for b in profile.blocks]
    for moment in (*(b.second for b in profile.blocks), profile.evidence):
        found += [value for value in vars(moment).values() if value is not None]
    return found


def random_plans(job, precisions=TABLE_PRECISIONS):
    picks = np.random.default_rng(0).integers(0, len(precisions), (PLANS, len(job.units)))
    return [Plan({u.name: precisions[k] for u, k in zip(job.units, row, strict=True)}) for row in picks]


def test_blocks_are_equal_stretches_of_the_window_in_order(job):
    profile = measure(job).profile
    window = job.window("search")
    assert NUM_BLOCKS >= 20 and len(profile.blocks) == NUM_BLOCKS
    assert profile.num_rows == window.num_rows
    evaluator, start = evaluator_of(job.spec, job.adapter), 0
    for block in profile.blocks:
        assert 1 <= block.num_rows / 128 <= 3  # 47 batches in 20 blocks
        end = start + -(-block.num_rows // 128)
        parts = [ProfileTask(job.columns, NUM_BLOCKS, (k,)).sums(evaluator, window.batch(k)) for k in range(start, end)]
        np.testing.assert_allclose(sum(p.block.first for p in parts), block.first, rtol=1e-12, atol=1e-12)
        start = end
    assert start == window.num_batches


def test_a_window_of_fewer_batches_leaves_blocks_empty(small_config):
    profile = measure(open_job(small_config())).profile
    assert len(profile.blocks) == NUM_BLOCKS
    assert [b.num_rows for b in profile.blocks if b.num_rows] == [1024] * 5 + [6000 - 5 * 1024]


@pytest.mark.parametrize("kind", ["dense", "sketch", "groups"])
def test_bits_are_equal_for_any_split_among_workers(small_config, grouped, job, kind, monkeypatch):
    if kind == "sketch":
        monkeypatch.setattr("lowprec.evaluation.profile.profile.MAX_DENSE_COLUMNS", 4)
    chosen = grouped if kind == "groups" else job
    alone = measure(chosen)
    both = measure(chosen, TwoWorkers(chosen.spec, chosen.adapter))
    for a, b in zip(arrays(alone.profile), arrays(both.profile), strict=True):
        assert a.tobytes() == b.tobytes()
    assert (alone.rows, alone.use) == (both.rows, both.use)
    # Another split into tasks is the same up to rounding.
    other = measure(chosen, batches_per_task=1).profile
    for a, b in zip(arrays(alone.profile), arrays(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_progress_and_use_of_tables_are_told(job):
    told = []
    measured = measure(job, on_progress=told.append)
    window = job.window("search")
    assert sum(told) == window.num_batches and measured.is_complete
    ids = {name: 0 for name in measured.use}
    for batch in window.batches():
        for feature, bags in batch.sparse.items():
            ids[f"table:{feature}"] += len(bags.values)
    for name, use in measured.use.items():
        assert use.bags_per_example == 1
        assert use.ids_per_bag == pytest.approx(ids[name] / window.num_rows)


def test_a_window_that_is_nearly_all_bad_is_given_up(small_config, small_folder, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("lowprec.evaluation.rows.MAX_BAD_ROWS_HELD", 1500)
    table = pq.read_table(small_folder / "traffic")
    bad = pa.array([7] * len(table), pa.int8())
    pq.write_table(table.set_column(table.column_names.index("label"), "label", bad), tmp_path / "bad.parquet")
    measured = measure(open_job(small_config(f"traffic.path={tmp_path / 'bad.parquet'}")))
    assert not measured.is_complete and measured.rows.num_read == 2048
    assert measured.rows.num_bad == len(measured.bad_rows) == 2048


def test_unlabelled_rows_are_counted(small_config, small_folder, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(small_folder / "traffic")
    labels = [None if k % 5 == 0 else v for k, v in enumerate(table["label"].to_pylist())]
    column = pa.array(labels, table["label"].type)
    pq.write_table(table.set_column(table.column_names.index("label"), "label", column), tmp_path / "holes.parquet")
    measured = measure(open_job(small_config(f"traffic.path={tmp_path / 'holes.parquet'}")))
    assert (measured.rows.num_unlabelled, measured.profile.num_rows) == (1200, 4800)
    assert sum(block.num_unlabelled for block in measured.profile.blocks) == 1200


@pytest.mark.parametrize("max_dense", [2048, 4])
def test_the_profile_predicts_gaps_dense_and_sketched(job, max_dense, monkeypatch):
    """Beyond so many columns KL gaps are as far from the dense ones as the sketch says."""
    dense = measure(job).profile
    monkeypatch.setattr("lowprec.evaluation.profile.profile.MAX_DENSE_COLUMNS", max_dense)
    profile = measure(job).profile
    stated = profile.second.relative_error
    assert (stated > 0) == (max_dense == 4)
    z = profile.selected(random_plans(job))
    gap, kl = profile.gaps_pct(z)
    exact_gap, exact_kl = dense.gaps_pct(z)
    relative = kl / exact_kl - 1
    assert np.abs(relative).max() <= 4 * stated
    # The first order does not go through the sketch.
    np.testing.assert_allclose(
        gap - kl * profile.entropy / profile.loss, exact_gap - exact_kl * dense.entropy / dense.loss, rtol=1e-9
    )
    np.testing.assert_allclose(profile.second.diagonal, dense.second.diagonal, rtol=1e-5)
    if max_dense == 4:
        assert np.abs(relative).max() > 1e-6
        assert stated == pytest.approx(np.sqrt(2 / 4096), rel=0.01)
    xx, exact_xx = ([m.xx for m in p.moments(z)] for p in (profile, dense))
    assert np.abs(np.divide(xx, exact_xx) - 1).max() <= 4 * profile.evidence.relative_error
    widths = [[i.upper - i.lower for i in p.intervals_pct(z, confidence=0.95)] for p in (profile, dense)]
    # Half the relative error of a variance, and of the design effect, which comes from blocks of 205 buckets each.
    np.testing.assert_allclose(*widths, rtol=4 * profile.evidence.relative_error + 1e-9)


def test_a_sketch_of_the_window_is_that_of_its_blocks_side_by_side(job, monkeypatch):
    """Blocks have different examples, so the sums of squares of all sketches are one sketch."""
    monkeypatch.setattr("lowprec.evaluation.profile.profile.MAX_DENSE_COLUMNS", 4)
    profile = measure(job).profile
    z = profile.selected(random_plans(job))
    of_blocks = sum(block.second.quadratic(z) for block in profile.blocks)
    np.testing.assert_allclose(profile.second.quadratic(z), of_blocks, rtol=1e-9)
    assert profile.second.relative_error < profile.blocks[0].second.relative_error / 4


def test_with_a_group_key_the_evidence_is_of_groups(job, grouped):
    rows, groups = measure(job).profile, measure(grouped).profile
    np.testing.assert_allclose(rows.first, groups.first, rtol=1e-12)
    z = rows.selected(random_plans(job))
    # 6,000 examples of 300 users: the same sums, but of other units, known to within the error of the sketch.
    exact = {}
    evaluator, window = evaluator_of(grouped.spec, grouped.adapter), grouped.window("search")
    for batch in window.batches():
        logits, s = logit_changes(evaluator, batch, grouped.columns)
        terms = (z[:, :-2] @ s) * (1 / (1 + np.exp(-logits.astype(float))) - batch.labels)
        for user, column in zip(batch.groups, terms.T, strict=True):
            exact[user] = exact.get(user, 0) + column
    expected = np.square(np.stack(list(exact.values()))).sum(axis=0)
    found = np.array([m.xx for m in groups.moments(z)])
    assert 200 < len(exact) <= 300
    assert np.abs(found / expected - 1).max() <= 4 * groups.evidence.relative_error


def test_profiles_of_two_windows_add(job):
    """Such as yesterday's and today's: first-order sums, losses and rows are those of both."""
    a = measure(job).profile
    other = measure_profile(
        LocalWorkers(job.spec, job.adapter), job.window("confirm"), job.columns, by_group=False, batches_per_task=2
    ).profile
    both = a + other
    np.testing.assert_allclose(both.first, a.first + other.first, rtol=1e-12)
    assert both.num_rows == a.num_rows + other.num_rows
    z = a.selected(random_plans(job))
    weighed = (a.gaps_pct(z)[0] * a.loss + other.gaps_pct(z)[0] * other.loss) / both.loss
    np.testing.assert_allclose(both.gaps_pct(z)[0], weighed, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="number of blocks"):
        a + replace(other, blocks=other.blocks[:-1])
