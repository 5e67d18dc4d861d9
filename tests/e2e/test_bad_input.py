"""Every kind of bad input stops with one clear sentence and the right exit code, and loses nothing."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

ERROR, USAGE = 3, 64


@pytest.fixture
def traffic(small_folder, tmp_path):
    """A copy of the traffic as one table, and a way to write it back changed."""
    table = pq.read_table(small_folder / "traffic")

    def write(change):
        folder = tmp_path / "traffic"
        folder.mkdir()
        pq.write_table(change(table), folder / "part.parquet")
        return str(folder)

    return write


def with_column(name, make):
    def change(table):
        return table.set_column(table.column_names.index(name), name, make(table[name]))

    return change


def with_value(name, row, value):
    def make(column):
        values = column.to_pylist()
        values[row] = value
        return pa.array(values, column.type)

    return with_column(name, make)


# The search window begins at row 8,000 of 20,000: rows are spread evenly over ten days.
ROW = 9000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.drop_columns("c3"), ["c3", "part.parquet"]),
        (with_column("c0", lambda c: c.cast(pa.string())), ["c0", "string"]),
        (with_column("label", lambda c: pa.array(["x"] * len(c))), ["label", "string"]),
        (with_value("label", ROW, 2), ["row 9000", "label", "quarantine/search.parquet", "max_bad_fraction"]),
        (with_value("d1", ROW, float("nan")), ["row 9000", "d1", "max_bad_fraction"]),
        (with_value("c0", ROW, -1), ["row 9000", "c0", "-1", "bounds_check"]),
        (with_value("c0", ROW, 40), ["row 9000", "c0", "40", "bounds_check"]),
    ],
    ids=["missing-column", "wrong-type", "label-type", "label-value", "nan-dense", "negative-id", "large-id"],
)
def test_traffic_that_does_not_fit(lowprec, config_file, one_sentence, traffic, change, said):
    done = lowprec("search", config_file(traffic__path=traffic(change)))
    one_sentence(done, ERROR, said)


def test_bad_rows_are_kept_whether_they_stop_the_run_or_not(lowprec, config_file, traffic, tmp_path):
    path = traffic(with_value("label", ROW, 2))
    stopped = lowprec("search", config_file(traffic__path=path))
    assert stopped.code == ERROR
    (kept,) = (tmp_path / "runs").glob("artifacts/*/quarantine/search.parquet")
    row = pq.read_table(kept).to_pylist()[0]
    assert row["row"] == ROW and "label" in row["reason"] and json.loads(row["values"])["label"] == 2
    went_on = lowprec(
        "search", config_file(traffic__path=path, traffic__max_bad_fraction=0.01), "--json", "--max-trials", 3
    )
    assert went_on.code in (0, 2, 4) and went_on.document["rows"]["search"]["num_bad"] == 1


def test_a_truncated_parquet_file(lowprec, config_file, one_sentence, traffic, tmp_path):
    path = traffic(lambda t: t)
    file = tmp_path / "traffic" / "part.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    one_sentence(lowprec("search", config_file(traffic__path=path)), ERROR, ["part.parquet"])


@pytest.mark.parametrize(
    ("window", "said"),
    [
        ({"start": "2027-01-01", "end": None}, ["no row lies in window", "beyond the data", "2026-01-"]),
        ({"start": "2026-01-08T00:00:00", "end": "2026-01-08T00:00:01"}, ["no row lies in window"]),
    ],
    ids=["beyond-the-data", "empty"],
)
def test_windows_without_rows(lowprec, config_file, one_sentence, window, said):
    one_sentence(lowprec("search", config_file(windows__confirm=window)), ERROR, said)


def test_windows_that_overlap(lowprec, config_file, one_sentence):
    done = lowprec("search", config_file(windows__confirm={"start": "2026-01-07", "end": None}))
    one_sentence(done, USAGE, ["windows.confirm", "windows.search"])


@pytest.fixture
def checkpoint(small_folder, tmp_path):
    def write(change):
        tensors = {name: np.array(value) for name, value in load_file(small_folder / "model.safetensors").items()}
        change(tensors)
        path = tmp_path / "changed.safetensors"
        save_file(tensors, path)
        return str(path)

    return write


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(lowprec, config_file, one_sentence, checkpoint, value):
    # Row 0 of a Zipf table is among the first that traffic touches.
    path = checkpoint(lambda tensors: tensors["tables.c2.weight"].__setitem__((slice(None), 3), value))
    one_sentence(lowprec("search", config_file(model__checkpoint=path)), ERROR, ["c2", "row"])


@pytest.mark.parametrize("value", [float("nan"), 1e9])
def test_a_row_that_no_traffic_meets_is_warned_of(lowprec, config_file, checkpoint, small_folder, value):
    """The plan holds on the traffic, and could not be stored for serving."""
    met = pq.read_table(small_folder / "traffic").column("c5").combine_chunks()
    ids = set((met.flatten() if pa.types.is_list(met.type) else met).to_pylist())
    row = next(i for i in range(1000) if i not in ids)
    for changed, expected in ((value, 1), (0.1, 0)):
        path = checkpoint(lambda tensors, x=changed: tensors["tables.c5.weight"].__setitem__((row, 1), x))
        done = lowprec("search", config_file(model__checkpoint=path, space={"precisions": ["int4"]}), "--json")
        warnings = [w for w in done.document["warnings"] if "looked it up" in w]
        assert len(warnings) == expected
        assert all(f'"table:c5": row {row} ' in w for w in warnings)


def test_a_checkpoint_of_another_shape(lowprec, config_file, one_sentence, checkpoint):
    path = checkpoint(lambda tensors: tensors.update({"tables.c2.weight": np.zeros((10, 8), np.float32)}))
    one_sentence(
        lowprec("search", config_file(model__checkpoint=path)), ERROR, ["tables.c2.weight", "10 x 8", "160 x 8"]
    )


def test_an_unreadable_checkpoint(lowprec, config_file, one_sentence, tmp_path):
    path = tmp_path / "broken.safetensors"
    one_sentence(lowprec("search", config_file(model__checkpoint=str(path))), ERROR, ["broken.safetensors"])
    path.write_bytes(b"not a checkpoint")
    one_sentence(lowprec("search", config_file(model__checkpoint=str(path))), ERROR, ["broken.safetensors"])


def test_an_unknown_table_in_the_plan(lowprec, config_file, one_sentence, tmp_path):
    config = config_file()
    found = lowprec("search", config, "--json", "--max-trials", 3)
    plan = json.loads(Path(found.document["plan_path"]).read_text())
    plan["units"]["table:stranger"] = plan["units"].pop("table:c5")
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    one_sentence(lowprec("verify", config, "--plan", path), USAGE, ["table:stranger", "table:c5", str(path)])


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("search.budgett=1", ["search.budgett", 'did you mean "budget"']),
        ("space.precisions=[fp32, int5]", ["space.precisions", "int8", "int5"]),
        ("search.budget=0", ["search.budget", "greater than 0"]),
        ("search.budget=-0.1", ["search.budget", "greater than 0"]),
        ("space.units=[{match: 'table:x*', fixed: int8}]", ["space.units[0].match", "table:x*"]),
    ],
)
def test_a_config_that_is_wrong(lowprec, config_file, one_sentence, setting, said):
    one_sentence(lowprec("search", config_file(), "--set", setting), USAGE, said)


def test_a_results_root_that_cannot_be_written(lowprec, config_file, one_sentence, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = lowprec("search", config_file(results__root=str(tmp_path / "file" / "runs")))
    one_sentence(done, ERROR, ["file/runs"])


@pytest.mark.parametrize("sql", ["DROP TABLE runs", "INSERT INTO runs VALUES (1)", "COPY runs TO '/tmp/x.csv'"])
def test_sql_that_writes(lowprec, config_file, one_sentence, tmp_path, sql):
    assert lowprec("search", config_file(), "--max-trials", 3).code in (0, 2, 4)
    root = tmp_path / "runs"
    before = sorted(p for p in root.rglob("*") if p.is_file())
    one_sentence(lowprec("results", sql, "--root", root), USAGE, ["only reads"])
    assert sorted(p for p in root.rglob("*") if p.is_file()) == before


def test_usage_errors_exit_64(lowprec):
    for args in (["search"], ["nonsense"], ["search", "x.yaml", "--no-such-option"]):
        done = lowprec(*args)
        assert done.code == USAGE and "Traceback" not in done.err
    assert "cannot be read" in lowprec("search", "no-such.yaml").err


def test_an_error_as_json_is_one_document(lowprec, config_file):
    done = lowprec("search", config_file(), "--json", "--set", "search.budget=0")
    assert done.code == USAGE
    assert done.document["error"]["exit_code"] == USAGE and "search.budget" in done.document["error"]["message"]


def test_debug_shows_the_traceback(lowprec, config_file):
    done = lowprec("search", config_file(), "--debug", "--set", "search.budget=0")
    assert done.code == USAGE and "Traceback" in done.err


def test_a_window_without_labels_and_one_with_a_single_class(lowprec, config_file, one_sentence, traffic):
    nothing = with_column("label", lambda c: pa.array([None] * len(c), pa.int8()))
    done = lowprec("search", config_file(traffic__path=traffic(nothing)))
    one_sentence(done, ERROR, ["none of the", "have none", "labels are known"])


def test_one_class_is_said_beside_the_verdict(lowprec, config_file, traffic):
    only_zero = with_column("label", lambda c: pa.array([0] * len(c), pa.int8()))
    done = lowprec("search", config_file(traffic__path=traffic(only_zero)), "--json", "--max-trials", 3)
    assert done.code in (0, 2, 4)
    assert "same label" in done.document["warnings"][0]


def test_a_config_with_a_key_twice_or_no_text(lowprec, one_sentence, tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("name: a\nsearch: {budget: 0.5}\nsearch: {budget: 50}\n")
    one_sentence(lowprec("search", path), USAGE, ['"search" is there twice', "line 3"])
    path.write_bytes(b"\xff\xfe\x00PAR1")
    one_sentence(lowprec("search", path), USAGE, ["is no text file"])
