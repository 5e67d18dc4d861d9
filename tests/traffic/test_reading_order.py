"""Batches are the same whoever reads them, in whichever order, whatever the row groups."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowprec.traffic import Batch, Schema, SparseFeature, TrafficWindow, Window, open_traffic
from lowprec.traffic import reader as reader_module

SCHEMA = Schema(
    label="label",
    dense=("d",),
    sparse=(SparseFeature("a", "a", 50), SparseFeature("l", "l", 9, weights="w")),
    time="ts",
    missing_dense="error",
)


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches are equal to the bit."""
    return (
        one.index == other.index
        and one.bad_rows == other.bad_rows
        and one.labels.tobytes() == other.labels.tobytes()
        and one.times.tobytes() == other.times.tobytes()
        and one.dense.tobytes() == other.dense.tobytes()
        and all(
            one.sparse[f].values.tobytes() == other.sparse[f].values.tobytes()
            and one.sparse[f].offsets.tobytes() == other.sparse[f].offsets.tobytes()
            for f in one.sparse
        )
        and bytes(one.sparse["l"].weights) == bytes(other.sparse["l"].weights)  # type: ignore[arg-type]
    )


def rows_of(columns: Callable[..., dict[str, Any]], num_rows: int, *, seed: int | None = None) -> dict[str, Any]:
    """Rows out of order, one in thirty of them bad."""
    data = columns(num_rows)
    data["d"] = pa.array([None if i % 30 == 7 else float(i) for i in range(num_rows)], pa.float32())
    order = np.arange(num_rows) if seed is None else np.random.default_rng(seed).permutation(num_rows)
    table = pa.table(data).take(pa.array(order))
    return {name: table.column(name) for name in table.column_names}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_rows=st.integers(1, 400),
    group_rows=st.integers(1, 150),
    batch_size=st.integers(1, 170),
    seed=st.none() | st.integers(0, 3),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    cuts=st.lists(st.floats(0, 1), max_size=4),
)
def test_any_split_into_ranges_gives_the_same_batches(
    tmp_path: Path,
    columns: Callable[..., dict[str, Any]],
    num_rows: int,
    group_rows: int,
    batch_size: int,
    seed: int | None,
    bounds: tuple[float, float],
    cuts: list[float],
) -> None:
    data = rows_of(columns, num_rows, seed=seed)
    path = str(tmp_path / "traffic.parquet")
    pq.write_table(pa.table(data), path, row_group_size=group_rows)
    start, end = sorted(round(b * num_rows) for b in bounds)
    start = min(start, num_rows - 1)
    end = max(end, start + 1)
    window = open_traffic(path, SCHEMA, batch_size=batch_size).window(Window(start, end))
    whole = list(window.batches())

    # Batch k is the window's rows [k * B, (k + 1) * B) by position, bad rows counted.
    times = [t for t in data["ts"].to_pylist() if start <= t < end]
    for k, batch in enumerate(whole):
        expected = times[k * batch_size : (k + 1) * batch_size]
        assert batch.times.tolist() == [t for t in expected if t % 30 != 7]
        assert len(batch.bad_rows) == sum(t % 30 == 7 for t in expected)
    assert sum(batch.num_rows + len(batch.bad_rows) for batch in whole) == window.num_rows == len(times)

    worker = pickle.loads(pickle.dumps(window))
    edges = sorted({0, window.num_batches, *(int(c * window.num_batches) for c in cuts)})
    ranges = list(itertools.pairwise(edges))
    for first, last in reversed(ranges):
        assert all(map(same, worker.batches(first, last), whole[first:last]))
    for k in (*range(window.num_batches), *reversed(range(window.num_batches))):
        assert same(worker.batch(k), whole[k])


def shuffled(window: TrafficWindow, seed: int) -> list[Batch]:
    return list(window.batches_in_random_order(seed))


@pytest.mark.parametrize("cache_bytes", [0, 3_000, 1 << 26], ids=["streamed", "evicted", "cached"])
@pytest.mark.parametrize("bounds", [(None, None), (33, 367)])
def test_random_order_is_a_permutation_that_the_seed_decides(
    columns: Callable[..., dict[str, Any]],
    write: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    cache_bytes: int,
    bounds: tuple[int | None, int | None],
) -> None:
    monkeypatch.setattr(reader_module, "CACHE_BYTES", cache_bytes)
    path = write(rows_of(columns, 400, seed=1), row_group_size=23)
    window = open_traffic(path, SCHEMA, batch_size=9).window(Window(*bounds))
    whole = list(window.batches())
    once, again, other = shuffled(window, 5), shuffled(window, 5), shuffled(window, 6)
    order = [batch.index for batch in once]
    assert sorted(order) == list(range(window.num_batches)) and order != sorted(order)
    assert order == [batch.index for batch in again] != [batch.index for batch in other]
    assert all(same(batch, whole[batch.index]) for batch in once + other)


def test_every_batch_is_first_in_the_random_order_equally_often(
    columns: Callable[..., dict[str, Any]], write: Callable[..., str]
) -> None:
    window = open_traffic(write(columns(40)), SCHEMA, batch_size=10).window(Window())
    num_seeds = 200
    first = np.bincount([next(window.batches_in_random_order(seed)).index for seed in range(num_seeds)], minlength=4)
    # Each is binomial(200, 1/4); five of its standard deviations, four times, fail by chance once in 400,000.
    assert abs(first - num_seeds / 4).max() < 5 * np.sqrt(num_seeds * 0.25 * 0.75)


def test_two_readers_of_one_window_do_not_disturb_each_other(
    columns: Callable[..., dict[str, Any]], write: Callable[..., str]
) -> None:
    window = open_traffic(write(rows_of(columns, 300), row_group_size=40), SCHEMA, batch_size=7).window(Window())
    whole = list(window.batches())
    fast, slow = window.batches(0, 30), window.batches(10, 40)
    for k in range(30):
        assert same(next(fast), whole[k])
        assert same(next(slow), whole[k + 10])
        if k % 3 == 0:
            assert same(window.batch(k), whole[k])


def test_rising_ranges_decode_a_row_group_once(
    columns: Callable[..., dict[str, Any]], write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    original = pq.ParquetFile.iter_batches

    def spy(self: pq.ParquetFile, *args: Any, **kwargs: Any) -> Any:
        opened.append(kwargs["row_groups"])
        return original(self, *args, **kwargs)

    window = open_traffic(write(columns(3000), row_group_size=500), SCHEMA, batch_size=10).window(Window())
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    for first in range(0, 48, 8):  # as one of two workers that take turns
        list(window.batches(first, first + 4))
    assert opened == [[0]]
    list(window.batches(299, 300))  # far ahead: the row groups between are not read
    assert opened == [[0], [5]]
