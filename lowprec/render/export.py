"""What was exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from lowprec.console import stdout
from lowprec.sizes import bytes_text

__all__ = ["render_export"]


def render_export(document: Mapping[str, Any]) -> None:
    """Sizes, files, what it was compared with, how to load it."""
    fp32, low, parity = document["fp32_bytes"], document["bytes"], document["parity"]
    print_line = stdout.print
    print_line(
        f"{escape(document['folder'])}: {document['num_tables']} tables and {document['num_low_layers']} layers below "
        f"fp32, {bytes_text(low)} of {bytes_text(fp32)} ({low / fp32:.3f}), in {document['seconds']} s"
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
