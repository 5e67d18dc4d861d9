"""Placement as a dry run asks for it: advice that can be followed."""

import json
import re

import pytest

from lowprec.core.errors import ConfigError
from lowprec.core.sizes import parse_bytes
from lowprec.session.placement import Machines, place_spec


@pytest.mark.parametrize("num_workers", [1, 2, 8])
@pytest.mark.parametrize("rows, dim", [(2_000_000_000, 128), (400_000_000, 100), (1_000_000_000, 16)])
def test_memory_that_is_said_to_be_enough_is(tmp_path, num_workers, rows, dim):
    path = tmp_path / "tables.json"
    path.write_text(json.dumps({"tables": [{"name": "user", "num_rows": rows, "dim": dim}, *SMALL]}))
    follow_advice(path, num_workers, int(0.6 * 4 * rows * dim / num_workers), "do not fit on")


@pytest.mark.parametrize("worker_memory", [6 * 10**6, 320 * 10**6])
@pytest.mark.parametrize("num_workers", [1, 2, 8])
@pytest.mark.parametrize("rows, dim", [(1000, 4), (300_000, 64), (10_000_000, 128)])
def test_memory_that_has_room_for_tables_is_said_at_once(tmp_path, num_workers, rows, dim, worker_memory):
    path = tmp_path / "tables.json"
    path.write_text(json.dumps({"tables": [{"name": "user", "num_rows": rows, "dim": dim}]}))
    follow_advice(path, num_workers, worker_memory, "have no room for tables")


def follow_advice(path, num_workers, worker_memory, said):
    """What was refused with so little is placed with what the message says."""
    with pytest.raises(ConfigError, match=said) as refused:
        place_spec(path, Machines(num_workers, worker_memory, 1.25e9, None))
    advised = re.search(r"give each ([0-9.,]+ [KMGT]?B)", str(refused.value))
    assert advised, refused.value
    placed = place_spec(path, Machines(num_workers, parse_bytes(advised[1].replace(",", "")), 1.25e9, None))
    assert placed["num_workers"] == num_workers


SMALL = [{"name": "category", "num_rows": 100_000, "dim": 64, "count": 20}]


@pytest.mark.parametrize(
    "tables, message",
    [
        ([], "tables: must not be empty$"),
        ([{"name": "a", "num_rows": 0, "dim": 4}], r'tables.0.num_rows \(table "a"\): .* greater than 0; got 0$'),
        ([{"name": "a", "num_rows": "many", "dim": 4}], r'num_rows \(table "a"\): .* valid integer.*; got "many"$'),
        ([{"num_rows": 5, "dim": 4, "lookups": [1, -1]}], r"tables.0.name: field required; .*lookups.1: .*; got -1$"),
        ([{"name": "a", "num_rows": 5, "dim": 4}] * 2, "tables need names of their own; repeated: a$"),
        ([{"name": "a", "num_rows": 5, "dim": 4, "lookups": [0, 0]}], "the lookups of a are all 0"),
    ],
)
def test_wrong_tables_are_one_clear_sentence(tmp_path, tables, message):
    path = tmp_path / "tables.json"
    path.write_text(json.dumps({"tables": tables}))
    with pytest.raises(ConfigError, match=message):
        place_spec(path, Machines(2, 8 * 10**9, 1.25e9, None))
