"""Benchmarks run, at a size at which their figures mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of them keep the traffic and the model that they make."""
    return tmp_path_factory.mktemp("benchmarks")


LONGER = ("certified", "kernels", "layers", "search")


@pytest.mark.parametrize(
    "name",
    [
        *("bf16", "bounds", "cost", "debugger", "exact", "proxy", "stacked"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in LONGER),
    ],
)
def test_a_benchmark_runs_and_ends_with_one_json_object(name: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py"],
        cwd=folder,
        env={**os.environ, "SMOKE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout.splitlines()[-1]), dict)
