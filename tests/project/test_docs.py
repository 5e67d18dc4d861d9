"""Pages with numbers are what their scripts compute."""

import importlib
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_about_scale_is_what_the_planner_says(tmp_path):
    command = [sys.executable, str(DOCS / "scale.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_page_about_scale_counts_the_profile_of_a_search(monkeypatch):
    """With plans that cost nothing, a search is what profiling its window takes."""
    monkeypatch.syspath_prepend(DOCS)
    scale = importlib.import_module("scale")
    seconds = {"profile_lookup_s": 19.2e13, "profile_network_s": 1e13, "exact_lookup_s": 0.0, "exact_network_s": 0.0}
    placed = {
        "time": {"num_examples": 1, **seconds},
        "workers": [{"memory": 0}],
        "network": {"profile_bytes_per_example": 0, "exact_bytes_per_example": 0},
        "limits": [{"says": "nothing"}],
    }
    rates = {"dense_flops": float("inf"), "decoded_values_per_s": float("inf")}
    *_, day, search, confirmed, _ = scale._row(1, placed, rates, flops=1.0)
    assert confirmed == "0 min"
    assert search == scale._duration((19.2e3 / (32 * scale.THREAD_EFFICIENCY) + 1e3) * scale.SEARCH_EXAMPLES) != day
