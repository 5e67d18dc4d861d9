"""The original Criteo format: tab-separated label, 13 integers and 26 hexadecimal ids, any of them empty."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lowprec.core.errors import TrafficError
from lowprec.storage import Location
from lowprec.storage.object_store import sentence
from lowprec.traffic.files.source import locate

__all__ = ["CRITEO_SCHEMA", "NUM_CATEGORICAL", "NUM_DENSE", "convert_criteo", "read_criteo"]

NUM_DENSE = 13
NUM_CATEGORICAL = 26
_DENSE = [f"dense_{i}" for i in range(1, NUM_DENSE + 1)]
_CATEGORICAL = [f"cat_{i}" for i in range(1, NUM_CATEGORICAL + 1)]
CRITEO_SCHEMA = pa.schema(
    [
        ("label", pa.int8()),
        ("row", pa.int64()),
        *((name, pa.float32()) for name in _DENSE),
        *((name, pa.int64()) for name in _CATEGORICAL),
    ]
)
_BLOCK_BYTES = 4 << 20
_LONGEST_LINE = 1 << 20
_INTEGER = re.compile(rb"-?[0-9]{1,18}")
_HEX = re.compile(rb"[0-9a-fA-F]{1,15}")
_HEX_DIGITS = np.full(256, -1, np.int64)
_HEX_DIGITS[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
_HEX_DIGITS[np.frombuffer(b"ABCDEF", np.uint8)] = np.arange(10, 16)


class _Malformed(Exception):
    """A block is not in the format; the slow parser will say where."""


def read_criteo(source: str | Path) -> Iterator[pa.Table]:
    """The rows of a Criteo file (`.gz` or plain, path or `pyarrow.fs` URL) as tables of `CRITEO_SCHEMA`, in order.

    The test format, 39 fields without a label, is told by the first line and gives null labels. `row` is the line's
    position from 0. A few megabytes are held at a time. Raises `TrafficError` naming file and line (from 1) where a
    line is malformed.
    """
    filesystem, path, _ = locate(str(source))
    first_row = 0
    labelled = True
    try:
        with filesystem.open_input_stream(path, compression="gzip" if path.endswith(".gz") else None) as stream:
            for block in _blocks(cast(BinaryIO, stream)):
                if first_row == 0:
                    if block.startswith(b"PAR1"):
                        raise TrafficError(
                            f"traffic file {source}: is Parquet already, and needs no conversion; name it in "
                            "traffic.path"
                        )
                    labelled = block.partition(b"\n")[0].count(b"\t") + 1 != NUM_DENSE + NUM_CATEGORICAL
                try:
                    table = _parsed(block, labelled, first_row)
                except (_Malformed, pa.ArrowException) as error:
                    _explain(block, labelled, f"traffic file {source}", first_row + 1)
                    reason = sentence(error, str(source))
                    raise TrafficError(
                        f"traffic file {source}, lines from {first_row + 1}: cannot be parsed: {reason}"
                    ) from None
                yield table
                first_row += table.num_rows
    except (OSError, pa.ArrowException) as error:
        reason = sentence(error, str(source))
        raise TrafficError(
            f"traffic file {source}, after line {first_row}: cannot be read (truncated?): {reason}"
        ) from None
    if first_row == 0:
        raise TrafficError(f"traffic file {source}: is empty")


def convert_criteo(source: str | Path, out_path: str | Path, *, rows_per_group: int = 65_536) -> int:
    """Write a Criteo file as one Parquet file of `CRITEO_SCHEMA` and return its number of rows.

    The file appears whole or not at all. Raises `TrafficError` as `read_criteo` does, or where it cannot be written.
    """
    target = Location.of(out_path)
    num_rows = 0
    waiting: list[pa.Table] = []
    num_waiting = 0
    try:
        with (
            target.whole_file() as partial,
            pq.ParquetWriter(partial, CRITEO_SCHEMA, write_page_checksum=True) as writer,
        ):
            for table in read_criteo(source):
                waiting.append(table)
                num_waiting += table.num_rows
                num_rows += table.num_rows
                while num_waiting >= rows_per_group:
                    rows = pa.concat_tables(waiting)
                    writer.write_table(rows.slice(0, rows_per_group), row_group_size=rows_per_group)
                    waiting, num_waiting = [rows.slice(rows_per_group)], num_waiting - rows_per_group
            if num_waiting:
                writer.write_table(pa.concat_tables(waiting), row_group_size=rows_per_group)
    except OSError as error:
        raise TrafficError(f"traffic file {target}: cannot be written: {error.strerror or error}") from None
    return num_rows


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    """The stream in blocks of whole lines."""
    rest = b""
    while data := stream.read(_BLOCK_BYTES):
        lines, newline, tail = data.rpartition(b"\n")
        if not newline and len(rest) < _LONGEST_LINE:
            rest += data
            continue
        if not newline:  # no such file has such lines: let the parser say so now, not after the whole file
            yield rest + data + b"\n"
            rest = b""
            continue
        yield rest + lines + newline
        rest = tail
    if rest:
        yield rest + b"\n"


def _parsed(block: bytes, labelled: bool, first_row: int) -> pa.Table:
    """The fast path: Arrow splits the lines and parses integers, NumPy parses the ids."""
    names = [*(["label"] if labelled else []), *_DENSE, *_CATEGORICAL]
    types = {"label": pa.int8(), **dict.fromkeys(_DENSE, pa.int64()), **dict.fromkeys(_CATEGORICAL, pa.binary())}
    table = pacsv.read_csv(
        pa.py_buffer(block),
        read_options=pacsv.ReadOptions(column_names=names, use_threads=False, block_size=len(block) + 1),
        parse_options=pacsv.ParseOptions(
            delimiter="\t", quote_char=False, double_quote=False, ignore_empty_lines=False
        ),
        convert_options=pacsv.ConvertOptions(
            column_types={name: types[name] for name in names}, null_values=[""], strings_can_be_null=True
        ),
    ).combine_chunks()
    if table.num_rows != block.count(b"\n"):
        raise _Malformed("another number of rows than lines")
    if labelled:
        labels = table.column("label").combine_chunks()
        if labels.null_count or not pc.all(pc.is_in(labels, pa.array([0, 1], pa.int8()))).as_py():
            raise _Malformed("label outside 0 and 1")
    else:
        labels = pa.nulls(table.num_rows, pa.int8())
    columns = [
        labels,
        pa.array(np.arange(first_row, first_row + table.num_rows)),
        *(table.column(name).combine_chunks().cast(pa.float32(), safe=False) for name in _DENSE),
        *(_ids(table.column(name).combine_chunks()) for name in _CATEGORICAL),
    ]
    return pa.Table.from_arrays(columns, schema=CRITEO_SCHEMA)


def _ids(texts: pa.Array) -> pa.Array:
    """The integers that hexadecimal texts stand for."""
    valid = texts.is_valid().to_numpy(zero_copy_only=False)
    found = texts.drop_null()
    if len(found) == 0:
        return pa.nulls(len(texts), pa.int64())
    numbers = np.zeros(len(texts), np.int64)
    numbers[valid] = _hex_numbers(found)
    return pa.array(numbers, mask=~valid)


def _hex_numbers(texts: pa.Array) -> NDArray[np.int64]:
    lengths = pc.binary_length(texts).to_numpy()
    width = int(lengths[0])
    if width == 0 or width > 15 or not (lengths == width).all():
        slow = texts.to_pylist()
        if not all(_HEX.fullmatch(text) for text in slow):
            raise _Malformed("not hexadecimal")
        return np.array([int(text, 16) for text in slow], np.int64)
    _, offsets, data = texts.buffers()
    begin = int(np.frombuffer(offsets, np.int32, 1, texts.offset * 4)[0])
    digits = _HEX_DIGITS[np.frombuffer(data, np.uint8, len(texts) * width, begin).reshape(-1, width)]
    if (digits < 0).any():
        raise _Malformed("not hexadecimal")
    numbers: NDArray[np.int64] = digits @ (16 ** np.arange(width - 1, -1, -1, dtype=np.int64))
    return numbers


def _explain(block: bytes, labelled: bool, where: str, first_line: int) -> None:
    """Raise `TrafficError` naming the first malformed line of a block, if the strict rules find one."""
    num_fields = NUM_DENSE + NUM_CATEGORICAL + labelled
    for number, line in enumerate(block.split(b"\n")[:-1], first_line):
        fields = line.removesuffix(b"\r").split(b"\t")
        at = f"{where}, line {number}"
        if len(fields) != num_fields:
            raise TrafficError(f"{at}: expected {num_fields} tab-separated fields; found {len(fields)}")
        if labelled and fields[0] not in (b"0", b"1"):
            raise TrafficError(f"{at}: expected label 0 or 1; found {fields[0].decode(errors='replace')!r}")
        for name, field in zip([*_DENSE, *_CATEGORICAL], fields[labelled:], strict=True):
            pattern, kind = (_INTEGER, "an integer") if name in _DENSE else (_HEX, "a hexadecimal id")
            if field and not pattern.fullmatch(field):
                found = field.decode(errors="replace")
                raise TrafficError(f"{at}, {name}: expected {kind} or nothing; found {found!r}")
