"""Where `evaluation.num_workers: auto` evaluates, and that it is reported and changes nothing else."""

import pytest

import lowprec
from lowprec.config.sections import EvaluationConfig
from lowprec.evaluation.workers.auto_workers import MAX_WORKERS, RAY_START_S, choose_workers
from lowprec.gate.verify import verify_plan
from lowprec.search import open_job, run_search
from lowprec.search.record.describe import describe_job


def never():
    raise AssertionError("nothing is to be estimated")


def chosen(seconds=never, has_rows=True, num_cpus=4, **settings):
    return choose_workers(EvaluationConfig(**settings), has_rows=has_rows, seconds=seconds, num_cpus=num_cpus)


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)


def test_it_is_the_default_and_a_number_is_taken_as_it_is():
    assert EvaluationConfig().num_workers == "auto"
    for count in (0, 1, 7):
        assert chosen(num_workers=count).num_workers == count


def test_little_work_is_done_here_and_much_by_workers():
    # Two workers save half of the time less the start of Ray, which has to be a quarter of it.
    assert chosen(lambda: 3.9 * RAY_START_S, num_cpus=2).num_workers == 0
    much = chosen(lambda: 4.1 * RAY_START_S, num_cpus=2)
    assert much.num_workers == 2 and "about 30 s, and 41 s in this process" in str(much)
    assert chosen(lambda: 1e6, num_cpus=4).num_workers == 4
    assert chosen(lambda: 1e6, num_cpus=4, threads_per_worker=2).num_workers == 2
    assert chosen(lambda: 1e6, num_cpus=128).num_workers == MAX_WORKERS
    assert chosen(lambda: 0.1).num_workers == 0
    for few in ({"num_cpus": 1}, {"threads_per_worker": 3}):
        assert chosen(**few).num_workers == 0


def test_clusters_and_limits_of_memory_need_workers(monkeypatch):
    assert chosen(address="auto").num_workers == 2
    assert chosen(worker_memory="8GB").num_workers == 2
    assert chosen(has_rows=False).num_workers == 2
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert chosen().num_workers == 2 and "job of a Ray cluster" in str(chosen())


class Notes:
    """What a command told of."""

    def __init__(self):
        """Nothing yet."""
        self.notes = []

    def stage(self, name, total):
        """Ignored."""

    def advance(self, steps=1):
        """Ignored."""

    def note(self, text):
        """ByteLru."""
        self.notes.append(text)


def test_commands_report_the_choice_and_find_the_same(small_config):
    settings = "search.max_trials=3"
    auto, here = (small_config(settings, f"evaluation.num_workers={count}") for count in ("auto", 0))
    document = describe_job(open_job(auto))
    assert document["workers"]["num_workers"] == 0
    assert document["notes"][-1].startswith("workers: in this process, because ")
    listener = Notes()
    outcome = run_search(auto, progress=listener)
    assert [note for note in listener.notes if note.startswith("workers: in this process")]
    sql = "SELECT trial_key, gap_pct, kl_pct FROM trials WHERE run_id = '{}' ORDER BY evaluation, number"
    runs = [outcome.run_id, run_search(here).run_id]
    first, second = (lowprec.query(sql.format(run), auto.results.root) for run in runs)
    assert first.equals(second)
    # A run that began with a number goes on with auto, and the other way.
    assert run_search(auto, resume=runs[1]).verdict == outcome.verdict
    listener = Notes()
    verify_plan(auto, outcome.plan_paths[0], progress=listener)
    assert [note for note in listener.notes if note.startswith("workers: in this process")]


def test_much_work_starts_workers(small_config, monkeypatch):
    """Without a Ray of its own: what would be started is enough."""
    started = []

    class Workers:
        def __init__(self, spec, *, num_workers, **_):
            started.append(num_workers)
            raise KeyboardInterrupt

    monkeypatch.setattr("lowprec.evaluation.workers.ray.RayWorkers", Workers)
    monkeypatch.setattr("lowprec.session.workers.work_seconds", lambda *_: 1e6)
    monkeypatch.setattr("lowprec.evaluation.workers.auto_workers._num_cpus", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        run_search(small_config("evaluation.num_workers=auto"))
    assert started == [2]
