"""Whole searches on a cluster whose workers, machines and drivers are killed: `tests/benchmarks/chaos.py`."""

import importlib.util
import sys
from pathlib import Path

import pytest
from deltalake import write_deltalake

from lowprec.results import ResultsStore
from lowprec.search import run_search


@pytest.fixture
def chaos(monkeypatch):
    path = Path(__file__).parents[1] / "benchmarks" / "chaos.py"
    spec = importlib.util.spec_from_file_location("chaos", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "chaos", module)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    spec.loader.exec_module(module)
    return module


def check(found, num_seeds):
    assert (found["runs"], found["lost"], found["duplicated"], found["metrics_equal"]) == (num_seeds, 0, 0, 1)
    # A run that ends before its last event comes is compared all the same; most events happen.
    assert set(found["events"]) == {"kill", "stop", "node", "driver"}
    assert sum(found["events"].values()) >= 3 * num_seeds


def test_one_seed(chaos, tmp_path):
    check(chaos.play(tmp_path, range(1)), 1)


def test_a_row_that_is_written_twice_is_found_though_readers_see_one(chaos, small_config, tmp_path):
    config = small_config("search.max_trials=5")
    run_search(config)
    run = chaos.Run(tmp_path / "job.yaml", Path(config.results.root), address="")
    before = run.rows()
    assert run.num_repeated() == 0
    again = ResultsStore(run.root).dataset("trials").to_table().slice(0, 2)
    write_deltalake(run.root / "trials", again, mode="append")
    assert run.num_repeated() == 2
    assert run.rows() == before


@pytest.mark.slow
def test_twenty_seeds(chaos, tmp_path):
    check(chaos.play(tmp_path, range(100, 120)), 20)
