"""A query's answer on the terminal or in a file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from lowprec.cli.console import document_stream
from lowprec.cli.render.text import render_frame
from lowprec.core.errors import ConfigError, QueryError, ResultsError

__all__ = ["Format", "write_frame"]

Format = Literal["table", "json", "csv", "parquet"]

SCHEMA_VERSION = 1
MAX_CELL = 60


def write_frame(frame: pd.DataFrame, *, form: Format, out: Path | None) -> None:
    """Write `frame` to `out`, or to stdout; Parquet goes to a terminal never.

    JSON is one document: {"schema_version", "command": "results", "columns", "rows": [{column: value}]}.
    """
    if form == "parquet" and out is None and document_stream().isatty():
        raise ConfigError("--format parquet: give --out FILE, or send the output to a file")
    if out is not None and form == "table":
        raise ConfigError("--out: needs --format json, csv or parquet")
    repeated = sorted({str(c) for c in frame.columns[frame.columns.duplicated()]})
    if repeated and form in ("json", "parquet"):
        raise QueryError(f"lowprec results: --format {form} needs one name a column; repeated: {', '.join(repeated)}")
    try:
        if form == "parquet":
            frame.to_parquet(out if out is not None else document_stream().buffer, index=False)
        elif form == "csv":
            frame.to_csv(out if out is not None else document_stream(), index=False)
        elif form == "json":
            text = json.dumps(_document(frame), indent=2) + "\n"
            document_stream().write(text) if out is None else out.write_text(text)
        else:
            _print_table(frame)
    except BrokenPipeError:
        raise  # whoever read the output has read enough
    except OSError as error:
        raise ResultsError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def _document(frame: pd.DataFrame) -> dict[str, object]:
    columns = [str(name) for name in frame.columns]
    rows = [dict(zip(columns, map(_plain, row), strict=True)) for row in frame.itertuples(index=False, name=None)]
    return {"schema_version": SCHEMA_VERSION, "command": "results", "columns": columns, "rows": rows}


def _plain(value: Any) -> object:
    """What JSON can say: no NaN, times as ISO 8601, anything else that it does not know as text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is pd.NaT or value is pd.NA:
        return None
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _cell(value: Any) -> str:
    """A value as a table shows it; long ones cut, because a config in a cell hides all others."""
    plain = _plain(value)
    if plain is None:
        return "-"
    text = f"{plain:.6g}" if isinstance(plain, float) else str(plain)
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 1]}…"


def _print_table(frame: pd.DataFrame) -> None:
    render_frame(map(str, frame.columns), (map(_cell, row) for row in frame.itertuples(index=False, name=None)))
