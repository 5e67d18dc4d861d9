from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lowprec.core.errors import TrafficError
from lowprec.traffic import Schema, SparseFeature, Window, hash_text, open_traffic, parse_window

Make = Callable[..., dict[str, Any]]
Write = Callable[..., str]
Joined = Callable[..., dict[str, Any]]


def test_batches_hold_what_the_file_holds(columns: Make, write: Write, schema: Schema, joined: Joined) -> None:
    data = columns(100)
    window = open_traffic(write(data, row_group_size=17), schema, batch_size=8).window(Window())
    assert (window.num_rows, window.num_batches, window.time_range) == (100, 13, (0, 99))
    batches = list(window.batches())
    assert [batch.index for batch in batches] == list(range(13))
    assert [batch.num_rows for batch in batches] == [8] * 12 + [4]
    rows = joined(batches)
    for name in ("label", "ts", "d", "l", "w"):
        assert rows[name] == data[name].to_pylist(), name
    assert rows["a"] == [[i] for i in data["a"].to_pylist()]


def test_arrays_have_the_types_of_the_contract_and_can_be_written_to(
    columns: Make, write: Write, schema: Schema
) -> None:
    data = columns(10) | {"iw": pa.array([1, 2] * 5, pa.int32())}
    schema = replace(schema, weight="iw", group="a")
    batch = open_traffic(write(data), schema, batch_size=10).window(Window()).batch(0)
    assert (batch.labels.dtype, batch.dense.dtype, batch.times.dtype) == (np.float32, np.float32, np.int64)
    assert batch.weights is not None and batch.weights.dtype == np.float64
    assert batch.groups is not None and batch.groups.dtype == np.int64
    assert batch.dense.flags.c_contiguous
    for array in (batch.labels, batch.dense, batch.times, *(b.values for b in batch.sparse.values())):
        assert array.flags.writeable
    weights = batch.sparse["l"].weights
    assert weights is not None and weights.dtype == np.float32
    assert all(b.offsets.dtype == b.values.dtype == np.int64 for b in batch.sparse.values())


def test_a_folder_is_read_in_the_order_of_its_paths(
    columns: Make, write: Write, schema: Schema, joined: Joined, tmp_path: Path
) -> None:
    write(columns(10, 20), "data/z.parquet")
    write(columns(10, 0), "data/a/y.parquet")
    write(columns(10, 10), "data/b.parquet")
    write(columns(10, 90), "data/_hidden.parquet")
    write(columns(10, 90), "data/.stage/x.parquet")
    (tmp_path / "data" / "_SUCCESS").touch()
    for path in (str(tmp_path / "data"), f"file://{tmp_path}/data", f"{tmp_path}/data/"):
        window = open_traffic(path, schema, batch_size=7).window(Window())
        assert joined(window.batches())["ts"] == list(range(30))


def test_a_relative_path_and_a_single_file_url(
    columns: Make, write: Write, schema: Schema, joined: Joined, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write(columns(10))
    monkeypatch.chdir(tmp_path)
    for where in ("traffic.parquet", f"file://{path}"):
        assert joined(open_traffic(where, schema, batch_size=4).window(Window()).batches())["ts"] == list(range(10))


def test_partition_folders_are_columns(columns: Make, write: Write, schema: Schema, tmp_path: Path) -> None:
    for day in (1, 2):
        for country in ("de", "a%20b", "__HIVE_DEFAULT_PARTITION__"):
            data = {k: v for k, v in columns(4, 10 * day).items() if k not in ("a", "unused")}
            write(data, f"data/a={day}/country={country}/part.parquet")
    schema = replace(schema, group="country")
    batches = list(open_traffic(str(tmp_path / "data"), schema, batch_size=100).window(Window()).batches())
    assert batches[0].sparse["a"].values.tolist() == [1] * 8 + [2] * 8
    assert batches[0].groups is not None
    assert batches[0].groups.tolist() == [hash_text("a b")] * 4 + [hash_text("de")] * 4 + (
        [hash_text("a b")] * 4 + [hash_text("de")] * 4
    )
    assert [bad.reason for bad in batches[0].bad_rows] == ["null group"] * 8


def test_time_may_stand_in_the_folders(columns: Make, write: Write, schema: Schema, tmp_path: Path) -> None:
    for day in (1, 2, 3):
        write(columns(5), f"data/day=2020-01-0{day}/part.parquet", row_group_size=2)
    reader = open_traffic(str(tmp_path / "data"), replace(schema, time="day"), batch_size=100)
    assert reader.time_unit == "s"
    window = reader.window(parse_window("2020-01-02", "2020-01-03", unit=reader.time_unit, key="w"))
    assert window.num_rows == 5
    assert set(window.batch(0).times.tolist()) == {1_577_923_200}
    with pytest.raises(TrafficError, match="beyond the data"):
        reader.window(parse_window("2020-01-04", None, unit=reader.time_unit, key="w"))


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize(("start", "end"), [(0, 100), (13, 57), (None, 1), (99, None), (20, 40), (31, 32)])
def test_a_window_takes_its_rows_whatever_the_row_groups(
    columns: Make, write: Write, schema: Schema, joined: Joined, statistics: bool, start: int | None, end: int | None
) -> None:
    path = write(columns(100), row_group_size=20, write_statistics=statistics)
    window = open_traffic(path, schema, batch_size=6).window(Window(start, end))
    expected = list(range(start or 0, 100 if end is None else end))
    assert window.num_rows == len(expected)
    assert window.time_range == (expected[0], expected[-1])
    assert joined(window.batches())["ts"] == expected
    assert joined(window.batches())["d"] == expected


def test_rows_need_not_be_sorted_by_time(columns: Make, write: Write, schema: Schema, joined: Joined) -> None:
    order = np.random.default_rng(0).permutation(200)
    data = pa.table(columns(200)).take(pa.array(order))
    path = write({name: data.column(name) for name in data.column_names}, row_group_size=30)
    window = open_traffic(path, schema, batch_size=11).window(Window(50, 120))
    expected = [t for t in order.tolist() if 50 <= t < 120]
    assert joined(window.batches())["ts"] == expected


def test_without_a_time_column_windows_are_row_positions(
    columns: Make, write: Write, schema: Schema, joined: Joined, tmp_path: Path
) -> None:
    write(columns(30), "data/a.parquet", row_group_size=7)
    write(columns(30, 30), "data/b.parquet", row_group_size=7)
    reader = open_traffic(str(tmp_path / "data"), replace(schema, time=None), batch_size=8)
    assert reader.time_unit is None and reader.time_range == (0, 59)
    rows = joined(reader.window(Window(10, 45)).batches())
    assert rows["ts"] == rows["d"] == list(range(10, 45))


TIME_TYPES = [
    (pa.int32(), "s", 10**9),
    (pa.uint32(), "s", 10**9),
    (pa.timestamp("s"), "ms", 10**6),  # Parquet has no seconds
    (pa.timestamp("ms"), "ms", 10**6),
    (pa.timestamp("us", "Europe/Berlin"), "us", 10**3),
    (pa.timestamp("ns"), "ns", 1),
    (pa.date32(), "s", 10**9),
    (pa.date64(), "s", 10**9),
]


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize(("kind", "unit", "nanoseconds"), TIME_TYPES, ids=lambda value: str(value))
def test_times_keep_the_unit_of_their_column(
    columns: Make, write: Write, schema: Schema, kind: pa.DataType, unit: str, nanoseconds: int, statistics: bool
) -> None:
    seconds = [1_577_836_800 + 86_400 * i for i in range(10)]
    if pa.types.is_date(kind):
        times = pa.array([date.fromordinal(date(2020, 1, 1).toordinal() + i) for i in range(10)], kind)
    elif pa.types.is_timestamp(kind):
        times = pa.array(seconds, pa.timestamp("s", kind.tz)).cast(kind)
    else:
        times = pa.array(seconds, kind)
    path = write(columns(10) | {"ts": times}, row_group_size=3, write_statistics=statistics)
    reader = open_traffic(path, schema, batch_size=100)
    assert reader.time_unit == unit
    window = reader.window(parse_window("2020-01-03", "2020-01-08", unit=reader.time_unit, key="w"))
    assert window.batch(0).times.tolist() == [s * 10**9 // nanoseconds for s in seconds[2:7]]


def test_unsigned_times_beyond_two_to_the_31(columns: Make, write: Write, schema: Schema) -> None:
    times = [2**31 - 5 + i for i in range(10)]
    path = write(columns(10) | {"ts": pa.array(times, pa.uint32())}, row_group_size=3)
    reader = open_traffic(path, schema, batch_size=100)
    assert reader.time_range == (times[0], times[-1])
    assert reader.window(Window(times[4], times[8])).batch(0).times.tolist() == times[4:8]


def test_files_with_times_in_other_units_and_zones(columns: Make, write: Write, schema: Schema, tmp_path: Path) -> None:
    seconds = [1_577_836_800 + 3600 * i for i in range(20)]
    for part, kind in enumerate((pa.timestamp("ms", "Asia/Tokyo"), pa.timestamp("us", "America/New_York"))):
        times = pa.array(seconds[10 * part : 10 * part + 10], pa.timestamp("s", kind.tz)).cast(kind)
        write(columns(10, 10 * part) | {"ts": times}, f"data/{part}.parquet", row_group_size=4)
    reader = open_traffic(str(tmp_path / "data"), schema, batch_size=100)
    assert reader.time_unit == "us" and reader.time_range == (seconds[0] * 10**6, seconds[-1] * 10**6)
    window = reader.window(parse_window("2020-01-01T05:00", "2020-01-01T13:00", unit=reader.time_unit, key="w"))
    assert window.batch(0).times.tolist() == [s * 10**6 for s in seconds[5:13]]


def test_old_96_bit_timestamps(columns: Make, write: Write, schema: Schema) -> None:
    times = pa.array([datetime(2020, 1, 1 + i) for i in range(10)], pa.timestamp("us"))
    path = write(columns(10) | {"ts": times}, row_group_size=3, use_deprecated_int96_timestamps=True)
    reader = open_traffic(path, schema, batch_size=100)
    assert reader.time_unit == "ns"
    assert reader.window(parse_window("2020-01-05", None, unit="ns", key="w")).num_rows == 6


def test_files_may_differ_in_the_types_of_their_columns(
    columns: Make, write: Write, schema: Schema, joined: Joined, tmp_path: Path
) -> None:
    first, second, third = columns(10), columns(10, 10), columns(10, 20)
    first |= {"a": first["a"].cast(pa.int32()), "ts": first["ts"].cast(pa.int32())}
    second |= {"l": second["l"].cast(pa.large_list(pa.uint16())), "d": second["d"].cast(pa.int16())}
    third |= {"label": third["label"].cast(pa.bool_()), "w": third["w"].cast(pa.list_(pa.float64()))}
    third |= {"a": third["a"].dictionary_encode(), "d": third["d"].cast(pa.decimal128(9, 2))}
    for name, data in {"1": first, "2": second, "3": third}.items():
        write(data, f"data/{name}.parquet")
    whole = columns(30)
    rows = joined(open_traffic(str(tmp_path / "data"), schema, batch_size=7).window(Window()).batches())
    assert rows["a"] == [[i] for i in whole["a"].to_pylist()]
    for name in ("label", "ts", "d", "l", "w"):
        assert rows[name] == whole[name].to_pylist(), name


def test_lists_of_a_fixed_size_and_ids_above_two_to_the_63(columns: Make, write: Write, schema: Schema) -> None:
    huge = [2**64 - 1 - i for i in range(4)]
    data = columns(4) | {
        "a": pa.array(huge, pa.uint64()),
        "l": pa.array([[1, 2], None, [3, 4], [5, 6]], pa.list_(pa.int32(), 2)),
    }
    features = (SparseFeature("a", "a", modulo=1000, num_embeddings=1000), SparseFeature("l", "l", 9))
    batch = open_traffic(write(data), replace(schema, sparse=features), batch_size=4).window(Window()).batch(0)
    assert batch.sparse["a"].values.tolist() == [i % 1000 for i in huge]
    assert batch.sparse["l"].values.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.sparse["l"].offsets.tolist() == [0, 2, 2, 4, 6]


@pytest.mark.parametrize("view", [pa.list_view, pa.large_list_view])
def test_views_are_read_as_the_types_that_they_are_views_of(
    columns: Make, write: Write, schema: Schema, view: Callable[[pa.DataType], pa.DataType]
) -> None:
    ids, weights = [[1, 2], None, [3], []], [[0.5, 1], None, [2], []]
    views = {"l": pa.array(ids, view(pa.int32())), "w": pa.array(weights, view(pa.float32()))}
    plain = {"l": pa.array(ids, pa.list_(pa.int32())), "w": pa.array(weights, pa.list_(pa.float32()))}
    users = ["anna", "bob", "anna", "a name of more than twelve bytes"]
    schema = replace(schema, group="user")
    first, second = (
        open_traffic(write(columns(4) | data | {"user": pa.array(users, text)}, name), schema, batch_size=3)
        for data, text, name in ((views, pa.string_view(), "views"), (plain, pa.string(), "plain"))
    )
    for a, b in zip(first.window(Window()).batches(), second.window(Window()).batches(), strict=True):
        assert a.groups is not None and b.groups is not None
        assert a.groups.tolist() == b.groups.tolist()
        assert a.sparse["l"].values.tolist() == b.sparse["l"].values.tolist()
        assert a.sparse["l"].offsets.tolist() == b.sparse["l"].offsets.tolist()


def test_columns_without_any_value(columns: Make, write: Write, schema: Schema) -> None:
    nothing = pa.nulls(4)
    data = columns(4) | {"a": nothing, "l": nothing, "w": nothing, "d": nothing, "label": nothing}
    schema = replace(schema, missing_dense="zero")
    batch = open_traffic(write(data), schema, batch_size=4).window(Window()).batch(0)
    assert np.isnan(batch.labels).all() and batch.dense.tolist() == [[0.0]] * 4
    assert batch.sparse["a"].offsets.tolist() == batch.sparse["l"].offsets.tolist() == [0] * 5


def test_one_column_may_play_several_parts(columns: Make, write: Write, schema: Schema) -> None:
    schema = replace(schema, sparse=(SparseFeature("x", "a", 50), SparseFeature("y", "a", 7, 7)), group="a")
    batch = open_traffic(write(columns(60)), replace(schema, dense=("a", "d")), batch_size=60).window(Window()).batch(0)
    assert batch.groups is not None and batch.groups.tolist() == batch.sparse["x"].values.tolist()
    assert batch.sparse["y"].values.tolist() == [i % 50 % 7 for i in range(60)]
    assert batch.dense[:, 0].tolist() == [i % 50 for i in range(60)]


def test_columns_with_dots_in_their_names(columns: Make, write: Write, schema: Schema) -> None:
    data = columns(40)
    renamed = data | {"x.l": data["l"], "x.ts": data["ts"]}
    schema = replace(schema, time="x.ts", sparse=(SparseFeature("l", "x.l", 9, weights="w"),))
    window = open_traffic(write(renamed, row_group_size=9), schema, batch_size=40).window(Window(10, 30))
    assert window.batch(0).sparse["l"].values.tolist() == [i for ids in data["l"].to_pylist()[10:30] for i in ids]


def test_strings_group_rows_by_a_hash_that_never_changes(columns: Make, write: Write, schema: Schema) -> None:
    users = ["anna", "bob", "anna", "Ünï"]
    path = write(columns(4) | {"user": pa.array(users).dictionary_encode()})
    batch = open_traffic(path, replace(schema, group="user"), batch_size=4).window(Window()).batch(0)
    assert batch.groups is not None
    assert batch.groups.tolist() == [hash_text(user) for user in users]
    # BLAKE2b-64 of "anna", read as a signed little-endian integer; stored evidence depends on it.
    assert hash_text("anna") == -8337706299035466544


def test_only_needed_columns_are_read(
    columns: Make, write: Write, schema: Schema, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    original = pq.ParquetFile.iter_batches

    def spy(self: pq.ParquetFile, *args: Any, columns: list[str], **kwargs: Any) -> Any:
        asked.append(columns)
        return original(self, *args, columns=columns, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    reader = open_traffic(write(columns(100), row_group_size=20), schema, batch_size=50)
    window = reader.window(Window(20, 60))
    assert asked == []  # the statistics of the row groups tell enough
    window = reader.window(Window(30, 60))
    assert asked == [["ts"]]  # one row group straddles the start
    list(window.batches())
    assert all(sorted(columns) == ["a", "d", "l", "label", "ts", "w"] for columns in asked[1:])
    assert len(asked) == 3


def test_a_window_is_cheap_to_send(columns: Make, write: Write, schema: Schema, joined: Joined) -> None:
    window = open_traffic(write(columns(1000), row_group_size=10), schema, batch_size=8).window(Window(5, 900))
    list(window.batches(0, 3))  # leaves a file open
    data = pickle.dumps(window)
    assert len(data) < 20_000  # 100 row groups of about 100 bytes, schema and path
    assert joined(pickle.loads(data).batches()) == joined(window.batches())


def test_batches_outside_the_window_do_not_exist(columns: Make, write: Write, schema: Schema) -> None:
    window = open_traffic(write(columns(20)), schema, batch_size=8).window(Window())
    assert list(window.batches(3)) == [] and list(window.batches(1, 1)) == []
    for first, last in ((0, 4), (-1, 2), (2, 1), (4, None)):
        with pytest.raises(IndexError, match="3 batches"):
            window.batches(first, last)
