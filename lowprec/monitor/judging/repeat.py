"""Runs the monitor at an interval, without a scheduler."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from lowprec.core.errors import LowprecError

__all__ = ["repeat"]


def repeat(once: Callable[[], int], every_s: float, *, on_error: Callable[[LowprecError], int]) -> None:
    """Call `once` at every multiple of `every_s` since 1970 until the process is asked to end (SIGTERM, SIGINT).

    The run at hand is finished first, unless asked twice; one that takes longer is followed by the next multiple. An
    error ends one run, and not the loop.
    """
    stop = threading.Event()
    before: dict[int, Any] = {}

    def ask(number: int, _: object) -> None:
        """End after this run; asked again, at once."""
        stop.set()
        signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, ask)
    try:
        while not stop.is_set():
            try:
                once()
            except LowprecError as error:
                on_error(error)
            stop.wait(every_s - time.time() % every_s)
    finally:
        for asked, handler in before.items():
            signal.signal(asked, handler)
