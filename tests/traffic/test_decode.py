from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lowprec.core.errors import TrafficError
from lowprec.traffic import Batch, Schema, SparseFeature, Window, open_traffic

Make = Callable[..., dict[str, Any]]
Write = Callable[..., str]
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def decode(columns: Make, write: Write, schema: Schema) -> Callable[..., Batch]:
    """The one batch of six good rows with some columns replaced and the schema changed."""

    def decoded(changed: dict[str, Any], **changes: Any) -> Batch:
        path = write(columns(6) | changed)
        return open_traffic(path, replace(schema, **changes), batch_size=100).window(Window()).batch(0)

    return decoded


LIST = pa.list_(pa.int64())
WEIGHTS = pa.list_(pa.float32())


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"label": pa.array([0, 1, 0, 2, 0, 1])}, "label is not 0 or 1"),
        ({"label": pa.array([0, 1, 0, 0.5, 0, 1])}, "label is not 0 or 1"),
        ({"label": pa.array([0, 1, 0, NAN, 0, 1])}, "label is not 0 or 1"),
        ({"label": pa.array([0, 1, 0, -1, 0, 1], pa.int8())}, "label is not 0 or 1"),
        (
            {"d": pa.array([0, 1, 2, None, 4, 5], pa.float32())},
            'missing dense value in column "d" (traffic.missing_dense: zero takes it for 0)',
        ),
        ({"d": pa.array([0, 1, 2, NAN, 4, 5], pa.float32())}, 'NaN or infinite dense value in column "d"'),
        ({"d": pa.array([0, 1, 2, -INF, 4, 5])}, 'NaN or infinite dense value in column "d"'),
        ({"d": pa.array([0, 1, 2, 1e39, 4, 5])}, 'NaN or infinite dense value in column "d"'),  # beyond float32
        ({"ts": pa.array([0, 1, 2, None, 4, 5])}, "null time"),
        (
            {"l": pa.array([[], [1], [2, 3], [None], [4], [5, 6]], LIST), "w": [[], [1], [1, 1], [1], [1], [1, 1]]},
            'null id in the list of feature "l"',
        ),
        (
            {"w": pa.array([[], [0.5], [0.5, 1.5], [1.0], [0.5], [0.5, 1.5]], WEIGHTS)},
            'feature "l" has another number of weights than ids',
        ),
        (
            {"l": [[]] * 3 + [[1]] + [[]] * 2, "w": pa.array([[], None, [], [None], [], []], WEIGHTS)},
            'null, NaN or infinite weight of an id of feature "l"',
        ),
        (
            {"l": [[]] * 3 + [[1, 2]] + [[]] * 2, "w": pa.array([[], None, [], [1, NAN], [], []], WEIGHTS)},
            'null, NaN or infinite weight of an id of feature "l"',
        ),
    ],
)
@pytest.mark.parametrize("log1p", [frozenset(), frozenset({"d"})])
def test_a_bad_row_is_taken_out_and_told(
    decode: Callable[..., Batch], columns: Make, changed: dict[str, Any], reason: str, log1p: frozenset[str]
) -> None:
    batch = decode(changed, log1p=log1p)
    assert batch.times.tolist() == [0, 1, 2, 4, 5]
    assert batch.num_rows == len(batch.dense) == 5
    assert all(len(bags.offsets) == 6 for bags in batch.sparse.values())
    [bad] = batch.bad_rows
    assert (bad.row, bad.reason) == (3, reason)
    assert bad.file.endswith("traffic.parquet")
    values = json.loads(bad.values)  # strict JSON even with NaN inside
    assert sorted(values) == ["a", "d", "l", "label", "ts", "w"] and values["a"] == 3


@pytest.mark.parametrize("weight", [None, NAN, -0.5, INF])
def test_example_weights_are_finite_and_not_negative(decode: Callable[..., Batch], weight: float | None) -> None:
    batch = decode({"x": pa.array([0.0, 1, 2, weight, 4, 5])}, weight="x")
    assert batch.weights is not None and batch.weights.tolist() == [0, 1, 2, 4, 5]
    [bad] = batch.bad_rows
    assert (bad.row, bad.reason) == (3, "example weight is null, NaN, infinite or negative")


@pytest.mark.parametrize("group", [pa.array([7, 7, 8, None, 8, 8]), pa.array(["u", "u", "v", None, "v", "v"])])
def test_a_row_without_a_group_is_bad(decode: Callable[..., Batch], group: pa.Array) -> None:
    batch = decode({"user": group}, group="user")
    assert batch.groups is not None
    a, b, c, d, e = batch.groups.tolist()
    assert a == b != c == d == e
    assert [(bad.row, bad.reason) for bad in batch.bad_rows] == [(3, "null group")]


def test_every_row_may_be_bad_and_the_first_reason_is_told(decode: Callable[..., Batch]) -> None:
    batch = decode({"label": [2] * 6, "d": pa.array([NAN] * 6)})
    assert batch.num_rows == 0 and batch.dense.shape == (0, 1)
    assert batch.sparse["l"].offsets.tolist() == [0]
    assert [(bad.row, bad.reason) for bad in batch.bad_rows] == [(i, "label is not 0 or 1") for i in range(6)]


def test_a_row_without_a_time_is_counted_in_every_window_that_its_row_group_meets(
    columns: Make, write: Write, schema: Schema
) -> None:
    times = pa.array([0, 1, None, 3, 10, 11, 12, 13, None, None, None, None])
    for statistics in (True, False):
        path = write(columns(12) | {"ts": times}, row_group_size=4, write_statistics=statistics)
        reader = open_traffic(path, schema, batch_size=100)
        for window, num_rows, bad in [((0, 2), 7, [2, 8, 9, 10, 11]), ((10, None), 8, [8, 9, 10, 11])]:
            batch = reader.window(Window(*window)).batch(0)
            assert batch.num_rows + len(batch.bad_rows) == num_rows
            assert [bad.row for bad in batch.bad_rows] == bad


def test_null_labels_are_unknown_not_bad(decode: Callable[..., Batch]) -> None:
    batch = decode({"label": pa.array([True, None, False, None, True, True])})
    assert batch.bad_rows == ()
    assert np.array_equal(batch.labels, np.array([1, NAN, 0, NAN, 1, 1], np.float32), equal_nan=True)


def test_missing_dense_values_become_zero_where_asked(decode: Callable[..., Batch]) -> None:
    batch = decode({"d": pa.array([None, 1, None, 3, 4, 5], pa.int32())}, missing_dense="zero")
    assert batch.dense[:, 0].tolist() == [0, 1, 0, 3, 4, 5] and batch.bad_rows == ()


def test_log1p_columns(decode: Callable[..., Batch]) -> None:
    values = [-3.0, 0.0, 1.0, 20.0, 1e6, None]
    batch = decode({"d": pa.array(values)}, missing_dense="zero", log1p=frozenset({"d"}))
    expected = np.log1p(np.array([0, 0, 1, 20, 1e6, 0], np.float32))
    assert batch.dense[:, 0].tolist() == expected.tolist()


def test_null_ids_are_empty_bags(decode: Callable[..., Batch]) -> None:
    lists = pa.array([None, [1], [], [2, 3], None, [4]], LIST)
    weights = pa.array([None, [1], None, [2, 3], [], [4]], WEIGHTS)
    batch = decode({"a": pa.array([None, 1, 2, None, 4, None]), "l": lists, "w": weights})
    assert batch.sparse["a"].values.tolist() == [1, 2, 4]
    assert batch.sparse["a"].offsets.tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert batch.sparse["l"].values.tolist() == [1, 2, 3, 4]
    assert batch.sparse["l"].offsets.tolist() == [0, 0, 1, 1, 3, 3, 4]
    assert batch.sparse["l"].weights is not None and batch.sparse["l"].weights.tolist() == [1, 2, 3, 4]


def test_modulo_folds_to_the_table_also_below_zero(decode: Callable[..., Batch]) -> None:
    raw = [-1, -7, 7, 2**62, -(2**63), 0]
    batch = decode({"a": pa.array(raw)}, sparse=(SparseFeature("a", "a", 7, modulo=7),))
    assert batch.sparse["a"].values.tolist() == [i % 7 for i in raw]
    assert batch.out_of_range == {}


FEATURES = (SparseFeature("a", "a", 5), SparseFeature("l", "l", 9, weights="w"))
STRAY = {
    "a": pa.array([0, 5, 4, -1, None, 2**40]),
    "l": pa.array([[1, 9, 2], [], None, [-1], [8, 99], [0]], LIST),
    "w": pa.array([[1, 2, 3], [], [], [4], [5, 6], [7]], WEIGHTS),
}


def test_stray_ids_are_dropped_with_their_weights(decode: Callable[..., Batch]) -> None:
    batch = decode(STRAY, sparse=FEATURES, bounds_check="drop")
    assert batch.out_of_range == {"a": 3, "l": 3}
    assert batch.sparse["a"].values.tolist() == [0, 4]
    assert batch.sparse["a"].offsets.tolist() == [0, 1, 1, 2, 2, 2, 2]
    assert batch.sparse["l"].values.tolist() == [1, 2, 8, 0]
    assert batch.sparse["l"].offsets.tolist() == [0, 2, 2, 2, 2, 3, 4]
    assert batch.sparse["l"].weights is not None and batch.sparse["l"].weights.tolist() == [1, 3, 5, 7]


def test_stray_ids_become_row_zero(decode: Callable[..., Batch]) -> None:
    batch = decode(STRAY, sparse=FEATURES, bounds_check="zero")
    assert batch.out_of_range == {"a": 3, "l": 3}
    assert batch.sparse["a"].values.tolist() == [0, 0, 4, 0, 0]
    assert batch.sparse["l"].values.tolist() == [1, 0, 2, 0, 8, 0, 0]
    assert batch.sparse["l"].weights is not None
    assert batch.sparse["l"].weights.tolist() == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("changed", "row", "feature", "found", "size"),
    [
        ({"a": pa.array([0, 1, 50, 3, 4, 99])}, 2, "a", "50", "50"),
        ({"a": pa.array([0, 1, 2, 3, -8, 5])}, 4, "a", "-8", "50"),
        ({"a": pa.array([0, 1, None, 3, 4, 2**64 - 1], pa.uint64())}, 5, "a", str(2**64 - 1), "50"),
        ({"l": pa.array([[], [1], [2, 9], [], [1], [1, 2]], LIST)}, 2, "l", "9", "9"),
    ],
)
def test_stray_ids_stop_the_run_by_default(
    decode: Callable[..., Batch], changed: dict[str, Any], row: int, feature: str, found: str, size: str
) -> None:
    with pytest.raises(TrafficError) as error:
        decode(changed)
    message = str(error.value)
    expected = f'traffic.parquet, row {row}: feature "{feature}" has id {found}; the table has {size} rows'
    assert expected in message, message
    assert all(hint in message for hint in ("modulo", "bounds_check", "drop", "zero", "num_embeddings")), message


def test_ids_of_bad_rows_are_not_judged(decode: Callable[..., Batch]) -> None:
    batch = decode({"a": pa.array([0, 1, 99, 3, 4, 5]), "label": [0, 0, 7, 0, 0, 0]})
    assert [bad.row for bad in batch.bad_rows] == [2] and batch.sparse["a"].values.tolist() == [0, 1, 3, 4, 5]


def test_an_unknown_table_size_forbids_negative_ids_only(decode: Callable[..., Batch]) -> None:
    features = (SparseFeature("a", "a"),)
    assert decode({"a": pa.array([0, 1, 2, 3, 4, 2**62])}, sparse=features).sparse["a"].values[-1] == 2**62
    with pytest.raises(TrafficError, match='row 5: feature "a" has id -1; negative ids fit no table'):
        decode({"a": pa.array([0, 1, 2, 3, 4, -1])}, sparse=features)


def test_the_position_of_a_bad_row_is_the_one_in_its_file(
    columns: Make, write: Write, schema: Schema, tmp_path: Any
) -> None:
    for part in range(3):
        data = columns(20, 20 * part)
        data["d"] = pa.array([NAN if i == 3 + part else 0.0 for i in range(20)])
        write(data, f"data/{part}.parquet", row_group_size=6)
    window = open_traffic(str(tmp_path / "data"), schema, batch_size=50).window(Window(2, 59))
    found = [(bad.file[-9:], bad.row) for batch in window.batches() for bad in batch.bad_rows]
    assert found == [("0.parquet", 3), ("1.parquet", 4), ("2.parquet", 5)]
