"""Prints plans and their evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from lowprec.cli.console import stdout
from lowprec.cli.render.text import gap_text, is_known, number, render_rows
from lowprec.core.sizes import bytes_text, digits_apart
from lowprec.plan import precision_counts, precision_texts

__all__ = ["render_front", "render_plan", "render_search", "render_sensitivities", "render_verify"]

VERDICT_STYLE = {"certified": "green", "rejected": "red", "inconclusive": "yellow"}


def render_front(rows: Sequence[Mapping[str, Any]]) -> None:
    """A Pareto front, the recommended plan marked; rows as `lowprec.results.latest_front` gives them."""
    if not rows:
        stdout.print("no plan has a finite gap yet")
        return
    table = Table(
        title=f"run {rows[0]['run_id']}: Pareto front, {rows[0]['evaluation']} on up to "
        f"{max(row['num_exact'] for row in rows):,} of {rows[0]['num_examples']:,} examples of {rows[0]['window']}",
        title_justify="left",
    )
    # What does not fit a narrow terminal is left out from the right, rather than squeezed until nothing can be read.
    num_columns = 7 if stdout.width >= 126 else 6 if stdout.width >= 107 else 5
    for name in ("", "bytes", "of fp32", "gap", "KL gap", "precisions", "trial")[:num_columns]:
        table.add_column(name, no_wrap=True)
    # Rows of different sizes look different.
    digits = digits_apart(row["size_bytes"] for row in rows)
    for row in rows:
        cells = (
            "*" if row["recommended"] else "",
            bytes_text(row["size_bytes"], digits=digits),
            f"{row['bytes_ratio']:.{digits}f}",
            gap_text(row),
            number(row["kl_pct"], "{:.4f} %"),
            row["precisions"],
            row["trial_key"],
        )
        table.add_row(*cells[:num_columns], style="bold" if row["recommended"] else None)
    stdout.print(table)


def render_search(document: Mapping[str, Any]) -> None:
    """The front, and for each budget the recommended plan and its evidence."""
    recommended = {r["trial_key"] for r in document["recommendations"]}
    kept = ("trial_key", "plan", "bytes", "bytes_ratio", "latency_ns", "promised_pct")
    chosen = [{k: r[k] for k in kept} | r["search"] for r in document["recommendations"]]
    shown = {trial["trial_key"]: trial for trial in [*document["front"], *chosen]}
    trials = sorted(shown.values(), key=lambda t: t["bytes"])
    texts = precision_texts([trial["plan"] for trial in trials])
    render_front(
        [
            {
                **trial,
                "run_id": document["run_id"],
                "evaluation": "exact",
                "window": document["windows"]["search"],
                "size_bytes": trial["bytes"],
                "recommended": trial["trial_key"] in recommended,
                "precisions": text,
            }
            for trial, text in zip(trials, texts, strict=True)
        ]
    )
    _render_profile(document["profile"])
    for recommendation in document["recommendations"]:
        if len(document["recommendations"]) > 1:
            stdout.print(f"[bold]budget {recommendation['budget_pct']:g} %[/bold]")
        _render_recommendation({**recommendation, "fp32_bytes": document["fp32_bytes"]}, document["windows"])
    for name, rows in document["rows"].items():
        render_rows(name, rows)
    stdout.print(f"{document['num_trials']} trials in {document['seconds']} s")
    for warning in document["warnings"]:
        stdout.print(f"[yellow]warning:[/yellow] {escape(warning)}")
    for recommendation in document["recommendations"]:
        _render_verdict(recommendation)


def render_plan(document: Mapping[str, Any]) -> None:
    """A plan by hand that was written."""
    _render_plan(document)
    for unit, form in document["layer_forms"].items():
        details = ", ".join(f"{key} {value}" for key, value in form.items())
        stdout.print(f"{escape(unit)}: {document['plan'][unit]}, {details}")
    stdout.print(f"plan written to {escape(document['path'])}; to judge it: lowprec verify CONFIG --plan PLAN")


def render_verify(document: Mapping[str, Any]) -> None:
    """One plan and its evidence."""
    _render_plan(document)
    stdout.print(_evidence(document, document["window"]) + _certifiable(document))
    _render_quality(document)
    render_rows("verified", document["rows"])
    for warning in document["warnings"]:
        stdout.print(f"[yellow]warning:[/yellow] {escape(warning)}")
    _render_gated(document)
    snapshot = document["snapshot"]
    if snapshot and snapshot["plan_path"]:
        stdout.print(f"the plan for {escape(snapshot['checkpoint'])}: {escape(snapshot['plan_path'])}")
    if document["repair"]:
        stdout.print("searched from this plan on:")
        render_search(document["repair"])
        _render_floors(document["repair_floors"])


def render_sensitivities(rows: Sequence[Mapping[str, Any]]) -> None:
    """What each table does at each precision by itself, as `lowprec.results.sensitivity_report` gives it."""
    if not rows:
        stdout.print("there is nothing to choose in this space")
        return
    first = rows[0]
    table = Table(
        title=f"run {first['run_id']}: each unit alone, the others fp32; {first['num_examples']:,} examples of "
        f"{first['window']}, the linearization on {first['num_exact']:,} of them",
        title_justify="left",
    )
    names = ("unit", "precision", "saves", "gap", "promised", "KL gap", "promised per MB", "exact KL / predicted")
    for name in names if stdout.width >= 140 else names[:-1] if stdout.width >= 118 else names[:6]:
        table.add_column(name, no_wrap=True)
    for row in rows:
        cells = (
            escape(row["unit"]),
            row["precision"],
            bytes_text(row["bytes_saved"]),
            gap_text(row),
            number(row["promised_pct"], "{:+.5f} %"),
            number(row["kl_pct"], "{:.5f} %"),
            number(row["gap_pct_per_mb"], "{:+.5f} %"),
            number(None if row["linearization_error"] is None else 1 + row["linearization_error"], "{:.3f}"),
        )
        table.add_row(*cells[: len(table.columns)])
    stdout.print(table)


def _render_recommendation(document: Mapping[str, Any], windows: Mapping[str, str]) -> None:
    _render_plan(document)
    stdout.print(f"search:  {_evidence(document['search'], windows['search'])}")
    stdout.print(
        f"         {document['because']}; the profile promised {number(document['promised_pct'], '{:+.4f} %')}"
    )
    stdout.print(f"confirm: {_evidence(document['confirm'], windows['confirm'])}{_certifiable(document)}")
    for other in document["finalists"]:
        if other["trial_key"] != document["trial_key"]:
            stdout.print(
                f"also tried: {bytes_text(other['bytes'])} ({other['bytes_ratio']:.3f} of fp32, "
                f"{precision_counts(other['plan'].values())}), {_evidence(other, windows['confirm'])}: "
                f"{other['verdict']}{_certifiable(other)}"
            )
    _render_quality(document["confirm"])
    stdout.print(f"plan written to {escape(document['plan_path'])}")


def _render_profile(profile: Mapping[str, Any]) -> None:
    how = (
        "all plans scored"
        if profile["front_is_exact"]
        else f"within {profile['front_distance']:.1%} of the least cost at the budget"
    )
    sketched = profile["second_order_error"]
    sketch = f", second order sketched within {sketched:.1%} (one standard deviation)" if sketched else ""
    stdout.print(
        f"profile: {profile['num_columns']} choices on {profile['num_examples']:,} examples{sketch}; "
        f"front of {profile['front_plans']} plans ({how}); "
        f"{profile['first_order_kept']['rest']:.0%} of the first order is more than noise, the reference's logits are "
        f"off by {profile['logit_shift']:+.3f}"
    )


def _render_plan(document: Mapping[str, Any]) -> None:
    text = precision_counts(document["plan"].values())
    stdout.print(
        f"plan: {bytes_text(document['bytes'])} of {bytes_text(document['fp32_bytes'])} "
        f"({document['bytes_ratio']:.3f} of fp32){_latency(document)}: {text}{_row_ranges(document)}"
    )


def _row_ranges(document: Mapping[str, Any]) -> str:
    kinds = sorted(set(document["row_ranges"].values()))
    return f", row ranges by {' and '.join(kinds)}" if kinds else ""


def _latency(document: Mapping[str, Any]) -> str:
    latency = document.get("latency_ns")
    return f", {latency:,.0f} ns of lookups an example" if is_known(latency) else ""


def _evidence(metrics: Mapping[str, Any], window: str) -> str:
    groups = "" if metrics["num_units"] == metrics["num_examples"] else f" in {metrics['num_units']:,} groups"
    exact, whole = metrics["num_exact"], metrics["num_examples"]
    counted = f"{whole:,}" if exact == whole else f"{exact:,} of {whole:,}"
    rest = "" if exact == whole else ", the profile for the rest"
    confidence = f"{100 * metrics['confidence']:.4g} %"
    how = f"one-sided bounds at {confidence} each" if metrics["looks"] == "once" else f"sequence at {confidence}"
    return (
        f"gap {gap_text(metrics)} ({how}), KL gap {gap_text(metrics, 'kl')}, "
        f"exact on {counted} examples{groups} of {window}{rest}"
    )


def _certifiable(document: Mapping[str, Any]) -> str:
    budget = document["certifiable_budget_pct"]
    return f"; smallest certifiable budget {budget:.4f} %" if is_known(budget) else "; no budget is certifiable"


def _render_quality(metrics: Mapping[str, Any]) -> None:
    for name, side in (("reference", "ref"), ("plan", "plan")):
        ne, auc, calibration = (number(metrics[f"{m}_{side}"], "{:.5f}") for m in ("ne", "auc", "calibration"))
        error = number(metrics["auc_error"], "{:.5f}")
        stdout.print(f"{name + ':':<10} NE {ne}, AUC {auc} (binned, within {error}), calibration {calibration}")


def _render_gated(document: Mapping[str, Any]) -> None:
    """The verdict of a verification: where a floor decides, the floor, and what the gap alone would be."""
    _render_floors(document["floors"])
    verdict, by_gap = document["verdict"], document["budget_verdict"]
    if verdict == by_gap:
        _render_verdict(document)
        return
    decided = ", ".join(f"gate.{floor['name']}" for floor in document["floors"] if not floor["is_kept"])
    stdout.print(
        f"[{VERDICT_STYLE[verdict]}]{verdict}[/] by {decided}; the gap alone is {by_gap} against a budget of "
        f"{document['budget_pct']} %"
    )


def _render_floors(floors: Sequence[Mapping[str, Any]]) -> None:
    for floor in floors:
        style = "green" if floor["is_kept"] else "yellow" if floor["is_kept"] is None else "red"
        word = "kept" if floor["is_kept"] else "not judged" if floor["is_kept"] is None else "broken"
        stdout.print(f"floor [{style}]{word}[/]: {escape(floor['message'])}")


def _render_verdict(document: Mapping[str, Any]) -> None:
    verdict, missing = document["verdict"], document["missing_evidence"]
    stdout.print(f"[{VERDICT_STYLE[verdict]}]{verdict}[/] against a budget of {document['budget_pct']} %")
    if not document.get("saves", True):
        stdout.print("the recommended plan saves nothing, which is no success")
    if missing:
        stdout.print(f"missing evidence: {missing['text']}")
