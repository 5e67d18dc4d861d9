"""Public click logs beside the project: their licences keep them out of it."""

import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "shared" / "data"


def real_log(name: str) -> Path:
    """The file; a test that needs it fails in CI where it is missing, and is skipped elsewhere."""
    path = FOLDER / name
    if not path.exists():
        message = f"{path} is not there; its licence keeps it out of the project"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    return path
