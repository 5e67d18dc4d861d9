"""`lowprec ARGS` in a process of its own that begins with everything imported: most commands take less than imports do.

Python's fork server imports once and forks for each command. Besides that a command finds what it finds when a user
types it: arguments, environment, current folder, two streams, an exit code.
"""

import json
import multiprocessing
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_IMPORTED = (
    "lowprec.latency.calibration",
    "lowprec.cli.demo",
    "lowprec.evaluation.workers.ray",
    "lowprec.export",
    "lowprec.monitor.monitor_run",
    "lowprec.cli.render",
    "lowprec.search.search_run",
    "lowprec.gate.verify",
)


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout."""
        return json.loads(self.out)


def run_command(arguments: Sequence[str], cwd: Path | None, environment: Mapping[str, str]) -> Done:
    """Run a command to its end."""
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder, "out"), Path(folder, "err")
        process = fork_server().Process(
            target=_command, args=(arguments, cwd or Path.cwd(), dict(environment), streams)
        )
        process.start()
        process.join()
        assert process.exitcode is not None
        return Done(process.exitcode, *(stream.read_text() for stream in streams))


@cache
def fork_server() -> Any:
    """The context whose processes begin with everything imported; what they run must be a module of this folder's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    return context


def _command(arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], streams: Sequence[Path]) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)

    from lowprec.cli.main import main

    main(arguments)
