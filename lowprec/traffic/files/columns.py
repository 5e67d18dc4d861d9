"""Which columns a schema needs, whether the files have them, and the one type that each is read as."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from lowprec.core.errors import TrafficError
from lowprec.traffic.files.source import SourceFile
from lowprec.traffic.schema import Schema, TimeUnit

__all__ = ["Layout", "check_columns", "needed_columns", "read_as"]

_UNITS: tuple[TimeUnit, ...] = ("s", "ms", "us", "ns")


@dataclass(frozen=True)
class Layout:
    """The needed columns in reading order with the type that each is read as, whatever a single file holds.

    `time_unit` is the unit of the times handed out: that of the column where it is a timestamp (seconds for dates),
    the schema's for integers, None where rows are counted.
    """

    types: Mapping[str, pa.DataType]
    time_unit: TimeUnit | None


@dataclass(frozen=True)
class _Use:
    column: str
    key: str
    expected: str
    fits: Callable[[pa.DataType], bool]


def needed_columns(schema: Schema) -> list[str]:
    """The columns that a schema needs, each once."""
    return list(dict.fromkeys(use.column for use in _uses(schema)))


def check_columns(schema: Schema, files: Sequence[tuple[SourceFile, pa.Schema]]) -> Layout:
    """The layout of a dataset; raises `TrafficError` naming file, expected and found type of every wrong column.

    `files` come with the Arrow schema of their content, partition columns included.
    """
    uses = list(_uses(schema))
    needed = needed_columns(schema)
    types: dict[str, pa.DataType] = {}
    wrong: dict[str, str] = {}  # by column: of the first file where it is
    for file, content in files:
        _check_presence(file, content, uses)
        for use in uses:
            found = content.field(use.column).type
            if not use.fits(_canonical(found)):
                wrong.setdefault(
                    use.column,
                    f'traffic file {file.name}: column "{use.column}" ({use.key}): expected {use.expected}; '
                    f"found {found}",
                )
        for column in needed:
            if column in wrong:
                continue
            found = _canonical(content.field(column).type)
            unified = _unified(types[column], found) if column in types else found
            if unified is None:
                wrong[column] = (
                    f'traffic file {file.name}: column "{column}": expected {types[column]} as in the files before it; '
                    f"found {content.field(column).type}"
                )
                continue
            types[column] = unified
    if wrong:
        columns = "column" if len(wrong) == 1 else "columns"
        raise TrafficError(f"{'; '.join(wrong.values())}; correct the config or rewrite the {columns}")
    # A column without any value has no type of its own.
    weights = {feature.weights for feature in schema.sparse}
    for column in needed:
        types[column] = _typed(types[column], pa.list_(pa.float64()) if column in weights else pa.int64())
    return Layout(types, _time_unit(schema, types))


def read_as(column: pa.Array, target: pa.DataType) -> pa.Array:
    """The column as `target`, one of the types of a `Layout`; raises `pa.ArrowInvalid` when a value does not fit.

    Timestamps with a zone keep their instant: Arrow stores them in UTC, and losing the zone changes no number.
    """
    if column.type == target:
        return column
    if pt.is_dictionary(column.type):
        return read_as(column.dictionary_decode(), target)
    if _is_list_view(column.type):
        return read_as(_list_of_view(column), target)
    return column.cast(target, safe=not _holds_floats(target))


def _uses(schema: Schema) -> Iterator[_Use]:
    yield _Use(schema.label, "traffic.label", "bool, integer or float", _is_number)
    for column in schema.dense:
        yield _Use(column, "traffic.dense", "a number or bool", _is_number)
    for feature in schema.sparse:
        key = f"traffic.sparse {feature.name}"
        yield _Use(feature.column, key, "an integer or a list of integers", _is_ids)
        if feature.weights is not None:
            yield _Use(feature.weights, f"{key}.weights", "a list of numbers", _is_weights)
    if schema.time is not None:
        yield _Use(schema.time, "traffic.time", "an integer, a timestamp or a date", _is_time)
    if schema.weight is not None:
        yield _Use(schema.weight, "traffic.weight", "a number", _is_number)
    if schema.group is not None:
        yield _Use(schema.group, "traffic.group", "an integer or a string", _is_group)


def _check_presence(file: SourceFile, content: pa.Schema, uses: Sequence[_Use]) -> None:
    missing = {use.column: use.key for use in uses if use.column not in content.names}
    if not missing:
        repeated = [use.column for use in uses if content.names.count(use.column) > 1]
        if repeated:
            raise TrafficError(f'traffic file {file.name}: column "{repeated[0]}" occurs more than once; rename one')
        return
    parts = []
    for column, key in missing.items():
        near = difflib.get_close_matches(column, content.names, n=3)
        parts.append(f'"{column}" ({key})' + (f", did you mean {' or '.join(near)}?" if near else ""))
    shown = content.names[:40]
    rest = f", and {len(content.names) - 40} more" if len(content.names) > 40 else ""
    raise TrafficError(
        f"traffic file {file.name}: misses column {'; column '.join(parts)}; the file has {', '.join(shown)}{rest}"
    )


def _canonical(found: pa.DataType) -> pa.DataType:
    """The widest type of the same kind: what values of `found` are read as."""
    if pt.is_dictionary(found):
        return _canonical(found.value_type)
    if pt.is_list(found) or pt.is_large_list(found) or pt.is_fixed_size_list(found) or _is_list_view(found):
        return pa.list_(_canonical(found.value_type))
    if pt.is_uint64(found) or pt.is_boolean(found) or pt.is_null(found):
        return found
    if pt.is_integer(found):
        return pa.int64()
    if pt.is_float16(found) or pt.is_float32(found):
        return pa.float32()
    if pt.is_float64(found) or pt.is_decimal(found):
        return pa.float64()
    if pt.is_string(found) or pt.is_large_string(found) or pt.is_string_view(found):
        return pa.large_string()
    if pt.is_timestamp(found):
        return pa.timestamp(found.unit)
    return pa.timestamp("s") if pt.is_date(found) else found


def _unified(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    if a == b or pt.is_null(b):
        return a
    if pt.is_null(a):
        return b
    if pt.is_list(a) and pt.is_list(b):
        child = _unified(a.value_type, b.value_type)
        return None if child is None else pa.list_(child)
    if pt.is_timestamp(a) and pt.is_timestamp(b):
        return max(a, b, key=lambda t: _UNITS.index(t.unit))
    if not (_is_number(a) and _is_number(b)):
        return None
    return pa.float64() if pt.is_floating(a) or pt.is_floating(b) else pa.int64()


def _typed(found: pa.DataType, default: pa.DataType) -> pa.DataType:
    if pt.is_list(found) and pt.is_null(found.value_type):
        return default if pt.is_list(default) else pa.list_(default)
    return default if pt.is_null(found) else found


def _time_unit(schema: Schema, types: Mapping[str, pa.DataType]) -> TimeUnit | None:
    if schema.time is None:
        return None
    found = types[schema.time]
    return cast(TimeUnit, found.unit) if pt.is_timestamp(found) else schema.time_unit


def _is_list_view(found: pa.DataType) -> bool:
    return bool(pt.is_list_view(found) or pt.is_large_list_view(found))


def _list_of_view(column: pa.Array) -> pa.Array:
    """A list view as a list. Arrow's own cast (26.0.1) returns an invalid array where the view has nulls."""
    lengths = pc.list_value_length(column).fill_null(0).to_numpy()
    offsets = pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int64())
    return pa.LargeListArray.from_arrays(offsets, column.flatten(), mask=column.is_null())


def _holds_floats(target: pa.DataType) -> bool:
    # Large integers lose digits as floats; that is what the contract (float32) asks for, so no error.
    return bool(pt.is_floating(target.value_type if pt.is_list(target) else target))


def _is_number(found: pa.DataType) -> bool:
    return bool(pt.is_integer(found) or pt.is_floating(found) or pt.is_boolean(found) or pt.is_null(found))


def _is_ids(found: pa.DataType) -> bool:
    inner = found.value_type if pt.is_list(found) else found
    return bool(pt.is_integer(inner) or pt.is_null(inner))


def _is_weights(found: pa.DataType) -> bool:
    if not pt.is_list(found):
        return bool(pt.is_null(found))
    return _is_number(found.value_type)


def _is_time(found: pa.DataType) -> bool:
    return bool((pt.is_integer(found) and not pt.is_uint64(found)) or pt.is_timestamp(found) or pt.is_null(found))


def _is_group(found: pa.DataType) -> bool:
    return bool(pt.is_integer(found) or pt.is_large_string(found) or pt.is_null(found))
