"""A query's answer on the terminal or in a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

import pandas as pd

from lowprec.errors import ConfigError, ResultsError

__all__ = ["Format", "write_frame"]

Format = Literal["table", "json", "csv", "parquet"]

SCHEMA_VERSION = 1


def write_frame(frame: pd.DataFrame, *, form: Format, out: Path | None) -> None:
    """Write `frame` to `out`, or to stdout; Parquet goes to a terminal never.

    JSON is one document: {"schema_version", "command": "results", "columns", "rows": [{column: value}]}.
    """
    if form == "parquet" and out is None and sys.stdout.isatty():
        raise ConfigError("--format parquet: give --out FILE, or send the output to a file")
    if out is not None and form == "table":
        raise ConfigError("--out: needs --format json, csv or parquet")
    try:
        if form == "parquet":
            frame.to_parquet(out if out is not None else sys.stdout.buffer, index=False)
        elif form == "csv":
            frame.to_csv(out if out is not None else sys.stdout, index=False)
        elif form == "json":
            text = json.dumps(_document(frame), indent=2) + "\n"
            sys.stdout.write(text) if out is None else out.write_text(text)
        else:
            _print_table(frame)
    except OSError as error:
        raise ResultsError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def _document(frame: pd.DataFrame) -> dict[str, object]:
    rows = json.loads(frame.to_json(orient="records", date_format="iso", double_precision=15))
    return {"schema_version": SCHEMA_VERSION, "command": "results", "columns": list(frame.columns), "rows": rows}


def _print_table(frame: pd.DataFrame) -> None:
    from lowprec.render import render_frame

    render_frame(map(str, frame.columns), frame.itertuples(index=False))
