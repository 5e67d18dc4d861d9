"""Public click logs beside the project: their licences keep them out of it."""

import os
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
FOLDER = PROJECT.parent / "shared" / "data"


def real_log(name: str) -> Path:
    """The file; a test that needs it fails in CI where it is missing, and is skipped elsewhere."""
    path = FOLDER / name
    if not path.exists():
        message = f"{path} is not there; its licence keeps it out of the project"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    return path


def arguments_of(config: str, log: Path, folder: Path) -> list[str | Path]:
    """A config of the project by its name, with that log, and a folder for everything that is written.

    In one process: Ray takes longer to begin than these logs take to read.
    """
    settings = {
        "traffic.path": log,
        "model.checkpoint": folder / "m.safetensors",
        "results.root": folder / "runs",
        "evaluation.num_workers": 0,
    }
    changes = [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]
    return [PROJECT / "configs" / f"{config}.yaml", *changes]
