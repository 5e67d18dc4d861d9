"""Lookup times: every cell of a grid, by the modules that serve, on bytes that are numbers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from lowprec import ops
from lowprec.core.errors import ConfigError
from lowprec.ops import timing
from lowprec.ops.served_bag import ServedBag
from lowprec.ops.timing import Cell, Grid, default_grid, machine_facts, measure_lookups
from lowprec.plan import TABLE_PRECISIONS, Precision

EVERY = list(TABLE_PRECISIONS)


def small_grid(**changes) -> Grid:
    fields = {"dims": (16, 64), "rows": (1_000, 20_000), "poolings": (1, 64), "num_repeats": 5} | changes
    return Grid(**{"memory_limit_bytes": 2**24, "num_bags": 256, **fields})


def test_every_cell_has_a_time() -> None:
    grid = small_grid()
    times = measure_lookups(grid)
    assert tuple(time.cell for time in times) == grid.cells()
    assert len(times) == 5 * 2 * 2 * 2
    assert all(time.ns_per_bag > 0 and time.spread >= 0 for time in times)


@pytest.mark.parametrize("precision", EVERY)
@pytest.mark.parametrize("dim", [1, 3, 16, 33, 64])
def test_what_is_timed_is_what_serves(precision: Precision, dim: int) -> None:
    cell = Cell(precision, dim, 50, 3)
    buffer = timing._filled(60 * ops.row_bytes(dim, precision))
    table = timing._table(buffer, cell)
    assert isinstance(table, torch.nn.EmbeddingBag if precision is Precision.FP32 else ServedBag)
    rng = np.random.default_rng(dim)
    ids, offsets = torch.from_numpy(rng.integers(0, 50, 60)), torch.arange(0, 61, 3)
    stored = buffer[: cell.table_bytes].view(50, -1)
    expected = ops.pooled_lookup(stored, precision, dim, ids, offsets, mode="sum")
    torch.testing.assert_close(table(ids, offsets), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("precision", EVERY)
def test_the_buffer_holds_normal_numbers_at_every_precision(precision: Precision) -> None:
    table = timing._filled(10 * ops.row_bytes(16, precision)).numpy().reshape(10, -1)
    values = ops.dequantize(table, precision, 16)
    assert (np.abs(values) > np.finfo(np.float32).smallest_normal).all() and np.isfinite(values).all()
    if precision.is_rowwise:
        halves = table[:, :4].copy().view(np.float16)
        assert (halves > np.finfo(np.float16).smallest_normal).all()


def test_ids_are_fresh_in_every_call_and_cover_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[Cell, list[np.ndarray]] = {}
    spoilt: list[int] = []

    def table(buffer: torch.Tensor, cell: Cell) -> Callable[..., None]:
        def look_up(ids: torch.Tensor, offsets: torch.Tensor) -> None:
            assert offsets[-1] == len(ids) and len(offsets) == 257
            seen.setdefault(cell, []).append(ids.numpy())
            assert len(spoilt) == sum(map(len, seen.values()))  # before every call

        return look_up

    monkeypatch.setattr(timing, "_table", table)
    monkeypatch.setattr(timing, "spoil_cache", lambda: spoilt.append(1))
    grid = small_grid(num_repeats=10)
    measure_lookups(grid)
    assert seen.keys() == set(grid.cells())
    for cell, calls in seen.items():
        assert len(calls) == 40 and len({ids.tobytes() for ids in calls}) == 40  # four for each repetition
        ids = np.concatenate(calls)
        assert 0 <= ids.min() < 0.01 * cell.rows and 0.99 * cell.rows <= ids.max() < cell.rows


def test_repetitions_are_interleaved_and_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    def order(seed: int) -> list[Cell]:
        cells: list[Cell] = []
        monkeypatch.setattr(timing, "_seconds_per_call", lambda buffer, cell, *_: cells.append(cell) or 1.0)
        measure_lookups(grid, seed=seed)
        return cells

    grid = small_grid()
    size = len(grid.cells())
    first, again, other = order(1), order(1), order(2)
    assert first == again != other
    rounds = [first[begin : begin + size] for begin in range(0, len(first), size)]
    assert len(rounds) == grid.num_repeats and all(set(r) == set(grid.cells()) for r in rounds)
    assert rounds[0] != rounds[1]


def test_median_and_spread_are_those_of_the_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([4e-3, 1e-3, 100.0, 2e-3, 3e-3])
    monkeypatch.setattr(timing, "_seconds_per_call", lambda *_: next(seconds))
    (time,) = measure_lookups(
        small_grid(dims=(16,), rows=(1_000,), poolings=(1,), precisions=(Precision.INT8,), num_bags=1000)
    )
    assert time.ns_per_bag == pytest.approx(3e-3 / 1000 * 1e9)
    assert time.spread == pytest.approx((4e-3 - 2e-3) / 3e-3)  # the quartiles of 1, 2, 3, 4 and 100,000 ms


def test_tables_over_the_limit_are_left_out_and_said() -> None:
    grid = small_grid(memory_limit_bytes=20_000 * 64 * 2)  # fp32 at dim 64 does not fit, fp16 just does
    left_out = grid.left_out()
    assert {(c.precision, c.dim, c.rows) for c in left_out} == {(Precision.FP32, 64, 20_000)}
    assert not set(left_out) & set(grid.cells())
    assert len(left_out) + len(grid.cells()) == 40
    assert max(cell.table_bytes for cell in grid.cells()) == grid.memory_limit_bytes


def test_a_dim_of_which_nothing_fits_is_refused() -> None:
    with pytest.raises(ConfigError, match="1,000 rows of fp32 at dim 100000 take 400,000,000 bytes.*--memory-mb"):
        default_grid(quick=True, dims=[100_000], memory_limit_bytes=2**20)


def test_memory_that_is_not_there_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="does not have free; lower --memory-mb"):
        timing._filled(2**60)


def test_dims_replace_those_of_the_grid() -> None:
    assert default_grid(dims=[48, 12, 48]).dims == (12, 48)
    assert default_grid(quick=True).rows == default_grid(quick=True, dims=[5]).rows


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    seen = []
    with timing.torch_threads(before + 1):
        seen.append(torch.get_num_threads())
    assert seen == [before + 1] and torch.get_num_threads() == before


def test_machine_facts_name_what_times_depend_on() -> None:
    facts = machine_facts(small_grid(), seed=3, num_threads=2)
    assert facts["num_threads"] == 2 and facts["seed"] == 3 and facts["num_bags"] == 256
    assert facts["torch"] == torch.__version__ and str(facts["fbgemm"]).startswith("fbgemm-gpu")
    assert facts["cpu"] and str(facts["measured_at"]).endswith("+00:00")
