"""Traffic: logged examples, read as a stream of batches by time window.

Importing the package, or its schema, does not import Arrow: a command line that only wants help should not wait for it.
Everything else is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowprec.traffic.schema import BoundsCheck, MissingDense, Schema, SparseFeature, TimeUnit

if TYPE_CHECKING:
    from lowprec.traffic.batch import BadRow, Bags, Batch
    from lowprec.traffic.criteo import convert_criteo, read_criteo
    from lowprec.traffic.decode import hash_text
    from lowprec.traffic.quarantine import check_bad_rows, read_quarantine, write_quarantine
    from lowprec.traffic.reader import TrafficReader, TrafficWindow, open_traffic
    from lowprec.traffic.synthetic.generate import generate, synthetic_tables
    from lowprec.traffic.synthetic.spec import LabelShift, NewIds, PopularityShift, SyntheticSpec
    from lowprec.traffic.synthetic.truth import Truth
    from lowprec.traffic.window import Window, format_time, format_window, parse_window

__all__ = [
    "BadRow",
    "Bags",
    "Batch",
    "BoundsCheck",
    "LabelShift",
    "MissingDense",
    "NewIds",
    "PopularityShift",
    "Schema",
    "SparseFeature",
    "SyntheticSpec",
    "TimeUnit",
    "TrafficReader",
    "TrafficWindow",
    "Truth",
    "Window",
    "check_bad_rows",
    "convert_criteo",
    "format_time",
    "format_window",
    "generate",
    "hash_text",
    "open_traffic",
    "parse_window",
    "read_criteo",
    "read_quarantine",
    "synthetic_tables",
    "write_quarantine",
]

_HOMES = {
    "batch": ("BadRow", "Bags", "Batch"),
    "criteo": ("convert_criteo", "read_criteo"),
    "decode": ("hash_text",),
    "quarantine": ("check_bad_rows", "read_quarantine", "write_quarantine"),
    "reader": ("TrafficReader", "TrafficWindow", "open_traffic"),
    "synthetic.generate": ("generate", "synthetic_tables"),
    "synthetic.spec": ("LabelShift", "NewIds", "PopularityShift", "SyntheticSpec"),
    "synthetic.truth": ("Truth",),
    "window": ("Window", "format_time", "format_window", "parse_window"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
