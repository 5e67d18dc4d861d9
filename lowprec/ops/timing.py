"""Measures lookups of the serving kernels (FBGEMM, on the CPU) and memory bandwidth."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lowprec.core.errors import ConfigError
from lowprec.core.progress import Progress, Silent
from lowprec.plan import TABLE_PRECISIONS, Precision
from lowprec.plan.row_layout import row_bytes

if TYPE_CHECKING:
    import torch

__all__ = [
    "Cell",
    "Grid",
    "LookupTime",
    "copy_bandwidth",
    "cpu_model",
    "default_grid",
    "fbgemm_version",
    "machine_facts",
    "measure_lookups",
    "num_cores",
    "spoil_cache",
    "torch_threads",
]

# Read as fp32, as fp16, or as scale, bias and codes, this byte repeated is a normal number: no NaN, no denormal, whose
# arithmetic takes other times.
_FILL_BYTE = 0x2E

# The second-level cache, where the system does not tell.
_CACHE_BYTES = 1 << 20
# In a row, after one that is not timed: it finds what the cell before left in the caches.
_NUM_CALLS = 3


class Cell(NamedTuple):
    """A table and a load: `pooling` ids in every bag of a table of `rows` rows of `dim` values."""

    precision: Precision
    dim: int
    rows: int
    pooling: int

    @property
    def table_bytes(self) -> int:
        """Bytes of the stored table."""
        return self.rows * row_bytes(self.dim, self.precision)


class LookupTime(NamedTuple):
    """The median of the repetitions, and their interquartile range divided by it."""

    cell: Cell
    ns_per_bag: float
    spread: float


@dataclass(frozen=True)
class Grid:
    """What to measure: every precision x dim x rows x pooling whose table fits into `memory_limit_bytes`.

    A call looks up `num_bags` bags; every cell is timed `num_repeats` times. Raises `ConfigError` where not even the
    fewest rows fit.
    """

    dims: Sequence[int]
    rows: Sequence[int]
    poolings: Sequence[int]
    num_repeats: int
    memory_limit_bytes: int
    precisions: Sequence[Precision] = TABLE_PRECISIONS
    num_bags: int = 2048

    def __post_init__(self) -> None:
        for cell in self.left_out():
            if cell.rows == min(self.rows):
                raise ConfigError(
                    f"calibrate: {cell.rows:,} rows of {cell.precision} at dim {cell.dim} take {cell.table_bytes:,} "
                    f"bytes, more than the memory limit of {self.memory_limit_bytes:,}; raise --memory-mb or leave "
                    "out that --dim"
                )

    def cells(self) -> tuple[Cell, ...]:
        """The cells that are measured."""
        return tuple(cell for cell in self._all() if cell.table_bytes <= self.memory_limit_bytes)

    def left_out(self) -> tuple[Cell, ...]:
        """The cells whose table is larger than the memory limit."""
        return tuple(cell for cell in self._all() if cell.table_bytes > self.memory_limit_bytes)

    def _all(self) -> Iterator[Cell]:
        for precision in self.precisions:
            for dim in self.dims:
                for rows in self.rows:
                    yield from (Cell(precision, dim, rows, pooling) for pooling in self.poolings)


def default_grid(
    *, quick: bool = False, dims: Sequence[int] = (), num_bags: int = 2048, memory_limit_bytes: int = 2**31
) -> Grid:
    """The grid of `lowprec calibrate`: at most a minute on one thread, or seconds when `quick`; `dims` replace its own.

    Raises `ConfigError` where not even the smallest table fits into the limit.
    """
    own = (16, 64) if quick else (8, 16, 32, 64, 128)
    return Grid(
        dims=tuple(sorted(set(dims or own))),
        rows=(1_000, 100_000) if quick else (1_000, 100_000, 1_000_000, 10_000_000),
        poolings=(1, 64) if quick else (1, 4, 16, 64),
        num_repeats=5 if quick else 25,
        memory_limit_bytes=memory_limit_bytes,
        num_bags=num_bags,
    )


def measure_lookups(
    grid: Grid, *, seed: int = 0, num_threads: int = 1, progress: Progress | None = None
) -> list[LookupTime]:
    """The time of every cell of a grid, in its order.

    Timed are the modules that serve, `nn.EmbeddingBag` at fp32 and `ServedBag` below, with sum pooling, call by call as
    in a model: before each, as much memory is written as the second-level cache holds, as the rest of a model does
    (`make bench NAME=serving`). Ids are uniform, and fresh in every call. Repetitions go through all cells in an
    order of their own, so that a machine that is slow for a while is slow for all of them alike. Times do not depend on
    the values of a table, so that all tables are views of one buffer, as large as the largest.

    PyTorch's number of threads is `num_threads` meanwhile. Raises `ConfigError` when the buffer cannot be had,
    `KernelError` without FBGEMM.
    """
    progress = progress or Silent()
    cells = grid.cells()
    rng = np.random.default_rng(seed)
    seconds: list[list[float]] = [[] for _ in cells]
    with torch_threads(num_threads):
        progress.stage("calibrate", grid.num_repeats * len(cells))
        buffer = _filled(max(cell.table_bytes for cell in cells))
        tables = [_table(buffer, cell) for cell in cells]
        for _ in range(grid.num_repeats):
            for index in rng.permutation(len(cells)):
                seconds[index].append(_seconds_per_call(tables[index], cells[index], grid.num_bags, rng))
                progress.advance()
    return [_summary(cell, seconds[index], grid.num_bags) for index, cell in enumerate(cells)]


def machine_facts(grid: Grid, *, seed: int, num_threads: int) -> dict[str, str | int]:
    """What times depend on: the CPU, the libraries, how it was measured and when."""
    import torch

    return {
        "cpu": cpu_model(),
        "num_cores": num_cores(),
        "num_threads": num_threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fbgemm": fbgemm_version(),
        "num_bags": grid.num_bags,
        "num_repeats": grid.num_repeats,
        "seed": seed,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    """The name that the CPU gives itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def fbgemm_version() -> str:
    """The installed package and its version."""
    for name in ("fbgemm-gpu-cpu", "fbgemm-gpu"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def copy_bandwidth(*, num_threads: int = 1, num_bytes: int = 2**28, num_repeats: int = 5) -> float:
    """Bytes a second, read and written each counted, that copies of `num_bytes` move: the best of the repetitions.

    By PyTorch, which copies on `num_threads` threads. Takes twice `num_bytes` of memory.
    """
    import torch

    source = torch.full((num_bytes,), _FILL_BYTE, dtype=torch.uint8)
    copied = torch.zeros_like(source)
    seconds = []
    with torch_threads(num_threads):
        for _ in range(num_repeats):
            began = time.perf_counter()
            copied.copy_(source)
            seconds.append(time.perf_counter() - began)
    return 2 * num_bytes / min(seconds)


def spoil_cache() -> None:
    """Write as much as the second-level cache holds, as the rest of a model does between two of its units."""
    _spoil().add_(1)


@cache
def _spoil() -> torch.Tensor:
    import torch

    try:
        num_bytes = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (ValueError, OSError):
        num_bytes = 0
    return torch.zeros((num_bytes if num_bytes > 0 else _CACHE_BYTES) // 4)


def _table(buffer: torch.Tensor, cell: Cell) -> Any:
    """The module that serves a table of the cell."""
    import torch

    from lowprec.ops.served_bag import ServedBag

    stored = buffer[: cell.table_bytes].view(cell.rows, -1)
    if cell.precision is Precision.FP32:
        rows = stored.view(torch.float32)
        return torch.nn.EmbeddingBag.from_pretrained(rows, mode="sum", include_last_offset=True)
    return ServedBag(stored, cell.precision, cell.dim, mode="sum", include_last_offset=True)


def _seconds_per_call(table: Any, cell: Cell, num_bags: int, rng: np.random.Generator) -> float:
    import torch

    offsets = torch.arange(0, num_bags * cell.pooling + 1, cell.pooling)
    seconds = []
    with torch.inference_mode():
        for _ in range(1 + _NUM_CALLS):
            ids = torch.from_numpy(rng.integers(0, cell.rows, num_bags * cell.pooling))
            spoil_cache()
            began = time.perf_counter()
            table(ids, offsets)
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _summary(cell: Cell, seconds: Sequence[float], num_bags: int) -> LookupTime:
    median = statistics.median(seconds)
    lower, upper = np.quantile(seconds, (0.25, 0.75))
    return LookupTime(cell, 1e9 * median / num_bags, float(upper - lower) / median)


def _filled(num_bytes: int) -> torch.Tensor:
    # By PyTorch, as the tables of a server are: NumPy asks for huge pages, PyTorch does not.
    import torch

    try:
        return torch.full((num_bytes,), _FILL_BYTE, dtype=torch.uint8)
    except RuntimeError:  # PyTorch has no error of its own for memory of the CPU
        raise ConfigError(
            f"calibrate: the largest table takes {num_bytes:,} bytes, which this machine does not have free; "
            "lower --memory-mb"
        ) from None


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """PyTorch works on so many threads while the context lasts."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
