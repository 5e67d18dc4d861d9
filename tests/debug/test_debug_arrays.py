"""Errors by channel and by row, as files."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from lowprec import ops
from lowprec.core.errors import ExportError
from lowprec.debug import debug_plan
from lowprec.search import open_job


@pytest.mark.parametrize("is_served", [False, True])
def test_every_channel_and_every_row_that_was_asked_for_is_there(planned, served, tmp_path, is_served):
    config, file, path = (served if is_served else planned)()
    report = debug_plan(config, path, arrays=tmp_path / "arrays")
    assert report.arrays == {name: str(tmp_path / "arrays" / f"{name}.parquet") for name in ("channels", "rows")}
    channels, rows = (pq.read_table(report.arrays[name]).to_pandas() for name in ("channels", "rows"))
    widths = {unit: of for unit, (_, of) in open_job(config).adapter.shapes.items()}
    widths |= {"layer:bottom.0": 8, "layer:bottom.2": 8, "layer:top.0": 16, "layer:top.2": 1}
    assert channels.groupby("unit").channel.apply(list).to_dict() == {u: list(range(n)) for u, n in widths.items()}
    assert set(channels.num_rows) == {6000}
    for unit in report.units:
        of = channels[channels.unit == unit.unit]
        ratio = of.reference_mean_square.sum() / max(of.error_mean_square.sum(), 1e-300)
        assert (10 * np.log10(ratio) if np.isfinite(unit.alone.sqnr_db) else np.inf) == pytest.approx(
            unit.alone.sqnr_db
        )
        assert of.error_max.max() == unit.alone.to_dict()["max_error"]
        assert of.error_mean.mean() == pytest.approx(unit.alone.to_dict()["bias"])
        assert of.accumulated_error_max.max() == unit.accumulated.to_dict()["max_error"]
    window, weights = open_job(config).window("confirm"), open_job(config).adapter.weights
    for k in range(6):
        ids = np.concatenate([window.batch(b).sparse[f"c{k}"].values for b in range(window.num_batches)])
        unit = f"table:c{k}"
        of = rows[rows.unit == unit]
        hits = np.bincount(ids)
        assert np.array_equal(of.id, np.flatnonzero(hits)) and np.array_equal(of.hits, hits[hits > 0])
        assert of.hits.sum() == len(ids)
        table = weights[unit].numpy()
        at = file.plan[unit]
        restored = ops.dequantize(ops.quantize(table, at, row_range=file.row_range(unit)), at, table.shape[1])
        error = (restored - table)[of.id.to_numpy()]
        np.testing.assert_allclose(of.error_square, np.square(error, dtype=float).sum(axis=1), rtol=1e-5)
        np.testing.assert_array_equal(of.error_max, np.abs(error).max(axis=1))


def test_a_folder_that_cannot_be_written_is_named(planned, tmp_path):
    config, _, path = planned()
    (tmp_path / "taken").write_text("")
    with pytest.raises(ExportError, match="taken: cannot be written: File exists"):
        debug_plan(config, path, arrays=tmp_path / "taken")
