"""Commands as a user types them."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_process import Done, run_command


@pytest.fixture(scope="session")
def lowprec() -> Callable[..., Done]:
    """Run `lowprec ARGS` in a process of its own."""

    def run(*args: Any, cwd: Path | None = None, **environment: str) -> Done:
        return run_command([str(arg) for arg in args], cwd, {**os.environ, **environment})

    return run


@pytest.fixture
def config_file(small_config: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """The small config written out, with changes by dotted key."""

    def write(**changes: Any) -> Path:
        document = json.loads(small_config().to_json())
        for key, value in changes.items():
            *parents, last = key.split("__")
            section = document
            for parent in parents:
                section = section[parent]
            section[last] = value
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    return write


@pytest.fixture
def one_sentence() -> Callable[[Done, int, Sequence[str]], None]:
    """Check what a command says of bad input: exit code, one clear sentence with all of `said`, no traceback."""

    def check(done: Done, code: int, said: Sequence[str]) -> None:
        assert done.code == code, done.err
        errors = [line for line in done.err.splitlines() if line.startswith(("error:", "Error:"))]
        assert len(errors) == 1, done.err
        for part in said:
            assert part in errors[0]
        assert "Traceback" not in done.err and "Traceback" not in done.out

    return check
