"""Atomic writes of folders."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["abandoned", "whole_folder"]


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside the target to write to: it becomes the target when the block ends well, or is removed.

    What was written is on the disk before it becomes the target. A process that is killed meanwhile leaves
    `NAME.PROCESS.partial` behind, which no reader takes for the target. Folders on the way are made. Raises
    `FileExistsError` where the target is there already, unless it is an empty folder, and `OSError`.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} is there already")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        yield partial
        for folder, _, names in os.walk(partial):
            for name in (*names, "."):
                _sync(Path(folder) / name)
        partial.replace(target)
        _sync(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            shutil.rmtree(partial)
        raise


def abandoned(target: Path) -> list[tuple[Path, int]]:
    """Folders beside the target that processes of this machine left behind when they were killed, and their bytes."""
    found = []
    for path in sorted(target.absolute().parent.glob(f"{glob.escape(target.name)}.*.partial")):
        process = path.name.removeprefix(f"{target.name}.").removesuffix(".partial")
        if process.isdigit() and not Path(f"/proc/{process}").exists():
            found.append((path, sum(file.stat().st_size for file in path.rglob("*") if file.is_file())))
    return found


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
