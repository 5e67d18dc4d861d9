"""SQL over results: it sees each row once, and can do nothing but read."""

import json
from datetime import UTC, datetime, timedelta

import pandas as pd
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from lowprec.core.errors import QueryError, ResultsError
from lowprec.results import ResultsStore, latest_front, query, query_arrow, sensitivity_report
from lowprec.results.schema import SCHEMA_VERSION, TABLES, to_arrow


@pytest.fixture
def root(tmp_path, row):
    store = ResultsStore(tmp_path)
    store.append("trials", [row("trials", f"k{i}", number=i, gap_pct=i / 10) for i in range(4)])
    for version in (0, 11, 2):
        store.append("runs", [row("runs", f"r/{version}", run_id="r", version=version, status=f"s{version}")])
    return tmp_path


def test_a_dataframe_comes_back(root):
    frame = query("SELECT number, gap_pct FROM trials WHERE number > 1 ORDER BY number", str(root))
    pd.testing.assert_frame_equal(frame, pd.DataFrame({"number": [2, 3], "gap_pct": [0.2, 0.3]}))
    table = query_arrow("SELECT max(committed_at) AS latest FROM trials", root)
    assert abs(table["latest"][0].as_py() - datetime.now(UTC)) < timedelta(minutes=1)


def test_views_show_each_key_once_and_runs_once(root, row):
    later = to_arrow(TABLES["trials"], [row("trials", "k1", number=99)], datetime(2100, 1, 1, tzinfo=UTC))
    write_deltalake(root / "trials", later, mode="append")
    frame = query("SELECT row_key, number FROM trials ORDER BY row_key", root)
    assert frame.to_dict("list") == {"row_key": ["k0", "k1", "k2", "k3"], "number": [0, 99, 2, 3]}
    assert query("SELECT version, status FROM runs", root).to_dict("list") == {"version": [11], "status": ["s11"]}
    assert len(ResultsStore(root).read("trials")) == 4


def test_tables_that_were_never_written_are_empty(root):
    frame = query("SELECT * FROM sensitivities", root)
    assert list(frame.columns) == TABLES["sensitivities"].arrow.names
    assert frame.empty


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1;",
        "WITH a AS (SELECT * FROM trials) SELECT count(*) FROM a",
        "FROM trials",
        "VALUES (1)",
        "DESCRIBE trials",
        "SUMMARIZE trials",
        "SHOW TABLES",
        "EXPLAIN SELECT * FROM trials",
        "EXPLAIN ANALYZE SELECT * FROM trials",
        "explain (format json) select 1",
        "SELECT ';' AS \"DROP TABLE; x\" -- ; DELETE",
        "SELECT json_extract('{\"a\": 1}', '$.a')",
    ],
)
def test_reading_statements(sql, root):
    assert query_arrow(sql, root).num_rows >= 1


WRITING = [
    "CREATE TABLE x (a INT)",
    "CREATE VIEW x AS SELECT 1",
    "CREATE OR REPLACE VIEW trials AS SELECT 1",
    "CREATE MACRO f(x) AS x",
    "INSERT INTO trials SELECT * FROM trials",
    "WITH a AS (SELECT * FROM trials) INSERT INTO trials SELECT * FROM a",
    "UPDATE trials SET number = 1",
    "DELETE FROM trials",
    "TRUNCATE trials",
    "MERGE INTO trials USING runs ON true WHEN MATCHED THEN DELETE",
    "DROP VIEW trials",
    "ALTER TABLE trials RENAME TO x",
    "COMMENT ON VIEW trials IS 'x'",
    "COPY trials TO '{out}'",
    "COPY (SELECT 1) TO '{out}' (FORMAT parquet)",
    "EXPORT DATABASE '{out}'",
    "IMPORT DATABASE '{out}'",
    "ATTACH '{out}'",
    "DETACH memory",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET threads = 1",
    "SET enable_external_access = true",
    "RESET enable_external_access",
    "SET VARIABLE a = 1",
    "USE memory",
    "PRAGMA database_list",
    "CALL pragma_version()",
    "CHECKPOINT",
    "VACUUM",
    "BEGIN",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "EXPLAIN ANALYZE CREATE TABLE x (a INT)",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{out}'",
    "explain (analyze, format json) drop view trials",
    "EXPLAIN/**/ANALYZE DROP VIEW trials",
]


@pytest.mark.parametrize("sql", WRITING)
def test_sql_that_writes_is_refused(sql, root, tmp_path):
    before = sorted(str(path) for path in root.rglob("*"))
    with pytest.raises(QueryError, match="lowprec results only reads: ") as raised:
        query(sql.format(out=tmp_path / "out"), root)
    assert raised.value.exit_code == 64
    assert sorted(str(path) for path in root.rglob("*")) == before


@pytest.mark.parametrize("sql", ["SELECT 1; SELECT 2", "SELECT 1; DROP VIEW trials", "", "   ", "-- nothing", ";"])
def test_exactly_one_statement(sql, root):
    with pytest.raises(QueryError, match="takes one SQL statement; got [02]"):
        query(sql, root)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('{path}')",
        "SELECT * FROM read_text('{path}')",
        "SELECT * FROM read_blob('{path}')",
        "SELECT * FROM '{path}'",
        "SELECT * FROM glob('{path}*')",
        "SELECT * FROM read_json('https://example.com/x.json')",
        "SELECT * FROM query('SELECT * FROM read_text(''{path}'')')",
        "SELECT * FROM secret_frame",
    ],
)
def test_nothing_but_results_can_be_read(sql, root, tmp_path):
    secret_frame = pd.DataFrame({"a": ["secret"]})
    path = tmp_path / "secret.csv"
    path.write_text("a\nsecret\n")
    with pytest.raises((QueryError, ResultsError)) as raised:
        query(sql.format(path=path), root)
    assert "\n" not in str(raised.value)
    assert len(secret_frame) == 1


@pytest.mark.parametrize(
    ("sql", "sentence"),
    [
        ("SELEC 1", 'syntax error at or near "SELEC"; tables are runs, trials, sensitivities'),
        ("SELECT * FROM nowhere", "Table with name nowhere does not exist!"),
        ("SELECT gap FROM trials", "columns of trials are row_key, run_id, trial_key"),
        ("SELECT number + kind FROM trials JOIN runs USING (run_id)", "columns of runs are row_key, run_id, version"),
        ("SELECT kind::INT FROM trials", "Conversion Error"),
    ],
)
def test_bad_sql_is_explained_in_one_line(sql, sentence, root):
    with pytest.raises(QueryError) as raised:
        query(sql, root)
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("ask", [lambda root: query("SELECT 1", root), latest_front])
def test_an_empty_root_says_what_to_do(ask, tmp_path, bucket):
    for root in (tmp_path, tmp_path / "nothing", bucket, f"{bucket}/nothing"):
        with pytest.raises(ResultsError, match=r"holds no results yet; run lowprec search CONFIG first"):
            ask(root)
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_file_is_no_traceback(root):
    (file,) = (root / "trials").glob("*.parquet")
    file.write_bytes(b"garbage")
    with pytest.raises((ResultsError, QueryError)) as raised:
        query("SELECT * FROM trials", root)
    assert "\n" not in str(raised.value)


def test_a_missing_data_file_is_no_fault_of_the_query(root):
    for file in (root / "trials").glob("*.parquet"):
        file.unlink()
    with pytest.raises(ResultsError, match="a data file cannot be read") as raised:
        query("SELECT count(gap_pct) FROM trials", root)
    assert "\n" not in str(raised.value)


START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(params=["folder", "s3"])
def searched(request, tmp_path, row):
    """Three runs: an old finished one, a newer finished one, and one that is still running; and one of verify."""
    root = tmp_path if request.param == "folder" else request.getfixturevalue("bucket") + "/runs"
    store = ResultsStore(root)
    runs = [("old", "done", 1), ("new", "done", 2), ("open", "running", 3), ("check", "done", 4)]
    for run_id, status, hour in runs:
        values = {"started_at": START + timedelta(hours=hour), "recommended_trial_key": "t2", "summary_json": None}
        store.append("runs", [row("runs", run_id, run_id=run_id, version=0, status=status, **values)])
    points = [(100, 0.9), (100, 0.5), (200, 0.1), (300, 0.2), (400, -0.1), (500, None)]
    plan = json.dumps({"table:a": "int4", "table:b": "int8", "table:c": "int4"})
    for run_id, _, hour in runs:
        rows = []
        for i, (size_bytes, gap_pct) in enumerate(points):
            evaluation = "verify" if run_id == "check" else "exact"
            values = {"run_id": run_id, "trial_key": f"t{i}", "number": i, "size_bytes": size_bytes, "plan_json": plan}
            values |= {"cost": float(size_bytes)}
            values |= {"gap_pct": None if gap_pct is None else gap_pct + hour, "evaluation": evaluation}
            rows.append(row("trials", f"{run_id}/{i}", **values))
        # The confirmation of a plan is another number: it must not enter the front.
        rows.append(row("trials", f"{run_id}/c", run_id=run_id, size_bytes=1, gap_pct=-9.0, evaluation="confirm"))
        store.append("trials", rows)
    return root


def test_the_front_of_the_latest_finished_search(searched):
    front = latest_front(searched)
    assert set(front["run_id"]) == {"new"}
    assert front["number"].tolist() == [1, 2, 4]
    assert front["size_bytes"].tolist() == [100, 200, 400]
    assert front["recommended"].tolist() == [False, True, False]
    assert front["precisions"].tolist() == ["int4:2 int8:1"] * 3
    # A gap never stands without its interval, kind, window and number of examples.
    assert {"gap_lower_pct", "gap_upper_pct", "evaluation", "window", "num_examples"} <= set(front.columns)


def test_the_front_is_over_what_the_search_minimised_and_marks_a_plan_for_each_budget(tmp_path, row):
    store = ResultsStore(tmp_path)
    summary = json.dumps({"recommendations": [{"trial_key": "t0"}, {"trial_key": "t3"}]})
    store.append(
        "runs", [row("runs", "a", run_id="a", status="done", summary_json=summary, recommended_trial_key="t0")]
    )
    points = [(300, 1.0, 0.3), (200, 2.0, 0.2), (100, 3.0, 0.25), (400, 4.0, 0.4)]  # bytes, latency, gap
    store.append(
        "trials",
        [
            row("trials", f"k{i}", run_id="a", trial_key=f"t{i}", number=i, evaluation="exact", plan_json="{}")
            | {"size_bytes": size, "cost": cost, "gap_pct": gap}
            for i, (size, cost, gap) in enumerate(points)
        ],
    )
    front = latest_front(tmp_path)
    assert front["number"].tolist() == [0, 1, 3]
    assert front["recommended"].tolist() == [True, False, True]


def test_the_report_of_sensitivities_is_of_one_run_and_the_best_bargains_come_first(searched, row):
    store = ResultsStore(searched)
    for run_id in ("old", "new"):
        found = [("table:a", "int4", 0.3), ("table:b", "int2", -0.1), ("table:a", "int8", None)]
        store.append(
            "sensitivities",
            [
                row("sensitivities", f"{run_id}/{unit}/{precision}", run_id=run_id, unit=unit, precision=precision)
                | {"gap_pct_per_mb": per_mb}
                for unit, precision, per_mb in found
            ],
        )
    report = sensitivity_report(searched)
    assert set(report["run_id"]) == {"new"}
    assert report["unit"].tolist() == ["table:b", "table:a", "table:a"]
    assert {"gap_pct", "gap_lower_pct", "gap_upper_pct", "bytes_saved", "linearization_error"} <= set(report.columns)
    assert set(sensitivity_report(searched, "old")["run_id"]) == {"old"}


def test_views_are_those_of_a_folder(searched):
    frame = query("SELECT run_id, status, count(*) AS n FROM runs JOIN trials USING (run_id) GROUP BY ALL", searched)
    assert sorted(frame.itertuples(index=False, name=None)) == [
        ("check", "done", 7),
        ("new", "done", 7),
        ("old", "done", 7),
        ("open", "running", 7),
    ]


def test_the_front_of_a_given_run(searched):
    front = latest_front(searched, "open")
    assert set(front["run_id"]) == {"open"}
    assert len(front) == 3
    with pytest.raises(QueryError, match='no run "lost" under .*; the latest are new, open, check'):
        latest_front(searched, "lost")


def test_the_front_of_a_root_with_no_finished_run(tmp_path, row):
    store = ResultsStore(tmp_path)
    store.append("runs", [row("runs", "a", run_id="a", status="running", summary_json=None)])
    with pytest.raises(QueryError, match="no search has results under"):
        latest_front(tmp_path)
    assert latest_front(tmp_path, "a").empty
    store.append("trials", [row("trials", "k", run_id="a", evaluation="exact", plan_json="{}")])
    assert len(latest_front(tmp_path)) == 1


def test_the_front_survives_no_runs_table(tmp_path):
    """Only sensitivities were written before the process died."""
    empty = TABLES["sensitivities"].arrow.empty_table()
    assert isinstance(empty, pa.Table)
    write_deltalake(tmp_path / "sensitivities", empty, description=f"lowprec results, schema {SCHEMA_VERSION}")
    with pytest.raises(QueryError, match="no search has results"):
        latest_front(tmp_path)
