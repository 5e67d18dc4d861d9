from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lowprec.traffic import Batch, Schema, SparseFeature

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """The folder of real logs. They cannot be given away, so a checkout elsewhere has none; CI must have them."""
    if not SHARED_DATA.is_dir():
        reason = f"the real logs are not at {SHARED_DATA}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return SHARED_DATA


@pytest.fixture
def schema() -> Schema:
    """What `columns` holds: one dense, one single id with a table of 50, one list of ids with weights."""
    return Schema(
        label="label",
        dense=("d",),
        sparse=(SparseFeature("a", "a", 50), SparseFeature("l", "l", 9, weights="w")),
        time="ts",
    )


@pytest.fixture
def columns() -> Callable[..., dict[str, Any]]:
    """Makes n rows as columns; row i has label i % 2, time i, dense i, id i % 50 and a list of i % 3 ids."""

    def make(num_rows: int, first: int = 0) -> dict[str, Any]:
        rows = range(first, first + num_rows)
        return {
            "label": pa.array([i % 2 for i in rows], pa.int8()),
            "ts": pa.array(list(rows), pa.int64()),
            "d": pa.array([float(i) for i in rows], pa.float32()),
            "a": pa.array([i % 50 for i in rows], pa.int64()),
            "l": pa.array([[(i + j) % 9 for j in range(i % 3)] for i in rows], pa.list_(pa.int64())),
            "w": pa.array([[0.5 + j for j in range(i % 3)] for i in rows], pa.list_(pa.float32())),
            "unused": pa.array(["x" * 50] * num_rows),
        }

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes columns to a Parquet file below the test's folder and returns its path."""

    def write_file(columns: dict[str, Any], name: str = "traffic.parquet", **options: Any) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path, **options)
        return str(path)

    return write_file


@pytest.fixture
def joined() -> Callable[[Iterable[Batch]], dict[str, Any]]:
    """All rows of some batches as plain lists, to compare with."""

    def join(batches: Iterable[Batch]) -> dict[str, Any]:
        rows: dict[str, Any] = {"label": [], "ts": [], "d": [], "a": [], "l": [], "w": []}
        for batch in batches:
            rows["label"] += batch.labels.tolist()
            rows["ts"] += batch.times.tolist()
            rows["d"] += batch.dense[:, 0].tolist()
            for name in ("a", "l"):
                bags = batch.sparse[name]
                rows[name] += [part.tolist() for part in np.split(bags.values, bags.offsets[1:-1])]
                if bags.weights is not None:
                    rows["w"] += [part.tolist() for part in np.split(bags.weights, bags.offsets[1:-1])]
        return rows

    return join
