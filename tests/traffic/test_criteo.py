from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lowprec.core.errors import TrafficError
from lowprec.traffic import convert_criteo, read_criteo
from lowprec.traffic import criteo as criteo_module
from lowprec.traffic.criteo import CRITEO_SCHEMA

LABELLED = b"\t".join([b"1", *(str(i - 2).encode() for i in range(13)), *(b"%08x" % (i * 7**9) for i in range(26))])
EMPTY = b"0" + b"\t" * 39


def write_lines(path: Path, lines: list[bytes], *, end: bytes = b"\n", last: bytes = b"\n") -> Path:
    path.write_bytes(end.join(lines) + last)
    return path


def test_the_real_log_converts_exactly(shared_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "criteo.parquet"
    assert convert_criteo(shared_data / "raw" / "criteo_train_head10k.tsv.gz", out, rows_per_group=3000) == 10_000
    converted, expected = pq.read_table(out), pq.read_table(shared_data / "criteo_kaggle_head10k.parquet")
    assert converted.equals(expected)
    file = pq.ParquetFile(out)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [3000, 3000, 3000, 1000]


def test_small_blocks_give_the_same_rows(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteo_module, "_BLOCK_BYTES", 100)  # less than a line
    plain = tmp_path / "head.tsv"
    with gzip.open(shared_data / "raw" / "criteo_train_head10k.tsv.gz") as source:
        plain.write_bytes(b"".join(source.readline() for _ in range(300)))
    rows = pa.concat_tables(read_criteo(plain))
    assert rows.equals(pq.read_table(shared_data / "criteo_kaggle_head10k.parquet").slice(0, 300))


def test_the_real_unlabelled_log(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "raw" / "criteo_test_unlabelled_100.tsv.gz"
    assert convert_criteo(source, tmp_path / "test.parquet") == 100
    rows = pq.read_table(tmp_path / "test.parquet")
    assert rows.schema.equals(CRITEO_SCHEMA) and rows.column("label").null_count == 100
    with gzip.open(source, "rt") as lines:
        for row, line in zip(rows.to_pylist(), lines, strict=True):
            fields = line.rstrip("\n").split("\t")
            assert [row[f"dense_{i}"] for i in range(1, 14)] == [float(f) if f else None for f in fields[:13]]
            assert [row[f"cat_{i}"] for i in range(1, 27)] == [int(f, 16) if f else None for f in fields[13:]]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [b"\n", b""])
def test_line_ends_and_odd_values(tmp_path: Path, end: bytes, last: bytes) -> None:
    short_ids = LABELLED.replace(b"00000000", b"a").replace(b"%08x" % 7**9, b"0123456789abcdE")
    source = write_lines(tmp_path / "c.tsv", [LABELLED, EMPTY, short_ids], end=end, last=last)
    rows = pa.concat_tables(read_criteo(source))
    first, empty, short = rows.to_pylist()
    assert first == {
        "label": 1,
        "row": 0,
        **{f"dense_{i + 1}": float(i - 2) for i in range(13)},
        **{f"cat_{i + 1}": i * 7**9 for i in range(26)},
    }
    assert empty.pop("label") == 0 and empty.pop("row") == 1 and set(empty.values()) == {None}
    assert (short["cat_1"], short["cat_2"], short["cat_3"]) == (0xA, 0x123456789ABCDE, 2 * 7**9)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (LABELLED + b"\tff", ["expected 40 tab-separated fields; found 41"]),
        (LABELLED.rpartition(b"\t")[0], ["expected 40 tab-separated fields; found 39"]),
        (b"", ["expected 40 tab-separated fields; found 1"]),
        (b"2" + LABELLED[1:], ["expected label 0 or 1; found '2'"]),
        (LABELLED[1:], ["expected label 0 or 1; found ''"]),
        (LABELLED.replace(b"\t-2\t", b"\t1.5\t"), ["dense_1: expected an integer", "'1.5'"]),
        (LABELLED.replace(b"00000000", b"0000000g"), ["cat_1: expected a hexadecimal id", "'0000000g'"]),
        (LABELLED.replace(b"00000000", b"-000000a"), ["cat_1: expected a hexadecimal id", "'-000000a'"]),
        (LABELLED.replace(b"00000000", b"a" * 17), ["cat_1: expected a hexadecimal id"]),
        (LABELLED.replace(b"00000000", b'"a"'), ["cat_1: expected a hexadecimal id"]),
        (LABELLED.replace(b"00000000", b"\xff"), ["cat_1: expected a hexadecimal id"]),
    ],
)
@pytest.mark.parametrize("block_bytes", [1 << 20, 1000])
def test_a_malformed_line_is_named_and_nothing_half_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, parts: list[str], block_bytes: int
) -> None:
    monkeypatch.setattr(criteo_module, "_BLOCK_BYTES", block_bytes)
    source = write_lines(tmp_path / "c.tsv", [LABELLED] * 30 + [line, LABELLED])
    with pytest.raises(TrafficError) as error:
        convert_criteo(source, tmp_path / "out" / "c.parquet", rows_per_group=10)
    message = str(error.value)
    assert "c.tsv, line 31" in message and all(part in message for part in parts), message
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_without_line_ends_is_given_up_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteo_module, "_BLOCK_BYTES", 1 << 20)
    source = tmp_path / "c.tsv"
    source.write_bytes(b"0" * (5 << 20))
    blocks = []
    original = criteo_module._parsed

    def spy(block: bytes, labelled: bool, first_row: int) -> pa.Table:
        blocks.append(len(block))
        return original(block, labelled, first_row)

    monkeypatch.setattr(criteo_module, "_parsed", spy)
    with pytest.raises(TrafficError, match=r"c\.tsv, line 1: expected 40 tab-separated fields; found 1"):
        list(read_criteo(source))
    assert len(blocks) == 1 and blocks[0] < 3 << 20


def test_a_file_that_was_cut_short(tmp_path: Path) -> None:
    source = tmp_path / "c.tsv.gz"
    source.write_bytes(gzip.compress(b"\n".join([LABELLED] * 500) + b"\n")[:-30])
    with pytest.raises(TrafficError, match=r"c\.tsv\.gz.*cannot be read \(truncated\?\)"):
        convert_criteo(source, tmp_path / "c.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["c.tsv.gz"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("absent.tsv", None, r"absent\.tsv.*cannot be read"),
        ("empty.tsv", b"", r"empty\.tsv: is empty"),
        ("not.tsv.gz", b"plain text", r"not\.tsv\.gz.*cannot be read"),
        ("page.tsv", b"<html>\n", r"page\.tsv, line 1: expected 40 tab-separated fields; found 1"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TrafficError, match=expected):
        convert_criteo(tmp_path / name, tmp_path / "out.parquet")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "c.tsv", [LABELLED])
    with pytest.raises(TrafficError, match=r"c\.tsv/x\.parquet: cannot be written"):
        convert_criteo(source, source / "x.parquet")


def test_concatenated_gzip_members_are_one_file(tmp_path: Path) -> None:
    source = tmp_path / "c.tsv.gz"
    source.write_bytes(gzip.compress(LABELLED + b"\n") + gzip.compress(EMPTY + b"\n"))
    assert sum(table.num_rows for table in read_criteo(f"file://{source}")) == 2


def test_a_file_that_is_parquet_already_is_named(tmp_path):
    path = tmp_path / "clicks.parquet"
    pq.write_table(pa.table({"label": list(range(1000))}), path)
    with pytest.raises(TrafficError, match=r"clicks.parquet: is Parquet already.*traffic.path"):
        convert_criteo(path, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
