"""Searches on traffic that is a Delta table, which changes while they are away."""

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

import lowprec
from lowprec.core.errors import ConfigError
from lowprec.gate.verify import verify_plan
from lowprec.search import open_job, run_search
from lowprec.search.record.describe import describe_job


@pytest.fixture
def delta(small_config, tmp_path):
    """Makes a config on the small traffic as a Delta table, written once."""
    path = str(tmp_path / "clicks")
    rows = pq.read_table(small_config().traffic.path)
    for first in range(0, rows.num_rows, 5000):
        write_deltalake(path, rows.slice(first, 5000), mode="append")

    def make(*overrides):
        return small_config(f"traffic.path={path}", *overrides)

    return make


def rows_of(run_id, config):
    sql = f"SELECT evaluation, number, trial_key, gap_pct FROM trials WHERE run_id = '{run_id}' ORDER BY 1, 2"
    return lowprec.query(sql, config.results.root).values.tolist()


def test_a_resumed_run_reads_the_version_that_it_began_with(delta):
    config = delta("search.max_trials=4")
    outcome = run_search(config)
    before = rows_of(outcome.run_id, config)
    DeltaTable(config.traffic.path).optimize.compact()
    DeltaTable(config.traffic.path).delete("c0 < 5")
    again = run_search(config, resume=outcome.run_id)
    assert rows_of(again.run_id, config) == before
    with pytest.raises(ConfigError, match=r"traffic\.version differ"):
        run_search(delta("search.max_trials=4", "traffic.version=5"), resume=outcome.run_id)
    fresh = run_search(config)
    assert [row[2:] for row in rows_of(fresh.run_id, config)] != [row[2:] for row in before]


def test_the_dry_run_names_the_version_and_commands_record_it(delta):
    config = delta("search.max_trials=2")
    document = describe_job(open_job(config))
    assert document["traffic_version"] == 3 and "version 3 of the Delta table" in document["notes"][0]
    outcome = run_search(delta("search.max_trials=2", "traffic.version=3"))
    verification = verify_plan(config, outcome.plan_paths[0])
    sql = "SELECT config_json FROM runs WHERE run_id = '{}'"
    for run in (outcome.run_id, verification.run_id):
        (text,) = lowprec.query(sql.format(run), config.results.root)["config_json"]
        assert '"version":3' in text
