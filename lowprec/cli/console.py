"""The terminal: progress bars, one JSON document on stdout, one-sentence errors and exit codes."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lowprec.core.errors import LowprecError, is_panic

__all__ = [
    "Bars",
    "document_stream",
    "json_document",
    "own_stdout",
    "print_document",
    "report_error",
    "stderr",
    "stdout",
]

SCHEMA_VERSION = 1

# Away from a terminal, what a bar would show is said so often.
LINE_EVERY_S = 30.0

# Away from a terminal tables are as wide as they need to be: whoever reads a pipe can scroll.
# Names of units are not to become pictures, as :x: would.
stdout = Console(highlight=False, emoji=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
stderr = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


@contextmanager
def own_stdout() -> Iterator[None]:
    """Keep the real stdout for what this module prints; whatever else is printed meanwhile goes to stderr.

    Models print, and Ray prints: the document of a command must not have that in it.
    """
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as real:
        os.dup2(2, 1)
        stdout.file = _document_stream[0] = real
        try:
            yield
        finally:
            sys.stdout.flush()
            real.flush()
            os.dup2(real.fileno(), 1)
            stdout.file = _document_stream[0] = sys.stdout


# Where documents go: stdout, or what `own_stdout` keeps of it.
_document_stream: list[TextIO] = [sys.stdout]


class Bars:
    """Progress bars on a terminal, elsewhere (in a job's log) a line now and then; everything on stderr."""

    def __init__(self) -> None:
        """Nothing is drawn before `shown`."""
        self._stage, self._done, self._total, self._said_at = "", 0, 0, time.monotonic()
        columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=stderr, disable=not stderr.is_terminal)
        self._task: TaskID | None = None

    @contextmanager
    def shown(self) -> Iterator[Bars]:
        """Draw while the context lasts."""
        with self._bars:
            yield self

    def stage(self, name: str, total: int) -> None:
        """Begin a bar."""
        self._stage, self._done, self._total = name, 0, total
        self._task = self._bars.add_task(name, total=total)

    def advance(self, steps: int = 1) -> None:
        """Move the bar."""
        self._done += steps
        if self._task is not None:
            self._bars.advance(self._task, steps)
        if not stderr.is_terminal and time.monotonic() - self._said_at > LINE_EVERY_S:
            self._said_at = time.monotonic()
            self.note(f"{self._stage}: {self._done:,} of {self._total:,}")

    def note(self, text: str) -> None:
        """Print a line."""
        stderr.print(escape(text), style="dim")


def document_stream() -> TextIO:
    """Where the output of a command goes."""
    return _document_stream[0]


def json_document(command: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """The document that `--json` prints: `content` with its schema version and command."""
    return {"schema_version": SCHEMA_VERSION, "command": command, **content}


def print_document(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout."""
    _document_stream[0].write(json.dumps(document, indent=2, default=str) + "\n")


def report_error(error: BaseException, *, command: str, as_json: bool, debug: bool) -> int:
    """Say what went wrong, in a sentence on stderr and as a document where JSON was asked for; returns the code."""
    if debug:
        traceback.print_exception(error)
    expected = isinstance(error, LowprecError)
    code = error.exit_code if isinstance(error, LowprecError) else LowprecError.exit_code
    message = str(error) if expected else f"unexpected {type(error).__name__}: {error}"
    if is_panic(error):
        message = f"a library panicked: {error} (a defect of it, or an unusual path or file; --debug shows where)"
    elif not expected and not debug:
        message += " (a defect of lowprec, or of the model's own code; --debug shows where)"
    stderr.print(f"[red]error:[/red] {escape(' '.join(message.split()))}")
    if as_json:
        problem = {"type": type(error).__name__, "message": message, "exit_code": code}
        print_document(json_document(command, {"error": problem}))
    return code
