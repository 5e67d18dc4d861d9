"""Documents of commands as text for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from lowprec.console import stdout
from lowprec.plan import precision_counts

__all__ = [
    "bytes_text",
    "gap_text",
    "render_calibration",
    "render_dry_run",
    "render_frame",
    "render_front",
    "render_search",
    "render_train",
    "render_verify",
]

VERDICT_STYLE = {"certified": "green", "rejected": "red", "inconclusive": "yellow"}


def bytes_text(size: float) -> str:
    """Bytes in the unit that keeps three digits."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.4g} TB"


def gap_text(metrics: Mapping[str, Any], kind: str = "gap") -> str:
    """A gap as it must always be printed: with its interval."""
    value, lower, upper = (metrics[f"{kind}_{end}pct"] for end in ("", "lower_", "upper_"))
    if not _is_known(value):
        return "unknown"
    if not (_is_known(lower) and _is_known(upper)):
        return f"{value:+.4f} % (no interval: too little evidence)"
    return f"{value:+.4f} % [{lower:+.4f}, {upper:+.4f}]"


def render_dry_run(document: Mapping[str, Any]) -> None:
    """Tables, space, bytes and windows of a search that was not run."""
    table = Table(
        "unit", "rows", "dim", "features", "precisions", "fp32", "cheapest", title=f"{document['name']}: tables"
    )
    for unit in document["units"]:
        table.add_row(
            unit["name"],
            f"{unit['num_rows']:,}",
            str(unit["dim"]),
            ", ".join(unit["features"]) or "-",
            " ".join(unit["precisions"]),
            bytes_text(unit["bytes"]["fp32"]),
            bytes_text(min(unit["bytes"][p] for p in unit["precisions"])),
        )
    stdout.print(table)
    for item in document["dominated"]:
        stdout.print(
            f"not searched: {item['precision']} for {item['unit']}, {bytes_text(item['bytes'])}; "
            f"{item['by']} is more exact at {bytes_text(item['by_bytes'])}"
        )
    stdout.print(
        f"plans: {_count_text(document['log10_num_plans'])}; fp32 {bytes_text(document['fp32_bytes'])}, "
        f"cheapest {bytes_text(document['cheapest_bytes'])} at row alignment {document['row_alignment']}"
    )
    for window in document["windows"]:
        stdout.print(
            f"{window['name']} window {window['window']}: {window['num_rows']:,} rows, {window['num_batches']} batches"
        )
    for note in document["notes"]:
        stdout.print(note)


def render_front(rows: Sequence[Mapping[str, Any]]) -> None:
    """A Pareto front, the recommended plan marked; rows as `lowprec.results.latest_front` gives them."""
    if not rows:
        stdout.print("no plan has a finite gap yet")
        return
    table = Table(
        title=f"run {rows[0]['run_id']}: Pareto front, {rows[0]['evaluation']} on {rows[0]['num_examples']:,} examples "
        f"of {rows[0]['window']}",
        title_justify="left",
    )
    # What does not fit a narrow terminal is left out from the right, rather than squeezed until nothing can be read.
    num_columns = 7 if stdout.width >= 126 else 6 if stdout.width >= 107 else 5
    for name in ("", "bytes", "of fp32", "gap", "KL gap", "precisions", "trial")[:num_columns]:
        table.add_column(name, no_wrap=True)
    for row in rows:
        cells = (
            "*" if row["recommended"] else "",
            bytes_text(row["size_bytes"]),
            f"{row['bytes_ratio']:.3f}",
            gap_text(row),
            _number(row["kl_pct"], "{:.4f} %"),
            row["precisions"],
            row["trial_key"],
        )
        table.add_row(*cells[:num_columns], style="bold" if row["recommended"] else None)
    stdout.print(table)


def render_search(document: Mapping[str, Any]) -> None:
    """The front, the recommended plan and its evidence."""
    chosen = {k: document[k] for k in ("trial_key", "plan", "bytes", "bytes_ratio")} | document["search"]
    shown = {trial["trial_key"]: trial for trial in [*document["front"], chosen]}
    render_front(
        [
            {
                **trial,
                "run_id": document["run_id"],
                "evaluation": "exact",
                "window": document["windows"]["search"],
                "size_bytes": trial["bytes"],
                "recommended": trial is shown[document["trial_key"]],
                "precisions": precision_counts(trial["plan"].values()),
            }
            for trial in sorted(shown.values(), key=lambda t: t["bytes"])
        ]
    )
    _render_plan(document)
    stdout.print(f"search:  {_evidence(document['search'], document['windows']['search'])}")
    stdout.print(f"         {document['because']}")
    stdout.print(f"confirm: {_evidence(document['confirm'], document['windows']['confirm'])}")
    for other in document["finalists"]:
        if other["trial_key"] != document["trial_key"]:
            stdout.print(
                f"also tried: {bytes_text(other['bytes'])} ({other['bytes_ratio']:.3f} of fp32, "
                f"{precision_counts(other['plan'].values())}), "
                f"{_evidence(other, document['windows']['confirm'])}: {other['verdict']}"
            )
    _render_quality(document["confirm"])
    for name, rows in document["rows"].items():
        _render_rows(name, rows)
    stdout.print(f"plan written to {document['plan_path']}; {document['num_trials']} trials in {document['seconds']} s")
    for warning in document["warnings"]:
        stdout.print(f"[yellow]warning:[/yellow] {escape(warning)}")
    _render_verdict(document["verdict"], document["budget_pct"])


def render_verify(document: Mapping[str, Any]) -> None:
    """One plan and its evidence."""
    _render_plan(document)
    stdout.print(_evidence(document, document["window"]))
    _render_quality(document)
    _render_rows("verified", document["rows"])
    for warning in document["warnings"]:
        stdout.print(f"[yellow]warning:[/yellow] {escape(warning)}")
    _render_verdict(document["verdict"], document["budget_pct"])


def render_train(document: Mapping[str, Any]) -> None:
    """The quality of a trained model."""
    table = Table("window", "examples", "NE", "AUC", "calibration")
    for name in ("train", "validation"):
        q = document[name]
        table.add_row(
            name,
            f"{q['num_examples']:,}",
            _number(q["ne"], "{:.4f}"),
            _number(q["auc"], "{:.4f}"),
            _number(q["calibration"], "{:.4f}"),
        )
    stdout.print(table)
    num_read = document["num_rows"] + document["num_unlabelled"] + document["num_bad"]
    _render_rows("train", {**document, "num_read": num_read, "never_looked_up": []})
    num_read = document["num_rows"] + document["num_unlabelled"] + document["num_bad"]
    _render_rows("train", {**document, "num_read": num_read, "never_looked_up": []})
    stdout.print(
        f"{document['epochs']:.3g} epochs in {document['seconds']:.1f} s, best after {document['best_epoch']:.3g}"
    )
    stdout.print(f"checkpoint written to {document['checkpoint']} (sha256 {document['checkpoint_sha256'][:12]})")


def render_calibration(document: Mapping[str, Any]) -> None:
    """Times at the fewest and the most ids in a bag, and what was left out."""
    points, machine = document["points"], document["machine"]
    dims, precisions = sorted({p["dim"] for p in points}), list(dict.fromkeys(p["precision"] for p in points))
    most_rows = [
        max(p["rows"] for p in points if (p["precision"], p["dim"]) == (q, d)) for q in precisions for d in dims
    ]
    num_rows = min(most_rows)  # the most that every column has
    times = {(p["precision"], p["dim"], p["pooling"]): p["ns_per_bag"] for p in points if p["rows"] == num_rows}
    poolings = sorted({p["pooling"] for p in points})
    for pooling in dict.fromkeys((poolings[0], poolings[-1])):
        title = f"ns per bag of {pooling:g} {'id' if pooling == 1 else 'ids'}, {num_rows:,} rows"
        table = Table("precision", title=title, title_justify="left")
        for dim in dims:
            table.add_column(f"dim {dim}", justify="right", no_wrap=True)
        for precision in precisions:
            table.add_row(precision, *(f"{times[precision, dim, pooling]:,.1f}" for dim in dims))
        stdout.print(table)
    spreads = sorted(p["spread"] for p in points)
    stdout.print(
        f"{len(points)} points on {escape(str(machine['cpu']))}, threads: {machine['num_threads']}; spread of "
        f"{machine['num_repeats']} repetitions (interquartile range / median): {spreads[len(spreads) // 2]:.0%} at "
        f"half of the points, {spreads[-1]:.0%} at worst"
    )
    left_out: dict[tuple[int, str], list[str]] = {}
    for item in document["left_out"]:
        left_out.setdefault((item["rows"], item["precision"]), []).append(str(item["dim"]))
    for (rows, precision), left_out_dims in left_out.items():
        stdout.print(
            f"left out: {rows:,} rows of {precision} at dim {', '.join(left_out_dims)}, "
            f"over the memory limit of {document['memory_limit_bytes'] / 2**20:,.0f} MiB (--memory-mb)"
        )
    stdout.print(f"written to {escape(document['path'])}")


def render_frame(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Cells of a query as a table."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*map(escape, row))
    stdout.print(table)


def _render_plan(document: Mapping[str, Any]) -> None:
    text = precision_counts(document["plan"].values())
    stdout.print(
        f"plan: {bytes_text(document['bytes'])} of {bytes_text(document['fp32_bytes'])} "
        f"({document['bytes_ratio']:.3f} of fp32): {text}"
    )


def _evidence(metrics: Mapping[str, Any], window: str) -> str:
    groups = "" if metrics["num_units"] == metrics["num_examples"] else f" in {metrics['num_units']:,} groups"
    return (
        f"gap {gap_text(metrics)} at {100 * metrics['confidence']:.4g} % confidence, KL gap {gap_text(metrics, 'kl')}, "
        f"exact on {metrics['num_examples']:,} examples{groups} of {window}"
    )


def _render_quality(metrics: Mapping[str, Any]) -> None:
    for name, side in (("reference", "ref"), ("plan", "plan")):
        ne, auc, calibration = (_number(metrics[f"{m}_{side}"], "{:.5f}") for m in ("ne", "auc", "calibration"))
        error = _number(metrics["auc_error"], "{:.5f}")
        stdout.print(f"{name + ':':<10} NE {ne}, AUC {auc} (binned, within {error}), calibration {calibration}")


def _render_rows(name: str, rows: Mapping[str, Any]) -> None:
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


def _render_verdict(verdict: str, budget_pct: float) -> None:
    stdout.print(f"[{VERDICT_STYLE[verdict]}]{verdict}[/] against a budget of {budget_pct} %")


def _count_text(log10: float) -> str:
    return f"{round(10**log10):,}" if log10 < 6 else f"{10 ** (log10 % 1):.2f}e{int(log10)}"


def _number(value: float | None, form: str) -> str:
    return form.format(value) if _is_known(value) else "-"


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
