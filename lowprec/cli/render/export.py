"""Prints the result of an export and the measured serving throughput."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from lowprec.cli.console import stdout
from lowprec.core.sizes import bytes_text, counted

__all__ = ["render_export", "render_serving"]


def render_export(document: Mapping[str, Any]) -> None:
    """Sizes, files, what it was compared with, how to load it."""
    fp32, low, parity = document["fp32_bytes"], document["bytes"], document["parity"]
    print_line = stdout.print
    print_line(
        f"{escape(document['folder'])}: {document['num_low_tables']} of {document['num_tables']} tables and "
        f"{document['num_low_layers']} layers below fp32, {bytes_text(low)} of {bytes_text(fp32)} ({low / fp32:.3f}), "
        f"in {document['seconds']} s"
    )
    print_line(
        f"equal to the bit to what was evaluated: {parity['num_lookups']:,} pooled embeddings and "
        f"{parity['num_examples']:,} logits of {parity['window']}"
    )
    for kind, name in document["programs"].items():
        print_line(f"{kind}: {name}, the same logits")
    for warning in document["warnings"]:
        print_line(f"[yellow]warning[/yellow] {escape(warning)}")
    print_line(f"load it: python -c \"import lowprec; print(lowprec.load('{escape(document['folder'])}'))\"")


def render_serving(document: Mapping[str, Any]) -> None:
    """Speeds by size of requests, what is saved, and what was predicted."""
    threads = counted(document["num_threads"], "thread")
    table = Table(
        title=f"{escape(document['folder'])}: on requests of {document['window']}, {threads}", title_justify="left"
    )
    for name in ("examples a request", "model", "p50", "p99", "requests/s", "examples/s", "requests/s/core"):
        table.add_column(name, no_wrap=True, justify="left" if name == "model" else "right")
    for speed in document["speeds"]:
        table.add_row(
            f"{speed['batch_size']:,}",
            speed["model"],
            f"{speed['p50_ms']:.3f} ms",
            f"{speed['p99_ms']:.3f} ms",
            f"{speed['requests_per_s']:,.0f}",
            f"{speed['examples_per_s']:,.0f}",
            f"{speed['requests_per_s'] / document['num_threads']:,.0f}",
        )
    stdout.print(table)
    capacity = document["capacity"]
    stdout.print(
        f"bytes: {bytes_text(capacity['served_bytes'])} of {bytes_text(capacity['fp32_bytes'])}, "
        f"{bytes_text(capacity['bytes_saved'])} saved"
    )
    for of in capacity["requests_per_s_per_core"]:
        stdout.print(
            f"requests of {of['batch_size']:,}: {of['ratio']:.2f} times as many a second per core "
            f"({of['served']:,.0f} and {of['fp32']:,.0f})"
        )
    for warning in document["warnings"]:
        stdout.print(f"[yellow]warning[/yellow] {escape(warning)}")
    units = document["units"]
    for model, measured in units["measured_ns_per_example"].items():
        predicted = units["predicted_ns_per_example"]
        said = f", predicted {predicted[model]:,.0f} ns ({units['latency_error'][model]:+.0%})" if predicted else ""
        stdout.print(
            f"tables and layers, {model}: {measured:,.0f} ns an example in requests of {units['batch_size']:,}{said}"
        )
