from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lowprec.core.errors import TrafficError
from lowprec.traffic import BadRow, check_bad_rows, read_quarantine, write_quarantine

BAD = BadRow("data/a.parquet", 17, "label is not 0 or 1", '{"label": 2}')


def test_bad_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [BadRow("a.parquet", 2**40 + i, f"reason {i}", '{"x": "ü\\n"}') for i in range(25_000)]
    path = tmp_path / "deep" / "quarantine.parquet"
    assert write_quarantine(iter(rows), path) == 25_000
    assert read_quarantine(path) == tuple(rows)
    assert pq.read_schema(path).names == ["file", "row", "reason", "values"]
    assert write_quarantine([], path) == 0
    assert read_quarantine(path) == ()


def test_a_quarantine_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.parquet"
    write_quarantine([BAD], path)

    def rows() -> Iterator[BadRow]:
        for _ in range(30_000):
            yield BAD
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_quarantine(rows(), path)
    assert read_quarantine(path) == (BAD,)
    assert [p.name for p in tmp_path.iterdir()] == ["quarantine.parquet"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    expected = r"quarantine .*file/q\.parquet: bad rows cannot be kept there.*results\.root"
    with pytest.raises(TrafficError, match=expected):
        write_quarantine([BAD], tmp_path / "file" / "q.parquet")


def test_a_file_that_is_no_quarantine(tmp_path: Path) -> None:
    (tmp_path / "q.parquet").write_text("nothing of the kind")
    with pytest.raises(TrafficError, match=r"quarantine .*q\.parquet: cannot be read"):
        read_quarantine(tmp_path / "q.parquet")


def test_too_many_bad_rows_stop_the_run() -> None:
    check_bad_rows(0, 0, 0.0, first=None, quarantine_path="q.parquet")
    check_bad_rows(0, 1000, 0.0, first=None, quarantine_path="q.parquet")
    check_bad_rows(10, 1000, 0.01, first=BAD, quarantine_path="q.parquet")
    with pytest.raises(TrafficError) as error:
        check_bad_rows(11, 1000, 0.01, first=BAD, quarantine_path="runs/q.parquet")
    assert str(error.value) == (
        "traffic: 11 of 1000 rows are bad (1.100%, at most 1.000% allowed); the first is data/a.parquet, row 17: "
        "label is not 0 or 1; all are kept in runs/q.parquet; mend the traffic, or raise traffic.max_bad_fraction to "
        "go on without them"
    )
