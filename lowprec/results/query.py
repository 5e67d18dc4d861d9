"""SQL over results, read only, by DuckDB in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa

from lowprec.core.errors import QueryError, ResultsError, first_line
from lowprec.plan import precision_texts
from lowprec.results.schema import TABLES, TableSchema
from lowprec.results.store import ResultsStore

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["latest_front", "query", "query_arrow", "sensitivity_report"]

_READING = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
_GAP = r"(?:\s|/\*.*?\*/|--[^\n]*\n)*"
_EXPLAIN = re.compile(rf"{_GAP}EXPLAIN\b{_GAP}(ANALYZE\b|\([^)]*\))?", re.IGNORECASE | re.DOTALL)
# Nothing of the machine is reachable from SQL: no files, no network, no extensions, no variables of the caller.
_SETTINGS: Mapping[str, str] = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",
}
_LOCK = ("SET TimeZone = 'UTC'", "SET enable_external_access = false", "SET lock_configuration = true")
_FRONT_COLUMNS = (
    "run_id",
    "number",
    "kind",
    "precisions",
    "size_bytes",
    "bytes_ratio",
    "gap_pct",
    "gap_lower_pct",
    "gap_upper_pct",
    "kl_pct",
    "promised_pct",
    "latency_ns",
    "verdict",
    "recommended",
    "evaluation",
    "num_examples",
    "num_exact",
    "window",
    "trial_key",
)


def query(sql: str, root: str | Path = "runs") -> pd.DataFrame:
    """The answer to one reading SQL statement (SELECT, WITH, DESCRIBE, SHOW, EXPLAIN) as a DataFrame.

    The tables are `runs` (the latest version of each run), `trials` and `sensitivities`, with one row for each
    `row_key`. Raises `QueryError` when the statement is wrong or does anything but read, `ResultsError` when there
    are no results under `root`.
    """
    frame: pd.DataFrame = query_arrow(sql, root).to_pandas()
    return frame


def query_arrow(sql: str, root: str | Path = "runs") -> pa.Table:
    """What `query` returns, as an Arrow table."""
    statement = _reading_statement(sql)
    store = ResultsStore(root)
    store.check_not_empty()
    with duckdb.connect(":memory:", config=dict(_SETTINGS)) as connection:
        for schema in TABLES.values():
            connection.register(f"_{schema.name}", store.dataset(schema.name))
            connection.execute(_view(schema))
        for setting in _LOCK:
            connection.execute(setting)
        try:
            return connection.sql(statement).to_arrow_table()
        except (duckdb.IOException, pa.ArrowException) as error:
            raise ResultsError(f"results root {root}: cannot be read: {first_line(error)}") from None
        except duckdb.Error as error:
            if "reading the stream" in str(error):  # DuckDB wraps what Arrow says of a missing or broken file
                reason = " ".join(str(error).split())
                raise ResultsError(f"results root {root}: a data file cannot be read: {reason}") from None
            raise QueryError(f"lowprec results: {first_line(error)}; {_available(sql)}") from None


def latest_front(root: str | Path = "runs", run_id: str | None = None) -> pd.DataFrame:
    """The plans that no other plan of a run beats in both cost and gap, and the recommended ones, cheapest first.

    Of the exact evaluations of `run_id`, or of the latest finished run that has any, else of the latest run.
    `precisions` counts the units at each precision, and names some where plans count alike. Raises `QueryError` when
    there is no such run.
    """
    import pandas as pd

    store = ResultsStore(root)
    store.check_not_empty()
    trials = store.read("trials", evaluation="exact").to_pandas()
    chosen = _run_to_show(store.read("runs").to_pandas(), trials, str(root), run_id)
    starred = _recommended_keys(chosen)
    trials = trials[(trials["run_id"] == chosen["run_id"]) & trials["gap_pct"].notna()]
    front, best = [], float("inf")
    for _, trial in trials.sort_values(["cost", "gap_pct", "number"]).iterrows():
        if trial["gap_pct"] < best or trial["trial_key"] in starred:
            best = min(best, trial["gap_pct"])
            front.append(dict(trial))
    texts = precision_texts([json.loads(trial["plan_json"]) for trial in front])
    front = [{**trial, "precisions": text} for trial, text in zip(front, texts, strict=True)]
    frame = pd.DataFrame(front, columns=list(dict.fromkeys((*trials.columns, *_FRONT_COLUMNS))))
    frame["recommended"] = frame["trial_key"].isin(starred)
    return frame[list(_FRONT_COLUMNS)]


def sensitivity_report(root: str | Path = "runs", run_id: str | None = None) -> pd.DataFrame:
    """What each table does at each precision by itself, the cheapest choices in gap for each megabyte saved first.

    Of `run_id`, or of the latest finished run that has trials, else of the latest run. Raises `QueryError` when there
    is no such run.
    """
    store = ResultsStore(root)
    store.check_not_empty()
    runs, trials = store.read("runs").to_pandas(), store.read("trials", evaluation="exact").to_pandas()
    chosen = _run_to_show(runs, trials, str(root), run_id)
    frame = store.read("sensitivities", run_id=chosen["run_id"]).to_pandas()
    frame = frame.sort_values(["gap_pct_per_mb", "unit", "precision"], ignore_index=True)
    report: pd.DataFrame = frame.drop(columns=["row_key", "committed_at"])
    return report


def _recommended_keys(run: pd.Series) -> set[str]:
    """The trials that a run recommends, one for each of its budgets."""
    summary = json.loads(run["summary_json"]) if isinstance(run["summary_json"], str) else {}
    return {r["trial_key"] for r in summary.get("recommendations", ())} | {run["recommended_trial_key"]}


def _run_to_show(runs: pd.DataFrame, trials: pd.DataFrame, root: str, run_id: str | None) -> pd.Series:
    if run_id is not None:
        found = runs[runs["run_id"] == run_id]
        if found.empty:
            latest = ", ".join(runs.sort_values("started_at")["run_id"].tail(3)) or "none"
            raise QueryError(f'lowprec results: no run "{run_id}" under {root}; the latest are {latest}')
        return found.iloc[-1]
    found = runs[runs["run_id"].isin(trials["run_id"])].sort_values(["started_at", "run_id"])
    if found.empty:
        raise QueryError(f"lowprec results: no search has results under {root} yet; run lowprec search CONFIG first")
    finished = found[found["status"] == "done"]
    return (found if finished.empty else finished).iloc[-1]


def _reading_statement(sql: str) -> str:
    """The text of the one statement in `sql`, if it only reads."""
    statements = _statements(sql)
    if len(statements) != 1:
        raise QueryError(f"lowprec results takes one SQL statement; got {len(statements)}")
    kind, text = statements[0].type, statements[0].query
    if kind == duckdb.StatementType.EXPLAIN:
        # EXPLAIN ANALYZE runs what it explains.
        (explained,) = _statements(_EXPLAIN.sub("", text, count=1)) or (None,)
        kind = explained.type if explained is not None else kind
    if kind not in _READING:
        raise QueryError(
            f"lowprec results only reads: give one SELECT, WITH, DESCRIBE, SHOW or EXPLAIN; got {kind.name}"
        )
    return str(text)


def _statements(sql: str) -> list[duckdb.Statement]:
    try:
        return list(duckdb.extract_statements(sql))
    except duckdb.Error as error:
        raise QueryError(f"lowprec results: {first_line(error)}; {_available(sql)}") from None


def _view(schema: TableSchema) -> str:
    view = (
        f"SELECT * FROM _{schema.name} QUALIFY row_number() OVER (PARTITION BY row_key ORDER BY committed_at DESC) = 1"
    )
    if schema.entity is not None:
        view = (
            f"SELECT * FROM ({view}) "
            f"QUALIFY row_number() OVER (PARTITION BY {schema.entity} ORDER BY {schema.order} DESC) = 1"
        )
    return f"CREATE VIEW {schema.name} AS {view}"


def _available(sql: str) -> str:
    """The columns of the tables that a statement names, or the tables where it names none."""
    words = set(re.findall(r"\w+", sql.lower()))
    named = [schema for schema in TABLES.values() if schema.name in words]
    if not named:
        return f"tables are {', '.join(TABLES)}"
    return "; ".join(f"columns of {schema.name} are {', '.join(schema.arrow.names)}" for schema in named)
