"""A run of the monitor in a process of its own, which begins with everything imported and may be killed."""

from collections.abc import Sequence
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from command_process import fork_server


def start_monitor(config: Path, plan: Path, overrides: Sequence[str]) -> Any:
    """The process, when the monitor is about to begin: on January 11."""
    told, tell = fork_server().Pipe(duplex=False)
    process = fork_server().Process(target=_monitor, args=(tell, config, plan, tuple(overrides)))
    process.start()
    assert told.recv() == "ready"
    return process


def _monitor(tell: Connection, config: Path, plan: Path, overrides: tuple[str, ...]) -> None:
    from lowprec.config import load_config
    from lowprec.monitor import run_monitor

    tell.send("ready")
    run_monitor(load_config(config, overrides), plan, now=datetime(2026, 1, 11, tzinfo=UTC))
