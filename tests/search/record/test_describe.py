"""What a dry run refuses before anything is computed, and what a resumption on other traffic advises."""

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

import lowprec
from lowprec.core.errors import ConfigError, TrafficError
from lowprec.search import open_job, run_search
from lowprec.search.record.describe import describe_job
from lowprec.search.record.record import RunRecord


@pytest.fixture
def traffic(small_folder, tmp_path):
    """The small traffic, its table given to a function first."""

    def make(change):
        table = pads.dataset(small_folder / "traffic", format="parquet", exclude_invalid_files=True).to_table()
        pq.write_table(change(table), tmp_path / "other.parquet")
        return f"traffic.path={tmp_path / 'other.parquet'}"

    return make


def with_labels(values):
    return lambda t: t.set_column(t.column_names.index("label"), "label", pa.array(values(t.num_rows)))


@pytest.mark.parametrize(
    ("values", "first"),
    [(lambda n: np.arange(n) % 5 + 1, "2|3|4|5"), (lambda n: np.where(np.arange(n) % 2, 1.0, -1.0), r"-1\.0")],
)
def test_a_dry_run_refuses_labels_that_are_neither_0_nor_1(small_config, traffic, values, first):
    changed = traffic(with_labels(values))
    said = rf'windows.search: column "label" \(traffic.label\): \d+ of the first 1024 labels are .* first is ({first}) '
    with pytest.raises(TrafficError, match=said):
        describe_job(open_job(small_config(changed)))
    # Where so many rows may be bad, they are.
    assert describe_job(open_job(small_config(changed, "traffic.max_bad_fraction=0.9")))["dry_run"]


def test_a_resumption_on_other_traffic_does_not_speak_of_an_option_that_was_not_given(
    small_config, traffic, monkeypatch
):
    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    config = small_config()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunRecord, "add_trials", killed)
        run_search(config)
    (run_id,) = lowprec.query("SELECT run_id FROM runs", config.results.root)["run_id"]
    other = small_config(traffic(lambda table: table.take(np.arange(0, table.num_rows, 2))))
    with pytest.raises(ConfigError, match="is not of this search: .*the traffic") as raised:
        run_search(other, resume=run_id)
    assert "--profile" not in str(raised.value) and "resume with the traffic, checkpoint" in str(raised.value)
