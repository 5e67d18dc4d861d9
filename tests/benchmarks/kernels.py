"""The kernels against FBGEMM's and PyTorch's, in turn, on the same rows and bags. Prints one JSON object at its end.

At its top the worst of dims 32 to 128 on one thread (of poolings 1 and 20, where there are bags):

- `minmax_int8`, `minmax_int4`, `minmax_int2`: rows/s of ours / FBGEMM's `FloatToFusedNBitRowwiseQuantizedSBHalf`.
- `mse_int4`: rows/s of ours / PyTorch's `embedding_bag_4bit_prepack(optimized_qparams=True)`; `mse_int4_error`: the
  mean over rows of the squared error (ours / PyTorch's); `mse_int4_over_least`: its sum over some rows / a proven
  lower bound.
- `score_cold`, `score_hot`: all four precisions scored / one fp32 lookup by FBGEMM over the same bags, on a table of
  1 GiB from its fp32 rows, and on one of 512 KiB from the changes of its rows, which a worker keeps for such tables
  (made before, as FBGEMM's stored rows are; the grid has what that takes). `score_vs_lookups`: five lookups by FBGEMM
  and the dot products / ours.
- `on_the_fly`: pooled lookup from fp32 rows at int8, int4 and int2 / FBGEMM's fp32 lookup, cold.
- `extra_bytes_per_row`: the most that is held beside fp32 rows and results while cold bags are looked up and scored;
  `hot_bytes_per_value`: what the changes of a hot table's rows take.

`all_threads` has the same worst cases on all cores, where FBGEMM and PyTorch get as many. `grid` has every cell, with
GB/s of memory read and written by ours; `copy_gb_per_s` is what a copy reaches. One thread is timed by its CPU clock,
several by the clock on the wall; of all rounds the least time counts: what else runs on a machine only adds to it.
"""

import functools
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sizes import sized

from lowprec import ops
from lowprec.ops import reference
from lowprec.ops.fbgemm import unchecked_lookup
from lowprec.ops.timing import copy_bandwidth, cpu_model, num_cores
from lowprec.plan import Precision, RowRange

DIMS, JUDGED_DIMS, POOLINGS = sized(((16, 32, 64, 128), (32, 64, 128), (1, 20)), ((16, 32), (32,), (1, 4)))
ROWS, MSE_ROWS, ROUNDS = sized((200_000, 10_000, 15), (2_000, 60, 1))
HOT_BYTES, COLD_BYTES = sized((2**19, 2**30), (2**16, 2**20))
OTHER_BYTES = np.ones((2, sized(2**26, 2**10)), np.uint8)  # four times the last cache, there and back
BAGS, IDS = sized((10_000, 200_000), (100, 4_000))  # in a call, and in all calls that are timed together
ROWWISE = (Precision.INT8, Precision.INT4, Precision.INT2)
LOW = (Precision.FP16, *ROWWISE)

Cell = dict[str, Any]
ByDim = dict[int, list[Cell]]


def timed(
    works: dict[str, Callable[[], object]],
    threads: int,
    before: Callable[[Callable[[], object]], object] = lambda work: None,
) -> dict[str, list[float]]:
    """Seconds of each work, one after the other in every round; the first round warms up.

    `before`, not timed, prepares for each alike: else a work finds in the caches what the one before it has left.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for round_number in range(ROUNDS + 1):
        for name, work in works.items():
            before(work)
            began = clock()
            work()
            if round_number:
                seconds[name].append(clock() - began)
    return seconds


def over_calls(
    tables: "Tables", bags: "Bags", threads: int, works: dict[str, Callable[[torch.Tensor], object]]
) -> dict[str, list[float]]:
    """Seconds of every work on the ids of all calls, fresh ones each time.

    A table within the second cache is hot: the work has run just before. Of others neither rows nor page tables are in
    a cache.
    """

    def prepare(work: Callable[[], object]) -> None:
        if tables.is_hot:
            work()
        else:
            empty_caches()
        bags.fresh()

    def run(work: Callable[[torch.Tensor], object]) -> None:
        for ids in bags.calls:
            work(ids)

    return timed({name: functools.partial(run, work) for name, work in works.items()}, threads, prepare)


def empty_caches() -> None:
    """Fills them with other bytes."""
    np.copyto(*OTHER_BYTES)


def ratio(over: list[float], under: list[float]) -> float:
    return round(min(over) / min(under), 3)


def gb_per_s(num_bytes: float, seconds: list[float]) -> float:
    return round(num_bytes / min(seconds) / 1e9, 2)


def quantizers(threads: int) -> dict[str, ByDim]:
    """`minmax_*` by dim: rows/s against FBGEMM, the same bytes."""
    fbgemm = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf
    found: dict[str, ByDim] = {}
    for dim in DIMS:
        rows = torch.randn(ROWS, dim, generator=torch.Generator().manual_seed(dim))
        table = rows.numpy()
        for precision in ROWWISE:
            out = ops.quantize(table, precision, num_threads=threads)
            # FBGEMM's quantizer puts scale and bias last, its serving layout has them first.
            theirs = np.roll(fbgemm(rows, precision.bits).numpy(), 4, axis=1)
            assert np.array_equal(out, theirs), f"{precision} dim {dim}: other bytes than FBGEMM's"
            seconds = timed(
                {
                    "ours": partial(ops.quantize, table, precision, num_threads=threads, out=out),
                    "fbgemm": partial(fbgemm, rows, precision.bits),
                },
                threads,
            )
            cell = {
                "ratio": ratio(seconds["fbgemm"], seconds["ours"]),
                "million_rows_per_s": round(ROWS / min(seconds["ours"]) / 1e6, 2),
                "gb_per_s": gb_per_s(table.nbytes + out.nbytes, seconds["ours"]),
            }
            found.setdefault(f"minmax_{precision}", {})[dim] = [cell]
    return found


def mse(threads: int) -> ByDim:
    """`mse_int4` by dim: rows/s and squared error against PyTorch's optimizer, error against minmax and the optimum."""
    prepack = torch.ops.quantized.embedding_bag_4bit_prepack
    found = {}
    for dim in DIMS:
        rows = torch.randn(MSE_ROWS, dim, generator=torch.Generator().manual_seed(dim))
        table = rows.numpy()

        def errors(values: NDArray[np.float32], table: NDArray[np.float32] = table) -> NDArray[np.float64]:
            return np.square(values.astype(np.float64) - table).sum(axis=1)

        def ours(
            row_range: RowRange, table: NDArray[np.float32] = table, num_threads: int = threads
        ) -> NDArray[np.uint8]:
            return ops.quantize(table, Precision.INT4, row_range=row_range, num_threads=num_threads)

        minmax, least = (errors(ops.dequantize(ours(r), Precision.INT4, dim)) for r in RowRange)
        stored = prepack(rows, optimized_qparams=True)
        theirs = errors(torch.ops.quantized.embedding_bag_4bit_unpack(stored).numpy())
        assert (least <= minmax * (1 + 1e-5)).all(), f"dim {dim}: a row is worse than minmax"
        assert (least / theirs).mean() <= 1, f"dim {dim}: the error is above PyTorch's"
        some = range(0, MSE_ROWS, MSE_ROWS // 6)
        bounds = [reference.least_squared_error(table[i], 4, reached=float(least[i])) for i in some]
        seconds = timed(
            {"ours": partial(ours, RowRange.MSE), "pytorch": partial(prepack, rows, optimized_qparams=True)},
            threads,
        )
        cell = {
            "ratio": ratio(seconds["pytorch"], seconds["ours"]),
            "ns_per_row": round(min(seconds["ours"]) / MSE_ROWS * 1e9, 1),
            "error_over_pytorch": round(float((least / theirs).mean()), 4),
            "rows_above_pytorch": round(float((least > theirs).mean()), 4),
            "error_over_minmax": round(float((least / minmax).mean()), 4),
            "over_least": round(float(sum(least[i] for i in some) / sum(bounds)), 4),
        }
        found[dim] = [cell]
    return found


class Tables:
    """A table of `num_bytes` in fp32, and as FBGEMM serves it at every precision."""

    def __init__(self, num_bytes: int, dim: int) -> None:
        self.dim, self.num_rows = dim, num_bytes // (4 * dim)
        # Allocated by PyTorch for all sides alike: NumPy asks for huge pages, PyTorch does not.
        self.weight = torch.empty(self.num_rows, dim).normal_(generator=torch.Generator().manual_seed(dim))
        self.rows = self.weight.numpy()
        self.served = {Precision.FP32: self.weight.view(torch.uint8).view(-1)}
        for precision in LOW:
            stored = torch.empty(self.num_rows, ops.row_bytes(dim, precision), dtype=torch.uint8)
            ops.quantize(self.rows, precision, num_threads=num_cores(), out=stored.numpy())
            self.served[precision] = stored.view(-1)
        self.is_hot = num_bytes <= HOT_BYTES
        if self.is_hot:
            self.changes = ops.RowChanges(self.rows)

    def scores(
        self, ids: NDArray[np.int64], offsets: NDArray[np.int64], gradients: NDArray[np.float32], threads: int = 1
    ) -> dict[Precision, NDArray[np.float32]]:
        if self.is_hot:
            return self.changes.scores(LOW, ids, offsets, gradients, mode="sum", num_threads=threads)
        return ops.scores(self.rows, LOW, ids, offsets, gradients, mode="sum", num_threads=threads)

    def lookup(self, precision: Precision, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return unchecked_lookup(self.served[precision], precision, self.dim, ids, offsets)


class Bags:
    """Some calls' ids, fresh before every timing, so that a cold table stays cold; gradients for every bag."""

    def __init__(self, num_rows: int, pooling: int, dim: int) -> None:
        self._rng, self._num_rows = np.random.default_rng(pooling), num_rows
        self.pooling = pooling
        self.offsets = torch.arange(0, BAGS * pooling + 1, pooling)
        self.gradients = torch.from_numpy(self._rng.standard_normal((BAGS, dim), dtype=np.float32))
        self.fresh()

    def fresh(self) -> None:
        shape = (IDS // (BAGS * self.pooling), BAGS * self.pooling)
        self.calls = torch.from_numpy(self._rng.integers(0, self._num_rows, shape)).unbind()


def lookups(num_bytes: int, threads: int) -> dict[str, ByDim]:
    """Scores and lookups on the fly, against FBGEMM's lookups; a cell for each pooling."""
    found: dict[str, ByDim] = {"score": {}, "on_the_fly": {}}
    for dim in DIMS:
        tables = Tables(num_bytes, dim)
        for pooling in POOLINGS:
            bags = Bags(tables.num_rows, pooling, dim)
            check(tables, bags)
            for name, cell_of in (("score", score_cell), ("on_the_fly", on_the_fly_cell)):
                cell = {"pooling": pooling, **cell_of(tables, bags, threads)}
                found[name].setdefault(dim, []).append(cell)
                print(f"threads {threads}, {tables.num_rows} rows of dim {dim}, {name}: {cell}", flush=True)
    return found


def check(tables: Tables, bags: Bags) -> None:
    """Lookups equal FBGEMM's bit for bit, scores up to rounding (from changes, to 16 bits of them)."""
    some = bags.calls[0]
    ids, offsets = some.numpy(), bags.offsets.numpy()
    scores = tables.scores(ids, offsets, bags.gradients.numpy())
    exact = tables.lookup(Precision.FP32, some, bags.offsets)
    for precision in LOW:
        served = tables.lookup(precision, some, bags.offsets)
        assert np.array_equal(ops.pooled_as(tables.rows, precision, ids, offsets, mode="sum"), served.numpy()), (
            precision
        )
        products = bags.gradients.double() * (served.double() - exact.double())
        bound = np.full(len(products), 1e-4 * bags.pooling)
        if tables.is_hot:  # half a step of 16 bits for every value
            stored = ops.quantize(tables.rows, precision)
            largest = float(np.abs(ops.dequantize(stored, precision, tables.dim) - tables.rows).max())
            bound += 0.505 * largest / 32767 * bags.pooling * np.abs(bags.gradients.numpy()).sum(axis=1)
        assert (np.abs(scores[precision] - products.sum(1).numpy()) <= bound).all(), precision


def score_cell(tables: Tables, bags: Bags, threads: int) -> Cell:
    gradients, offsets = bags.gradients.numpy(), bags.offsets.numpy()

    def ours(ids: torch.Tensor) -> object:
        return tables.scores(ids.numpy(), offsets, gradients, threads)

    def five_lookups(ids: torch.Tensor) -> object:
        exact = tables.lookup(Precision.FP32, ids, bags.offsets)
        low = [tables.lookup(p, ids, bags.offsets) for p in LOW]
        return [torch.linalg.vecdot(bags.gradients, pooled - exact) for pooled in low]

    def pytorch(ids: torch.Tensor) -> object:
        return torch.nn.functional.embedding_bag(ids, tables.weight, bags.offsets[:-1], mode="sum")

    seconds = over_calls(
        tables,
        bags,
        threads,
        {
            "ours": ours,
            "fp32": lambda ids: tables.lookup(Precision.FP32, ids, bags.offsets),
            "five lookups": five_lookups,
        },
    )
    # By itself: between its calls PyTorch's threads wait busily, on the cores of others.
    seconds |= over_calls(tables, bags, threads, {"pytorch": pytorch})
    read = 4 * tables.dim * (IDS * (2 if tables.is_hot else 1) + IDS // bags.pooling)
    made = {}
    if tables.is_hot:
        by_rows = timed(
            {
                "direct": lambda: ops.scores(
                    tables.rows, LOW, bags.calls[0].numpy(), offsets, gradients, mode="sum", num_threads=threads
                ),
                "changes": lambda: ops.RowChanges(tables.rows, num_threads=threads),
            },
            threads,
        )
        made = {
            "from_rows_ns_per_id": round(min(by_rows["direct"]) / len(bags.calls[0]) * 1e9, 2),
            "changes_ns_per_row": round(min(by_rows["changes"]) / tables.num_rows * 1e9),
        }
    return {
        **made,
        "over_fp32_lookup": ratio(seconds["ours"], seconds["fp32"]),
        "lookups_over_ours": ratio(seconds["five lookups"], seconds["ours"]),
        "ns_per_id": round(min(seconds["ours"]) / IDS * 1e9, 2),
        "fbgemm_fp32_ns_per_id": round(min(seconds["fp32"]) / IDS * 1e9, 2),
        "pytorch_fp32_ns_per_id": round(min(seconds["pytorch"]) / IDS * 1e9, 2),
        "gb_per_s": gb_per_s(read, seconds["ours"]),
    }


def on_the_fly_cell(tables: Tables, bags: Bags, threads: int) -> Cell:
    """All three precisions; the worst stands for the cell."""
    offsets = bags.offsets.numpy()

    def ours(ids: torch.Tensor, precision: Precision) -> object:
        return ops.pooled_as(tables.rows, precision, ids.numpy(), offsets, mode="sum", num_threads=threads)

    works: dict[str, Callable[[torch.Tensor], object]] = {p: functools.partial(ours, precision=p) for p in ROWWISE}
    works["fp32"] = lambda ids: tables.lookup(Precision.FP32, ids, bags.offsets)
    seconds = over_calls(tables, bags, threads, works)
    ratios = {str(p): ratio(seconds[p], seconds["fp32"]) for p in ROWWISE}
    moved = 4 * tables.dim * (IDS + IDS // bags.pooling)
    return {
        "over_fp32_lookup": max(ratios.values()),
        **ratios,
        "gb_per_s": {str(p): gb_per_s(moved, seconds[p]) for p in ROWWISE},
    }


def extra_bytes_per_row() -> float:
    """How far the process grows, at its peak, over lookups and scores of a cold table, without their results."""
    dim = 64
    weight = torch.ones(COLD_BYTES // (4 * dim), dim)
    bags = Bags(len(weight), 20, dim)
    ids, offsets = bags.calls[0].numpy(), bags.offsets.numpy()
    results = 4 * BAGS * (dim + len(LOW))

    def memory(which: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(f"{which}:")).split()[1]) * 1024

    def once() -> object:
        pooled = ops.pooled_as(weight.numpy(), Precision.INT4, ids, offsets, mode="sum")
        return pooled, ops.scores(weight.numpy(), LOW, ids, offsets, bags.gradients.numpy(), mode="sum")

    once()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    kept = once()
    grown = max(0, memory("VmHWM") - before - results)
    assert kept
    return round(grown / len(weight), 3)


def worst(grid: dict[str, Any]) -> Cell:
    """The worst cells of the judged dims."""

    def of(cells: ByDim, key: str, pick: Callable[..., float]) -> float:
        return float(pick(cell[key] for dim in JUDGED_DIMS for cell in cells[dim]))

    return {
        **{name: of(grid[name], "ratio", min) for name in ("minmax_int8", "minmax_int4", "minmax_int2", "mse_int4")},
        "mse_int4_error": of(grid["mse_int4"], "error_over_pytorch", max),
        "mse_int4_over_least": of(grid["mse_int4"], "over_least", max),
        "score_cold": of(grid["cold"]["score"], "over_fp32_lookup", max),
        "score_hot": of(grid["hot"]["score"], "over_fp32_lookup", max),
        "score_vs_lookups": min(of(grid[kind]["score"], "lookups_over_ours", min) for kind in ("cold", "hot")),
        "on_the_fly": of(grid["cold"]["on_the_fly"], "over_fp32_lookup", max),
    }


def measured(threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    grid: dict[str, Any] = {**quantizers(threads), "mse_int4": mse(threads)}
    print({name: {dim: cell["ratio"] for dim, (cell,) in cells.items()} for name, cells in grid.items()}, flush=True)
    return {**grid, "cold": lookups(COLD_BYTES, threads), "hot": lookups(HOT_BYTES, threads)}


def main() -> None:
    import fbgemm_gpu  # noqa: F401  (registers the operators)

    copies = {str(n): round(copy_bandwidth(num_threads=n) / 1e9, 1) for n in sorted({1, num_cores()})}
    grids = {threads: measured(threads) for threads in sorted({1, num_cores()})}
    print(
        json.dumps(
            {
                **worst(grids[1]),
                "extra_bytes_per_row": extra_bytes_per_row(),
                "hot_bytes_per_value": round(ops.RowChanges.bytes_for(HOT_BYTES // 256, 64) / (HOT_BYTES // 4), 2),
                "all_threads": {"num_threads": num_cores(), **worst(grids[num_cores()])},
                "copy_gb_per_s": copies,
                "cpu": cpu_model(),
                "cpu_path": ops.cpu_path(),
                "rounds": ROUNDS,
                "grid": {f"threads {threads}": grid for threads, grid in grids.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
