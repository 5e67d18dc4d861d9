"""What is wrong with traffic is said in one sentence: what, where, what came, what to do."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lowprec.core.errors import ConfigError, TrafficError
from lowprec.storage import Location, object_store
from lowprec.traffic import Schema, SparseFeature, TrafficReader, Window, open_traffic

Make = Callable[..., dict[str, Any]]
Write = Callable[..., str]


def check(error: pytest.ExceptionInfo[BaseException], *parts: str) -> None:
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message
    assert error.value.__suppress_context__ or error.value.__context__ is None


def test_missing_columns_are_named_with_near_names(columns: Make, write: Write, schema: Schema, tmp_path: Path) -> None:
    write(columns(5), "data/1.parquet")
    write({("labels" if k == "label" else k): v for k, v in columns(5).items() if k != "l"}, "data/2.parquet")
    with pytest.raises(TrafficError) as error:
        open_traffic(str(tmp_path / "data"), schema, batch_size=4)
    check(error, "2.parquet", '"label" (traffic.label)', "did you mean labels?", '"l" (traffic.sparse l)', "unused")


@pytest.mark.parametrize(
    ("changed", "changes", "parts"),
    [
        ({"label": pa.array(["0", "1"])}, {}, ['"label" (traffic.label)', "bool, integer or float", "string"]),
        ({"d": pa.array(["0", "1"])}, {}, ['"d" (traffic.dense)', "a number or bool", "string"]),
        ({"d": pa.array([[0.5], [1.5]])}, {}, ['"d" (traffic.dense)', "a number or bool", "list"]),
        ({"a": pa.array(["0", "1"])}, {}, ['"a" (traffic.sparse a)', "an integer or a list of integers", "string"]),
        ({"a": pa.array([0.5, 1])}, {}, ['"a" (traffic.sparse a)', "an integer or a list of integers", "double"]),
        ({"l": pa.array([["x"], []])}, {}, ['"l" (traffic.sparse l)', "an integer or a list of integers", "string"]),
        ({"w": pa.array([0.5, 1])}, {}, ['"w" (traffic.sparse l.weights)', "a list of numbers", "double"]),
        ({"w": pa.array([["x"], []])}, {}, ['"w" (traffic.sparse l.weights)', "a list of numbers", "string"]),
        ({"ts": pa.array(["2020", "2021"])}, {}, ['"ts" (traffic.time)', "timestamp or a date", "string"]),
        ({"ts": pa.array([0.5, 1])}, {}, ['"ts" (traffic.time)', "timestamp or a date", "double"]),
        ({"x": pa.array(["1", "2"])}, {"weight": "x"}, ['"x" (traffic.weight)', "a number", "string"]),
        ({"x": pa.array([0.5, 1])}, {"group": "x"}, ['"x" (traffic.group)', "an integer or a string", "double"]),
    ],
)
def test_wrong_types_are_told_with_expected_and_found(
    columns: Make, write: Write, schema: Schema, changed: dict[str, Any], changes: dict[str, str], parts: list[str]
) -> None:
    with pytest.raises(TrafficError) as error:
        open_traffic(write(columns(2) | changed), replace(schema, **changes), batch_size=4)
    check(error, "traffic.parquet", "expected", "found", *parts)


def test_wrong_types_are_told_all_at_once(columns: Make, write: Write, schema: Schema, tmp_path: Path) -> None:
    wrong = {"label": pa.array(["0", "1"]), "w": pa.array([0.5, 1]), "a": pa.array([0.5, 1])}
    named = ('"label" (traffic.label)', '"w" (traffic.sparse l.weights)', '"a" (traffic.sparse a)')
    with pytest.raises(TrafficError) as error:
        open_traffic(write(columns(2) | wrong), schema, batch_size=4)
    check(error, *named, "rewrite the columns")
    # Of later files too, each column once.
    write(columns(2), "data/1.parquet")
    write(columns(2) | {"w": wrong["w"]}, "data/2.parquet")
    write(columns(2) | wrong, "data/3.parquet")
    with pytest.raises(TrafficError) as error:
        open_traffic(str(tmp_path / "data"), schema, batch_size=4)
    check(error, "2.parquet", "3.parquet", *named)
    assert str(error.value).count('"w"') == 1


def test_files_that_do_not_go_together(columns: Make, write: Write, schema: Schema, tmp_path: Path) -> None:
    write(columns(5), "data/1.parquet")
    write(columns(5) | {"a": columns(5)["l"]}, "data/2.parquet")
    with pytest.raises(TrafficError) as error:
        open_traffic(str(tmp_path / "data"), schema, batch_size=4)
    check(error, "2.parquet", '"a"', "expected int64 as in the files before it", "found list")


def test_values_that_do_not_fit_the_common_type(columns: Make, write: Write, schema: Schema, tmp_path: Path) -> None:
    write(columns(5), "data/1.parquet")
    write(columns(5) | {"a": pa.array([2**64 - 1] * 5, pa.uint64())}, "data/2.parquet")
    window = open_traffic(str(tmp_path / "data"), schema, batch_size=4).window(Window())
    with pytest.raises(TrafficError) as error:
        list(window.batches())
    check(error, "2.parquet", "row group 0", "18446744073709551615")


def test_nothing_there(
    columns: Make, write: Write, schema: Schema, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.csv").write_text("label\n1\n")
    write(columns(0), "norows.parquet")
    looked_from = f" (looked up from {Path.cwd()}); check traffic.path"
    for path, parts in {
        str(tmp_path / "absent"): ["absent", "no such file or folder", "traffic.path"],
        "runs/nope.parquet": ["traffic runs/nope.parquet: there is no such file or folder", looked_from],
        "my runs/nope.parquet": ["traffic my runs/nope.parquet: there is no such file or folder", looked_from],
        (tmp_path / "absent").as_uri(): ["file:///", "no such file or folder", "traffic.path"],
        str(tmp_path / "empty"): ["empty", "no Parquet file", "traffic.path"],
        str(tmp_path / "other"): ["other", "no Parquet file", "1 entries"],
        str(tmp_path / "other" / "data.csv"): ["data.csv", "cannot be read as Parquet"],
        str(tmp_path / "norows.parquet"): ["norows.parquet", "holds no rows"],
        "ftp://host/data": ["ftp://host/data", "URL cannot be opened"],
        "file://host/data": ["file://host/data"],
    }.items():
        with pytest.raises(TrafficError) as error:
            open_traffic(path, schema, batch_size=4)
        check(error, *parts)


def test_a_file_that_was_cut_short(columns: Make, write: Write, schema: Schema) -> None:
    path = Path(write(columns(500)))
    content = path.read_bytes()
    for length in (0, 3, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(TrafficError) as error:
            open_traffic(str(path), schema, batch_size=4)
        check(error, str(path), "truncated or corrupt?")


def test_a_file_that_may_not_be_read_is_not_taken_for_damaged(
    columns: Make, write: Write, schema: Schema, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(write(columns(5)))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, f"Failed to open local file '{path}'. Detail: [errno 13] Permission denied")

    monkeypatch.setattr(pq, "ParquetFile", refuse)  # root, which tests may run as, may read everything
    with pytest.raises(TrafficError) as error:
        open_traffic(str(path), schema, batch_size=4)
    check(error, f"traffic file {path}: cannot be read: Permission denied; check the file and its permissions")


def test_a_store_that_fails_is_not_taken_for_damage(
    columns: Make, write: Write, schema: Schema, s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Location.of(f"{bucket}/t.parquet").whole_file() as partial:
        partial.write_bytes(Path(write(columns(3000), row_group_size=1000)).read_bytes())
    window = open_traffic(f"{bucket}/t.parquet", schema, batch_size=100).window(Window())
    dataset = pickle.dumps(window)
    denied = "403 Forbidden", b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
    slow = "503 Service Unavailable", b"<Error><Code>SlowDown</Code><Message>no</Message></Error>"
    monkeypatch.setattr(object_store, "_ATTEMPTS", 1)
    for answer, reason in ((denied, "access is denied"), (slow, "AWS Error")):
        s3.answer = lambda environ, answer=answer: answer if environ["REQUEST_METHOD"] == "GET" else None
        with pytest.raises(TrafficError) as error:
            open_traffic(f"{bucket}/t.parquet", schema, batch_size=100)
        assert "corrupt" not in str(error.value) and "copy it again" not in str(error.value)
        check(error, f"traffic file {bucket}/t.parquet: cannot be read: {reason}")
    s3.answer = None
    window = pickle.loads(dataset)
    window.batch(0)
    s3.answer = lambda environ: denied
    with pytest.raises(TrafficError) as error:
        window.batch(29)
    check(error, f"traffic file {bucket}/t.parquet, row group 2: cannot be read: access is denied")
    s3.answer = None
    with Location.of(f"{bucket}/bad.parquet").whole_file() as partial:
        partial.write_bytes(b"PAR1" * 100)
    with pytest.raises(TrafficError) as error:
        open_traffic(f"{bucket}/bad.parquet", schema, batch_size=100)
    check(error, "truncated or corrupt?", "write or copy it again, or take it out of traffic.path")


@pytest.mark.parametrize("checksums", [True, False])
def test_damage_inside_a_file_names_the_row_group(columns: Make, write: Write, schema: Schema, checksums: bool) -> None:
    path = Path(write(columns(3000), row_group_size=1000, write_page_checksum=checksums, compression="zstd"))
    window = open_traffic(str(path), schema, batch_size=100).window(Window())
    content = bytearray(path.read_bytes())
    middle = len(content) * 4 // 9
    content[middle : middle + 3000] = b"\xff" * 3000
    path.write_bytes(bytes(content))
    with pytest.raises(TrafficError) as error:
        list(window.batches())
    check(error, str(path), "row group 1", "truncated or corrupt?")


def test_a_flipped_bit_is_found_by_the_checksum(columns: Make, write: Write, schema: Schema) -> None:
    data = columns(100) | {"d": pa.array([7.0] * 98 + [123.0, 500.0])}
    path = Path(write(data, write_page_checksum=True, compression="none", use_dictionary=False))
    content = path.read_bytes()
    value = struct.pack("<d", 123.0)  # neither least nor greatest, so it stands in the data only
    path.write_bytes(content.replace(value, struct.pack("<d", 124.0), 1))
    with pytest.raises(TrafficError) as error:
        open_traffic(str(path), schema, batch_size=100).window(Window()).batch(0)
    check(error, str(path), "row group 0", "truncated or corrupt?")


@pytest.mark.parametrize(
    ("num_rows", "first", "group_rows"),
    [(50, 0, 10), (100, 0, 50), (100, 0, 9), (100, 7, 10)],
    ids=["fewer row groups", "larger row groups", "smaller row groups", "other times"],
)
def test_a_file_that_is_replaced_while_it_is_read(
    columns: Make, write: Write, schema: Schema, num_rows: int, first: int, group_rows: int
) -> None:
    window = open_traffic(write(columns(100), row_group_size=10), schema, batch_size=4).window(Window(5, 95))
    worker = pickle.loads(pickle.dumps(window))  # which opens the file anew
    write(columns(num_rows, first), row_group_size=group_rows)
    with pytest.raises(TrafficError) as error:
        list(worker.batches())
    check(error, "traffic.parquet", "was replaced while it was read", "start again")


def test_a_file_that_is_replaced_before_its_window_is_taken(columns: Make, write: Write, schema: Schema) -> None:
    reader = open_traffic(write(columns(100), row_group_size=10), schema, batch_size=4)
    write(columns(100), row_group_size=9)
    with pytest.raises(TrafficError) as error:
        reader.window(Window(5, 95))
    check(error, "traffic.parquet, row group 0", "expected 10 rows, read 9", "was replaced while it was read")


@pytest.fixture
def gappy(columns: Make, write: Write, schema: Schema) -> TrafficReader:
    times = [*range(1_600_000_000, 1_600_000_040), *range(1_600_000_060, 1_600_000_100)]
    data = columns(80) | {"ts": pa.array(times)}
    return open_traffic(write(data, row_group_size=25), schema, batch_size=4)


@pytest.mark.parametrize(
    ("window", "parts"),
    [
        (Window(None, 1_600_000_000), ["the window lies before the data"]),
        (Window(5, 9), ["[5, 9)", "the window lies before the data"]),
        (Window(1_600_000_100, None), ["the window lies beyond the data", "..)"]),
        (
            Window(1_600_000_045, 1_600_000_050),
            ["in a gap of the data", "between 1600000039 (2020-09-13T12:27:19Z) and 1600000060 (2020-09-13T12:27:40Z)"],
        ),
    ],
)
def test_a_window_without_rows_tells_where_the_data_is(gappy: TrafficReader, window: Window, parts: list[str]) -> None:
    with pytest.raises(TrafficError) as error:
        gappy.window(window)
    check(
        error,
        "traffic.parquet",
        "no row lies in window [",
        "which spans 1600000000 (2020-09-13T12:26:40Z) to 1600000099 (2020-09-13T12:28:19Z)",
        *parts,
    )


def test_a_batch_has_a_size(columns: Make, write: Write, schema: Schema) -> None:
    with pytest.raises(ConfigError, match="batch_size: must be positive; got 0"):
        open_traffic(write(columns(5)), schema, batch_size=0)


def test_a_column_that_a_partition_folder_lacks(columns: Make, write: Write, schema: Schema, tmp_path: Path) -> None:
    data = {k: v for k, v in columns(4).items() if k != "a"}
    write(data, "data/a=1/part.parquet")
    write(data, "data/b=1/part.parquet")
    with pytest.raises(TrafficError) as error:
        open_traffic(str(tmp_path / "data"), schema, batch_size=4)
    check(error, "b=1/part.parquet", '"a" (traffic.sparse a)')


def test_a_partition_that_is_no_id(columns: Make, write: Write, schema: Schema, tmp_path: Path) -> None:
    write({k: v for k, v in columns(4).items() if k != "a"}, "data/a=x/part.parquet")
    features = (SparseFeature("a", "a", 5),)
    with pytest.raises(TrafficError) as error:
        open_traffic(str(tmp_path / "data"), replace(schema, sparse=features), batch_size=4)
    check(error, "a=x/part.parquet", '"a" (traffic.sparse a)', "found string")
