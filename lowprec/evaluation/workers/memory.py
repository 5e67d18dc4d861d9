"""How much memory this process uses, what it may use, and whether the kernel has killed for it. Linux only."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

__all__ = ["MemoryUse", "give_back_freed", "give_back_now", "keep_freed", "memory_use"]

_CGROUPS = Path("/sys/fs/cgroup")
_PROCESS = Path("/proc/self")
# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# A limit of cgroup v1 that is none: the largest whole number of pages, about 8 EiB.
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class MemoryUse:
    """Memory of a process in bytes, without pages of files, which the kernel takes back when it wants.

    limit_bytes: of its container, None where it has none. num_oom_kills: processes of the container that the kernel
    killed when its memory ran out, since the container exists.
    """

    used_bytes: int
    limit_bytes: int | None
    num_oom_kills: int


def memory_use() -> MemoryUse:
    """That of this process now; what the system does not tell is 0 or None."""
    fields = dict(line.split(":", 1) for line in _text(_PROCESS / "status").splitlines() if ":" in line)
    used = sum(int(fields.get(name, "0").split()[0]) for name in ("RssAnon", "RssShmem")) * 1024
    limits, kills = [], 0
    for folder in _containers(_text(_PROCESS / "cgroup")):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _text(folder / name).strip()
            if text.isdigit() and int(text) < _NO_LIMIT:
                limits.append(int(text))
        for name in ("memory.events", "memory.oom_control"):
            events = dict(line.split() for line in _text(folder / name).splitlines() if len(line.split()) == 2)
            kills = max(kills, int(events.get("oom_kill", 0)))
    return MemoryUse(used, min(limits, default=None), kills)


def give_back_freed() -> None:
    """Let this process return large blocks to the system when it frees them, for where memory is counted.

    Otherwise glibc and Arrow keep them: a tenth of what a worker needs beside its tables (`make bench NAME=memory`).
    Where the C library is another one, it does as it does.
    """
    pa.set_memory_pool(pa.system_memory_pool())
    _mallopt({_M_ARENA_MAX: 2, _M_MMAP_THRESHOLD: 1 << 20, _M_TRIM_THRESHOLD: 1 << 20})


def keep_freed() -> None:
    """Let this process keep what it frees for the next batch, up to 256 MB, for where memory is not counted.

    Otherwise glibc returns blocks of some megabytes and asks for them again, page by page, for every batch.
    Where the C library is another one, it does as it does.
    """
    _mallopt({_M_MMAP_THRESHOLD: 64 << 20, _M_TRIM_THRESHOLD: 256 << 20})


def give_back_now() -> None:
    """Return all that was freed so far to the system, for a process that goes on: a millisecond, not for every batch.

    Blocks of a batch lie between those that stay, so that glibc keeps them, and ever more as work goes on
    (`make bench NAME=cost`). Where the C library is another one, it does as it does.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def _mallopt(options: Mapping[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for option, value in options.items():
        if mallopt is not None:
            mallopt(option, value)


def _containers(cgroups: str) -> list[Path]:
    """The folders of this process's memory controller: its own, and the root that a container sees in its place."""
    found = []
    for line in cgroups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            found += [_CGROUPS / path.lstrip("/"), _CGROUPS]
        elif "memory" in controllers.split(","):
            found += [_CGROUPS / "memory" / path.lstrip("/"), _CGROUPS / "memory"]
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
