"""Prints the report of the debugger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from lowprec.cli.console import stdout
from lowprec.cli.render.text import gap_text, number
from lowprec.core.sizes import bytes_text

__all__ = ["render_debug", "render_debug_comparison"]

_MAX_SUSPECTS = 5


def render_debug(document: Mapping[str, Any]) -> None:
    """Units in the order of the model, the suspects, and the change that helps most."""
    table = Table(title=_title(document), title_justify="left")
    names = ("unit", "precision", "SQNR alone", "accumulated", "max error", "saturated", "underflowed", "share of gap")
    for name in names:
        table.add_column(name, no_wrap=True, justify="left" if name in ("unit", "precision") else "right")
    for unit in document["units"]:
        counts = unit["counts"].values()
        values = sum(of["values"] for of in counts)
        table.add_row(
            escape(unit["unit"]),
            unit["precision"],
            _sqnr(unit["alone"]),
            _sqnr(unit["accumulated"]),
            number(unit["alone"]["max_error"], "{:.2g}"),
            *(_rate(sum(of.get(kind, 0) for of in counts), values) for kind in ("saturated", "underflowed")),
            number(unit["share"], "{:.1%}"),
            style="bold red" if unit["differs"] or unit["alone"]["num_not_finite"] else None,
        )
    stdout.print(table)
    stdout.print(
        f"gap {gap_text(document)} (exact), KL gap {gap_text(document, 'kl')}, on {document['num_examples']:,} "
        f"examples of {document['window']}; SQNR and errors on {document['num_compared']:,} of them, shares and counts "
        f"of inputs on {document['num_traced']:,}"
    )
    for k, suspect in enumerate(document["suspects"][:_MAX_SUSPECTS], 1):
        stdout.print(f"{k}. {escape(suspect['unit'])}: {escape('; '.join(suspect['why']))}")
    if len(document["suspects"]) > _MAX_SUSPECTS:
        stdout.print(f"and {len(document['suspects']) - _MAX_SUSPECTS} more (--json has all)")
    if not document["suspects"]:
        stdout.print("no unit is suspect")
    _render_change(document["change"])
    for name, path in document["arrays"].items():
        stdout.print(f"errors by {name.removesuffix('s')}: {escape(path)}")
    for warning in document["warnings"]:
        stdout.print(f"[yellow]warning[/yellow] {escape(warning)}")


def render_debug_comparison(document: Mapping[str, Any]) -> None:
    """Two reports side by side, the units that got worst first."""
    table = Table(
        title=f"{document['name']}: {escape(document['before']['plan'])} and {escape(document['after']['plan'])}",
        title_justify="left",
    )
    for name in ("unit", "precision", "SQNR alone", "KL gap", "grew by"):
        table.add_column(name, no_wrap=True)
    for unit in document["units"]:
        before, after = unit["before"], unit["after"]
        table.add_row(
            escape(unit["unit"]),
            " to ".join(dict.fromkeys((before["precision"], after["precision"]))),
            f"{_sqnr(before['alone'])} to {_sqnr(after['alone'])}",
            f"{number(before['kl_pct'], '{:.5f}')} to {number(after['kl_pct'], '{:.5f}')} %",
            number(unit["grew_pct"], "{:+.5f} %"),
        )
    stdout.print(table)
    for name in ("before", "after"):
        of = document[name]
        stdout.print(
            f"{name}: {escape(of['plan'])}: gap {gap_text(of)} (exact), KL gap {gap_text(of, 'kl')}, on "
            f"{of['num_examples']:,} examples of {of['window']}"
        )
        for warning in of["warnings"]:
            stdout.print(f"[yellow]warning[/yellow] {name}: {escape(warning)}")


def _title(document: Mapping[str, Any]) -> str:
    return f"{escape(document['name'])}: {escape(document['plan'])}, in the order of the model"


def _render_change(change: Mapping[str, Any] | None) -> None:
    if change is None:
        return
    added = change["bytes_added"]
    cost = "no bytes more" if added == 0 else f"{bytes_text(abs(added))} {'more' if added > 0 else 'less'}"
    rest = f", {change['kept']:.0%} of what fp32 would do" if (change["kept"] or 1.0) < 1 else ""
    stdout.print(
        f"change that helps most: {escape(change['unit'])} {escape(change['to'])}, {cost}: KL gap "
        f"{number(change['kl_before_pct'], '{:.4f}')} to {number(change['kl_after_pct'], '{:.4f}')} %, exact on "
        f"{change['num_examples']:,} examples{rest}"
    )


def _sqnr(errors: Mapping[str, Any]) -> str:
    if errors["num_not_finite"]:
        return "not finite"
    return "exact" if errors["sqnr_db"] is None else f"{errors['sqnr_db']:.1f} dB"


def _rate(count: int, of: int) -> str:
    return "-" if not count else f"{count / of:.2%}" if count / of >= 1e-4 else f"{count:,}"
