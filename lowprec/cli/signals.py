"""Exit of a command: its exit code, interrupts and termination."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

import click

from lowprec.core import exit_codes

__all__ = ["run_and_exit"]

# Seconds after which a lost interrupt is raised again.
INTERRUPT_AGAIN_S = 1.0


def run_and_exit(run: Callable[[], object]) -> NoReturn:
    """Run a command and end the process with its exit code; SIGINT and SIGTERM interrupt it."""
    received: list[int] = []
    report_unraisable = sys.unraisablehook

    def end(number: int, _: object) -> None:
        """Interrupt the command; SIGTERM has an exit code of its own."""
        received.append(number)
        signal.setitimer(signal.ITIMER_REAL, INTERRUPT_AGAIN_S, INTERRUPT_AGAIN_S)
        raise KeyboardInterrupt

    def interrupt_again(*_: object) -> None:
        """Interrupt again unless the command is already ending: callbacks of libraries lose exceptions."""
        if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
            raise KeyboardInterrupt

    def report_others(unraisable: sys.UnraisableHookArgs) -> None:
        """Report exceptions lost inside a callback, except interrupts, which are raised again."""
        if not (received and isinstance(unraisable.exc_value, KeyboardInterrupt)):
            report_unraisable(unraisable)

    is_main_thread = threading.current_thread() is threading.main_thread()
    if is_main_thread:
        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        signal.signal(signal.SIGALRM, interrupt_again)
        sys.unraisablehook = report_others
    is_interrupted = False
    try:
        code = run()
    except click.ClickException as error:
        error.show()
        code = exit_codes.USAGE
    except (KeyboardInterrupt, click.Abort):
        is_interrupted = True
        is_term = signal.SIGTERM in received
        click.echo("terminated" if is_term else "interrupted", err=True)
        code = exit_codes.TERMINATED if is_term else exit_codes.INTERRUPTED
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
    finally:
        # Also where a command took being interrupted for its end, as one that only looks at a job does.
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = report_unraisable
    number = code if isinstance(code, int) else 0
    if is_main_thread and is_interrupted and "ray" in sys.modules:
        _leave(number)
    sys.exit(number)


def _leave(code: int) -> NoReturn:
    """End this process without taking Python down: threads of a Ray that was interrupted may crash it then."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(code))  # second signal: exit at once
    atexit._run_exitfuncs()  # Ray's own is among them, which stops what it has started
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
