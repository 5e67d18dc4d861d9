"""Rows for results tables."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lowprec.results.schema import TABLES

_SAMPLES = {
    pa.string(): "x",
    pa.int64(): 1,
    pa.float64(): 0.5,
    pa.timestamp("us", tz="UTC"): datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
}


@pytest.fixture
def row() -> Callable[..., dict[str, Any]]:
    """Makes a row that fits a table: `row("trials", "key", number=3)`."""

    def make(table: str, key: str, **values: Any) -> dict[str, Any]:
        sample = {field.name: _SAMPLES[field.type] for field in TABLES[table].arrow if field.name != "committed_at"}
        return {**sample, "row_key": key, **values}

    return make


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A root of either kind."""
    return f"{request.getfixturevalue('bucket')}/runs" if request.param == "s3" else str(tmp_path / "runs")
