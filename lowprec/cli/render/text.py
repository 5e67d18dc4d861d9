"""Formats numbers for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from lowprec.cli.console import stdout

__all__ = ["count_text", "gap_text", "is_known", "number", "render_frame", "render_rows"]


def gap_text(metrics: Mapping[str, Any], kind: str = "gap") -> str:
    """A gap as it must always be printed: with its interval."""
    value, lower, upper = (metrics[f"{kind}_{end}pct"] for end in ("", "lower_", "upper_"))
    if not is_known(value):
        return "unknown"
    if not (is_known(lower) and is_known(upper)):
        return f"{value:+.4f} % (no interval: too little evidence)"
    return f"{value:+.4f} % [{lower:+.4f}, {upper:+.4f}]"


def count_text(log10: float) -> str:
    """A count whose logarithm is known: in full up to a million."""
    return f"{round(10**log10):,}" if log10 < 6 else f"{10 ** (log10 % 1):.2f}e{int(log10)}"


def number(value: float | None, form: str) -> str:
    """A number in a form, a dash where there is none."""
    return form.format(value) if is_known(value) else "-"


def is_known(value: float | None) -> bool:
    """Whether there is a finite number."""
    return value is not None and math.isfinite(value)


def render_frame(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Cells of a query as a table."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*map(escape, row))
    stdout.print(table)


def render_rows(name: str, rows: Mapping[str, Any]) -> None:
    """What did not count as an example; nothing where every row did."""
    parts = []
    if rows["num_bad"]:
        parts.append(f"{rows['num_bad']:,} bad rows (kept in quarantine)")
    if rows["num_unlabelled"]:
        parts.append(f"{rows['num_unlabelled']:,} rows without a label")
    parts += [f"{count:,} ids of {feature} out of range" for feature, count in rows["out_of_range"].items()]
    if parts:
        stdout.print(f"{name} window, of {rows['num_read']:,} rows: {', '.join(parts)}")
    if rows["never_looked_up"]:
        stdout.print(f"{name} window: no row was looked up of {', '.join(rows['never_looked_up'])}")
