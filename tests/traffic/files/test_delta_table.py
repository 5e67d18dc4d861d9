"""Traffic that is a Delta table: its log, not its folder, says which rows there are."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from lowprec.core.errors import ConfigError, TrafficError
from lowprec.traffic import Schema, TrafficReader, Window, open_traffic

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def table(tmp_path: Path, columns: Make) -> str:
    """A table of 100 rows in four commits, versions 0 to 3."""
    path = str(tmp_path / "clicks")
    for first in range(0, 100, 25):
        write_deltalake(path, pa.table(columns(25, first)), mode="append")
    return path


def times(reader: TrafficReader, window: Window = Window()) -> list[int]:  # noqa: B008  (frozen)
    return sorted(t for batch in reader.window(window).batches() for t in batch.times.tolist())


def opened(path: str, schema: Schema, version: int | None = None) -> TrafficReader:
    return open_traffic(path, schema, batch_size=8, version=version)


def test_rows_are_those_of_the_log(table: str, schema: Schema) -> None:
    assert times(opened(table, schema)) == list(range(100))
    DeltaTable(table).optimize.compact()
    assert len(list(Path(table).glob("*.parquet"))) == 5
    compacted = opened(table, schema)
    assert (compacted.version, times(compacted)) == (4, list(range(100)))
    DeltaTable(table).delete("a < 10")
    left = [i for i in range(100) if i % 50 >= 10]
    assert times(opened(table, schema)) == left
    assert times(opened(table, schema), Window(20, 60)) == [i for i in left if 20 <= i < 60]


def test_strings_that_an_update_rewrote_as_views_are_groups(columns: Make, schema: Schema, tmp_path: Path) -> None:
    path, schema = str(tmp_path / "clicks"), replace(schema, group="user")
    users = [f"user {i % 7}" for i in range(20)]
    write_deltalake(path, pa.table(columns(20) | {"user": pa.array(users)}))
    (before,) = (batch.groups for batch in open_traffic(path, schema, batch_size=20).window(Window()).batches())
    DeltaTable(path).update(updates={"d": "d + 1"}, predicate="a < 10")
    batch = open_traffic(path, schema, batch_size=20).window(Window()).batch(0)
    assert before is not None and batch.groups is not None
    by_time = dict(zip(batch.times.tolist(), batch.groups.tolist(), strict=True))
    assert by_time == dict(enumerate(before.tolist()))


def test_string_partitions_of_a_rewritten_table_are_groups(columns: Make, schema: Schema, tmp_path: Path) -> None:
    path, schema = str(tmp_path / "clicks"), replace(schema, group="user")
    users = [f"user {i % 2}" for i in range(20)]
    write_deltalake(path, pa.table(columns(20) | {"user": pa.array(users)}), partition_by=["user"])
    DeltaTable(path).delete("a < 10")
    groups = [batch.groups for batch in open_traffic(path, schema, batch_size=20).window(Window()).batches()]
    assert [len(set(found.tolist())) for found in groups if found is not None] == [2]


def test_a_version_is_pinned_and_part_of_the_fingerprint(table: str, schema: Schema) -> None:
    first = opened(table, schema, version=1)
    assert (first.version, times(first)) == (1, list(range(50)))
    window = Window(0, 25)  # the same rows of the same file at both versions
    prints = {opened(table, schema, version=v).window(window).fingerprint for v in (1, 2, None)}
    assert len(prints) == 3
    assert opened(table, schema, version=3).window(window).fingerprint in prints


def test_copies_of_a_window_go_on_reading_the_version_that_was_opened(table: str, schema: Schema) -> None:
    window = opened(table, schema).window(Window())
    DeltaTable(table).delete()
    copied = pickle.loads(pickle.dumps(window))
    assert sum(batch.num_rows for batch in copied.batches()) == 100


def test_partition_columns_have_the_values_of_the_log(columns: Make, schema: Schema, tmp_path: Path) -> None:
    path = str(tmp_path / "clicks")
    data = columns(4) | {"key": pa.array(["x y", "50%25", "a/b", "x y"])}
    write_deltalake(path, pa.table(data), partition_by=["key", "a"])
    batch = opened(path, replace(schema, group="key")).window(Window()).batch(0)
    assert sorted(zip(batch.times.tolist(), batch.sparse["a"].values.tolist(), strict=True)) == [
        (i, i) for i in range(4)
    ]
    assert batch.groups is not None
    groups = dict(zip(batch.times.tolist(), batch.groups.tolist(), strict=True))
    assert groups[0] == groups[3] and len({groups[i] for i in range(4)}) == 3


def test_a_date_partition_is_the_time(columns: Make, schema: Schema, tmp_path: Path) -> None:
    path = str(tmp_path / "clicks")
    data = columns(4) | {"ts": pa.array([date(2026, 1, 1), date(2026, 1, 2)] * 2)}
    write_deltalake(path, pa.table(data), partition_by=["ts"])
    reader = opened(path, schema)
    assert reader.time_unit == "s"
    assert reader.window(Window(0, 1767312000)).num_rows == 2


def test_a_column_that_was_added_later_is_null_in_earlier_rows(columns: Make, schema: Schema, tmp_path: Path) -> None:
    path = str(tmp_path / "clicks")
    late = columns(4, 4)
    write_deltalake(path, pa.table({k: v for k, v in columns(4).items() if k not in ("l", "w")}))
    write_deltalake(path, pa.table(late), mode="append", schema_mode="merge")
    batch = opened(path, schema).window(Window()).batch(0)
    assert batch.num_rows == 8
    bags = batch.sparse["l"]
    lengths = dict(zip(batch.times.tolist(), (bags.offsets[1:] - bags.offsets[:-1]).tolist(), strict=True))
    assert [lengths[i] for i in range(8)] == [0, 0, 0, 0, *(i % 3 for i in range(4, 8))]


def test_rows_without_a_time_column_stand_in_the_order_of_commits(table: str, schema: Schema) -> None:
    reader = opened(table, replace(schema, time=None))
    dense = [batch.dense[:, 0].tolist() for batch in reader.window(Window(0, 100)).batches()]
    assert [value for part in dense for value in part] == [float(i) for i in range(100)]


def test_versions_that_are_not_there_are_refused(table: str, columns: Make, write: Any, schema: Schema) -> None:
    with pytest.raises(ConfigError, match=r"traffic\.version: the Delta table .* no version 9: its latest is 3"):
        opened(table, schema, version=9)
    with pytest.raises(ConfigError, match=r"traffic\.version: version 2 is wanted .* is not a Delta table"):
        opened(write(columns(5)), schema, version=2)


def test_a_version_whose_files_are_gone_is_refused(table: str, schema: Schema) -> None:
    DeltaTable(table).optimize.compact()
    DeltaTable(table).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    assert times(opened(table, schema)) == list(range(100))
    with pytest.raises(TrafficError, match="belongs to version 3 of the Delta table, but is gone .*VACUUM"):
        opened(table, schema, version=3)


def test_parts_of_tables_and_folders_of_tables_are_refused(columns: Make, schema: Schema, tmp_path: Path) -> None:
    write_deltalake(str(tmp_path / "lake" / "clicks"), pa.table(columns(4)), partition_by=["a"])
    with pytest.raises(TrafficError, match=r"holds the Delta table .*/lake/clicks; set traffic\.path to the table"):
        opened(str(tmp_path / "lake"), schema)
    for part in ("a=1", next((tmp_path / "lake" / "clicks" / "a=1").iterdir()).relative_to(tmp_path / "lake/clicks")):
        with pytest.raises(TrafficError, match=r"is a part of the Delta table .*/lake/clicks"):
            opened(str(tmp_path / "lake" / "clicks" / part), schema)


@pytest.mark.parametrize(
    ("metadata", "kind"),
    [
        ("t/metadata/v1.metadata.json", "holds an Iceberg"),
        ("metadata/v1.metadata.json", "is an Iceberg"),
        ("t/.hoodie/hoodie.properties", "holds a Hudi"),
        (".hoodie/hoodie.properties", "is a Hudi"),
    ],
)
def test_other_table_formats_are_refused(
    columns: Make, write: Any, schema: Schema, tmp_path: Path, metadata: str, kind: str
) -> None:
    write(columns(4), "lake/t/data/part.parquet")
    file = tmp_path / "lake" / metadata
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{}")
    with pytest.raises(TrafficError, match=f"{kind} table, which is not supported"):
        opened(str(tmp_path / "lake"), schema)


def test_a_table_that_is_not_committed_or_damaged_is_refused(columns: Make, write: Any, schema: Schema) -> None:
    folder = Path(write(columns(4), "clicks/part.parquet")).parent
    log = folder / "_delta_log"
    log.mkdir()
    with pytest.raises(TrafficError, match="is not written yet; wait for its first commit"):
        opened(str(folder), schema)
    for text in ("", "{", '{"commitInfo": {}}'):
        (log / f"{0:020}.json").write_text(text)
        with pytest.raises(TrafficError, match=f"cannot be read as a Delta table: its log {log} is damaged"):
            opened(str(folder), schema)


@pytest.mark.parametrize("text", ["{broken", '{"add": 3}', "\x00", None])
def test_a_damaged_log_is_one_sentence_without_stack_frames(table: str, schema: Schema, text: str | None) -> None:
    log = Path(table) / "_delta_log"
    commit = log / f"{2:020}.json"
    commit.unlink() if text is None else commit.write_text(text)
    with pytest.raises(TrafficError) as raised:
        opened(table, schema)
    told = str(raised.value)
    assert f"its log {log} is damaged" in told and told.endswith("or write the rows to a new table")
    assert not {"<unknown>", "clone3", "ParsedLogPath"} & set(told.replace(":", " ").split())
    assert (f"{commit.name} is not a commit of Delta" in told) is (text is not None)


def test_an_empty_table_is_refused(table: str, schema: Schema) -> None:
    DeltaTable(table).delete()
    with pytest.raises(TrafficError, match="version 4 of the Delta table has no rows"):
        opened(table, schema)


def rewritten(table: str, features: list[str], configuration: dict[str, str] | None = None, **add: Any) -> str:
    """A copy of the table's first version, whose log asks for reader features and says more of its file."""
    copy = f"{table}-copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(table, copy)
    log = Path(copy) / "_delta_log"
    first = log / f"{0:020}.json"
    actions = [json.loads(line) for line in first.read_text().splitlines()]
    for file in log.iterdir():
        file.unlink()
    for action in actions:
        if "protocol" in action:
            action["protocol"] = {
                "minReaderVersion": 3,
                "minWriterVersion": 7,
                "readerFeatures": features,
                "writerFeatures": features,
            }
        if "metaData" in action:
            action["metaData"]["configuration"] = configuration or {}
        if "add" in action:
            action["add"].update(add)
    first.write_text("\n".join(map(json.dumps, actions)))
    return copy


def test_features_that_change_what_files_hold_are_refused(table: str, schema: Schema) -> None:
    kept = rewritten(table, ["deletionVectors", "v2Checkpoint", "vacuumProtocolCheck"])
    with pytest.raises(TrafficError, match="deletion vectors"):  # with another feature the client cannot look
        opened(kept, schema)
    assert times(opened(rewritten(table, ["deletionVectors"]), schema)) == list(range(25))
    assert times(opened(rewritten(table, ["v2Checkpoint", "vacuumProtocolCheck"]), schema)) == list(range(25))
    vector = {"storageType": "u", "pathOrInlineDv": "ab^-aqEH.-t@S}K{vb[*k^", "sizeInBytes": 40, "cardinality": 2}
    with pytest.raises(TrafficError, match="marks rows as deleted by deletion vectors.*REORG TABLE"):
        opened(rewritten(table, ["deletionVectors"], deletionVector={**vector, "offset": 4}), schema)
    with pytest.raises(TrafficError, match="cannot be read as a Delta table.*somethingNew"):
        opened(rewritten(table, ["somethingNew"]), schema)
    with pytest.raises(TrafficError, match=r"Delta table.*[cC]olumn"):
        opened(rewritten(table, ["columnMapping"], {"delta.columnMapping.mode": "name"}), schema)
    with pytest.raises(TrafficError, match="a file of another table"):
        opened(rewritten(table, [], path=f"file://{table}/part.parquet"), schema)


def test_tables_of_an_object_store(columns: Make, schema: Schema, bucket: str) -> None:
    from lowprec.storage.object_store import delta_options

    url = f"{bucket}/lake/clicks"
    options = delta_options(url)
    for first in (0, 25):
        data = columns(25, first) | {"key": pa.array(["x y", "z", None, "50%", "a/b"] * 5)}
        write_deltalake(url, pa.table(data), mode="append", partition_by=["key"], storage_options=options)
    DeltaTable(url, storage_options=options).optimize.compact()
    reader = opened(url, schema)
    assert (reader.version, times(reader)) == (2, list(range(50)))
    assert times(opened(url, schema, version=0)) == list(range(25))
    with pytest.raises(TrafficError, match="holds the Delta table s3://"):
        opened(f"{bucket}/lake", schema)
    with pytest.raises(TrafficError, match="is a part of the Delta table s3://"):
        opened(f"{url}/key=z", schema)
    with pytest.raises(ConfigError, match="its latest is 2"):
        opened(url, schema, version=3)
