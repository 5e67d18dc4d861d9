"""Placement as a dry run asks for it: advice that can be followed."""

import json
import re

import pytest

from lowprec.errors import ConfigError
from lowprec.search.placement import Machines, place_spec
from lowprec.sizes import parse_bytes


@pytest.mark.parametrize("num_workers", [1, 2, 8])
@pytest.mark.parametrize("rows, dim", [(2_000_000_000, 128), (400_000_000, 100), (1_000_000_000, 16)])
def test_memory_that_is_said_to_be_enough_is(tmp_path, num_workers, rows, dim):
    path = tmp_path / "tables.json"
    path.write_text(json.dumps({"tables": [{"name": "user", "num_rows": rows, "dim": dim}, *SMALL]}))
    with pytest.raises(ConfigError) as refused:
        place_spec(path, Machines(num_workers, int(0.6 * 4 * rows * dim / num_workers), 1.25e9, None))
    advised = re.search(r"give each ([0-9.,]+ [KMGT]?B)", str(refused.value))
    assert advised, refused.value
    placed = place_spec(path, Machines(num_workers, parse_bytes(advised[1].replace(",", "")), 1.25e9, None))
    assert placed["num_workers"] == num_workers


SMALL = [{"name": "category", "num_rows": 100_000, "dim": 64, "count": 20}]


@pytest.mark.parametrize(
    "tables, message",
    [
        ([], "tables: must not be empty$"),
        ([{"name": "a", "num_rows": 0, "dim": 4}], r"tables.0.num_rows: input should be greater than 0$"),
        ([{"name": "a", "num_rows": 5, "dim": 4}] * 2, "tables need names of their own; repeated: a$"),
        ([{"name": "a", "num_rows": 5, "dim": 4, "lookups": [0, 0]}], "the lookups of a are all 0"),
    ],
)
def test_wrong_tables_are_one_clear_sentence(tmp_path, tables, message):
    path = tmp_path / "tables.json"
    path.write_text(json.dumps({"tables": tables}))
    with pytest.raises(ConfigError, match=message):
        place_spec(path, Machines(2, 8 * 10**9, 1.25e9, None))
