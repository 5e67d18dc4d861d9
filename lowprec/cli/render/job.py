"""Prints dry runs, training, calibration and the doctor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from lowprec.cli.console import stdout
from lowprec.cli.render.placement import render_placement
from lowprec.cli.render.text import count_text, number, render_rows
from lowprec.core.sizes import bytes_text

__all__ = ["render_calibration", "render_doctor", "render_dry_run", "render_train"]


def render_dry_run(document: Mapping[str, Any]) -> None:
    """Tables, space, bytes and windows of a search that was not run, and where its tables would lie."""
    if "units" in document:
        _render_job(document)
    if "placement" in document:
        render_placement(document["placement"])


def _render_job(document: Mapping[str, Any]) -> None:
    table = Table(
        "unit", "rows", "dim", "features", "precisions", "fp32", "cheapest", title=escape(f"{document['name']}: units")
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
        f"plans: {count_text(document['log10_num_plans'])}; fp32 {bytes_text(document['fp32_bytes'])}, "
        f"cheapest {bytes_text(document['cheapest_bytes'])} at row alignment {document['row_alignment']}, "
        f"row ranges by {document['row_range']}"
    )
    for window in document["windows"]:
        stdout.print(
            f"{window['name']} window {window['window']}: {window['num_rows']:,} rows, {window['num_batches']} batches"
        )
    for power in document["power"]:
        stdout.print(
            f"budget {power['budget_pct']:g} %: the confirm window can certify a KL gap of up to about "
            f"{power['kl_pct']:.4f} % (for independent examples and a calibrated reference)"
        )
    for note in document["notes"]:
        stdout.print(escape(note))


def render_train(document: Mapping[str, Any]) -> None:
    """The quality of a trained model."""
    table = Table("window", "examples", "NE", "AUC", "calibration")
    for name in ("train", "validation"):
        q = document[name]
        table.add_row(
            name,
            f"{q['num_examples']:,}",
            number(q["ne"], "{:.4f}"),
            number(q["auc"], "{:.4f}"),
            number(q["calibration"], "{:.4f}"),
        )
    stdout.print(table)
    num_read = document["num_rows"] + document["num_unlabelled"] + document["num_bad"]
    render_rows("train", {**document, "num_read": num_read, "never_looked_up": []})
    stdout.print(
        f"{document['epochs']:.3g} epochs in {document['seconds']:.1f} s, best after {document['best_epoch']:.3g}"
    )
    stdout.print(
        f"checkpoint written to {escape(document['checkpoint'])} (sha256 {document['checkpoint_sha256'][:12]})"
    )


def render_doctor(document: Mapping[str, Any]) -> None:
    """A line for each finding."""
    colors = {"ok": "green", "absent": "yellow", "broken": "red"}
    for finding in document["findings"]:
        state = f"[{colors[finding['state']]}]{finding['state']:<6}[/]"
        stdout.print(f"{state}  {finding['name']:<9}  {escape(finding['summary'])}")


def _layer_times(layers: Sequence[Mapping[str, Any]]) -> Table:
    shapes = list(dict.fromkeys((p["num_out"], p["num_in"]) for p in layers))
    times = {(p["precision"], p["num_out"], p["num_in"]): p["ns_per_row"] for p in layers}
    title = f"ns per row of a layer (outputs x inputs), batches of {layers[0]['batch_size']:,}"
    table = Table("precision", title=title, title_justify="left")
    for num_out, num_in in shapes:
        table.add_column(f"{num_out} x {num_in}", justify="right", no_wrap=True)
    for precision in dict.fromkeys(p["precision"] for p in layers):
        table.add_row(precision, *(f"{times[precision, *shape]:,.1f}" for shape in shapes))
    return table


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
    layers = document.get("layers", [])
    if layers:
        stdout.print(_layer_times(layers))
    points = [*points, *layers]
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
