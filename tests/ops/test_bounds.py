"""No path reads or writes beyond an array: every one lies against memory that no process may touch.

Unlike the sanitizers of `make test-asan`, this sees masked vector instructions as well.
"""

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lowprec import _native, ops
from lowprec.plan import RowRange

PAGE = mmap.PAGESIZE
LOW = list(ops.SCORED)
DIMS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 47, 48, 63, 64, 65, 127, 129, 200, 257]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="protects pages with mprotect")


def guarded(array: NDArray[Any], *, before: bool) -> NDArray[Any]:
    """A copy that begins right behind a page without access (`before`), or ends right before one."""
    pages = -(-array.nbytes // PAGE)
    region = mmap.mmap(-1, (pages + 1) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    guard = address if before else address + pages * PAGE
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0) == 0, ctypes.get_errno()
    start = PAGE if before else pages * PAGE - array.nbytes
    copy = np.frombuffer(region, array.dtype, array.size, start).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize("before", [False, True], ids=["end", "start"])
@pytest.mark.parametrize("path", ops.cpu_paths())
def test_nothing_beyond_an_array_is_touched(path: str, before: bool) -> None:
    rng = np.random.default_rng(0)

    def guard(array: NDArray[Any]) -> NDArray[Any]:
        return guarded(np.ascontiguousarray(array), before=before)

    with ops.using_cpu_path(path):
        for dim in DIMS:
            for num_rows in (17, 60):  # a block with one row, and a part of one
                table = guard(rng.standard_normal((num_rows, dim), dtype=np.float32))
                lengths = np.array([0, 3, 1, 0, 38, 2])
                offsets = guard(np.concatenate([[0], np.cumsum(lengths)]))
                ids = guard(rng.integers(0, num_rows, offsets[-1]))
                ids[:2] = 0, num_rows - 1
                weights = guard(rng.standard_normal(len(ids), dtype=np.float32))
                gradients = guard(rng.standard_normal((len(lengths), dim), dtype=np.float32))
                look_at_all(guard, table, ids, offsets, weights, gradients)


def look_at_all(
    guard: Callable[[NDArray[Any]], NDArray[Any]],
    table: NDArray[np.float32],
    ids: NDArray[np.int64],
    offsets: NDArray[np.int64],
    weights: NDArray[np.float32],
    gradients: NDArray[np.float32],
) -> None:
    """Every kernel, into guarded outputs, with the results that it has in plain memory."""
    num_rows, dim = table.shape
    plain = np.array(table)
    for precision in LOW:
        out = guard(np.zeros((num_rows, ops.row_bytes(dim, precision)), np.uint8))
        for row_range in RowRange:
            ops.quantize(table, precision, row_range=row_range, out=out)
            np.testing.assert_array_equal(out, ops.quantize(plain, precision, row_range=row_range))
        if precision.is_rowwise:
            ranges = guard(np.zeros((len(ids), 2), np.uint16))
            _native.row_ranges(table, ids, precision.bits, "mse", ranges)
            ops.dequantize(out, precision, dim, out=guard(np.zeros((num_rows, dim), np.float32)))
        pooled = guard(np.zeros((len(offsets) - 1, dim), np.float32))
        _native.pooled(table, precision.bits, ids, offsets, pooled, False, weights, None)
        expected = ops.pooled_as(plain, precision, ids, offsets, mode="sum", weights=weights)
        np.testing.assert_array_equal(pooled, expected)
    scores = [guard(np.zeros(len(gradients), np.float32)) for _ in LOW]
    _native.scores(table, ids, offsets, gradients, scores, False, weights, [None] * (len(LOW) - 1))
    found = ops.scores(plain, LOW, ids, offsets, np.array(gradients), mode="sum", weights=weights)
    for precision, score in zip(LOW, scores, strict=True):
        np.testing.assert_array_equal(score, found[precision])
    words = guard(np.zeros((num_rows, -(-dim // 16) * 32), np.int32))
    steps = guard(np.zeros((num_rows, len(LOW)), np.float32))
    _native.row_changes(table, [None] * (len(LOW) - 1), words, steps)
    _native.scores_of_changes(words, steps, ids, offsets, gradients, scores, False, weights)
    found = ops.RowChanges(plain).scores(LOW, ids, offsets, np.array(gradients), mode="sum", weights=weights)
    for precision, score in zip(LOW, scores, strict=True):
        np.testing.assert_array_equal(score, found[precision])


def test_a_guarded_array_stops_a_process_that_reads_beyond_it() -> None:
    """Or the test above would prove nothing."""
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import ctypes
import numpy as np
from test_bounds import guarded
array = guarded(np.zeros(5), before=False)
print(array.sum(), flush=True)
ctypes.c_double.from_address(array.ctypes.data + array.nbytes).value
"""
    folder = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.stdout == "0.0\n" and done.returncode != 0
