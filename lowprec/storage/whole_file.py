"""Atomic writes of files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["whole_file"]


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path beside the target to write to: it becomes the target when the block ends well, else it is removed.

    What was written is on the disk before it becomes the target. A process that is killed meanwhile leaves
    `NAME.PROCESS.partial` behind, which no reader takes for the target. Folders on the way are made. Raises `OSError`,
    also where the target is there and is a folder or a device.
    """
    if target.exists() and not target.is_file():
        raise OSError(f"{target} is there already and is not a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
