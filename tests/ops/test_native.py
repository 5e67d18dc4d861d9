"""The Python face of the native module: arguments, errors, gathering, plain precisions."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lowprec import _native, ops
from lowprec.errors import KernelError, ModelError, TrafficError, WeightError
from lowprec.ops import native
from lowprec.plan import Precision

RNG = np.random.default_rng(3)
EVERY = list(Precision)
ROWWISE = [p for p in EVERY if p.is_rowwise]


def some_rows(num_rows: int = 20, dim: int = 7) -> np.ndarray:
    return RNG.standard_normal((num_rows, dim), dtype=np.float32)


def test_row_bytes_are_those_of_serving() -> None:
    expected = {Precision.FP32: 28, Precision.FP16: 14, Precision.INT8: 11, Precision.INT4: 8, Precision.INT2: 6}
    assert {p: ops.row_bytes(7, p) for p in Precision} == expected


@pytest.mark.parametrize("precision", EVERY)
def test_shapes_and_out(precision: Precision) -> None:
    rows = some_rows()
    stored = ops.quantize(rows, precision)
    assert stored.shape == (20, ops.row_bytes(7, precision))
    out = np.full_like(stored, 0xAA)
    assert ops.quantize(rows, precision, out=out) is out
    np.testing.assert_array_equal(out, stored)
    values = np.empty_like(rows)
    assert ops.dequantize(stored, precision, 7, out=values) is values
    np.testing.assert_array_equal(ops.dequantize(stored, precision, 7), values)


@pytest.mark.parametrize("precision", EVERY)
def test_no_rows(precision: Precision) -> None:
    assert ops.quantize(some_rows(0), precision).shape == (0, ops.row_bytes(7, precision))
    assert ops.dequantize(ops.quantize(some_rows(0), precision), precision, 7).shape == (0, 7)
    no_ids = np.empty(0, np.int64)
    assert ops.quantize_gathered(some_rows(), no_ids, precision).shape == (0, ops.row_bytes(7, precision))
    assert _native.quantize_rows(some_rows(0), 4, np.empty((0, 8), np.uint8)) == -1


def test_fp32_is_exact_and_fp16_is_rounded_to_nearest_even() -> None:
    rows = np.array([[1.0, 1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 1e9]], np.float32)
    np.testing.assert_array_equal(ops.dequantize(ops.quantize(rows, Precision.FP32), Precision.FP32, 5), rows)
    half = ops.dequantize(ops.quantize(rows, Precision.FP16), Precision.FP16, 5)
    np.testing.assert_array_equal(half, np.array([[1.0, 1.0, 1 + 2**-9, 65504.0, np.inf]], np.float32))


@pytest.mark.parametrize("precision", EVERY)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 7, 8, 12])
def test_a_row_that_is_not_finite_is_named(precision: Precision, bad: float, column: int) -> None:
    rows = some_rows(5000, 13)
    rows[[4321, 4400], column] = bad
    for num_threads in (1, 4):
        with pytest.raises(WeightError, match=rf"row 4321 .* column {column}"):
            ops.quantize(rows, precision, num_threads=num_threads)
    with pytest.raises(WeightError, match=rf"row 4400 .* column {column}"):
        ops.quantize_gathered(rows, np.array([1, 2, 4400, 4321]), precision)


@pytest.mark.parametrize("precision", EVERY)
def test_gathered_is_quantized_rows_picked(precision: Precision) -> None:
    table = some_rows(50, 9)[:, 1:8]
    ids = RNG.integers(0, 50, 200)
    expected = ops.quantize(np.ascontiguousarray(table[ids]), precision)
    np.testing.assert_array_equal(ops.quantize_gathered(table, ids, precision), expected)
    np.testing.assert_array_equal(ops.quantize_gathered(table, ids[::2], precision), expected[::2])


@pytest.mark.parametrize("outside", [-1, 50, 2**62])
def test_gathering_a_row_that_is_not_there(outside: int) -> None:
    ids = np.array([0, outside, 3])
    with pytest.raises(WeightError, match=rf"ids\[1\] is {outside}, outside the 50 rows"):
        ops.quantize_gathered(some_rows(50), ids, Precision.INT4)
    with pytest.raises(IndexError, match=r"ids\[1\]"):
        _native.quantize_gathered(some_rows(50), ids, 4, np.empty((3, 8), np.uint8))


def test_wrong_arguments_are_refused_before_anything_is_written() -> None:
    rows = some_rows()
    for wrong in (rows.astype(np.float64), rows[0], rows[:, ::2], rows[:, :0]):
        with pytest.raises(TypeError, match="rows"):
            ops.quantize(wrong, Precision.INT4)  # type: ignore[arg-type]
    read_only = np.empty((20, 8), np.uint8)
    read_only.flags.writeable = False
    for out in (np.empty((20, 9), np.uint8), np.empty((20, 8), np.int8), np.empty((8, 20), np.uint8).T, read_only):
        with pytest.raises(TypeError, match="out must be"):
            ops.quantize(rows, Precision.INT4, out=out)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="have 8 bytes; got 7"):
        ops.dequantize(np.zeros((2, 7), np.uint8), Precision.INT4, 7)


def test_native_module_copies_no_argument_and_checks_shapes() -> None:
    rows, out = some_rows(), np.empty((20, 8), np.uint8)
    transposed = np.empty((8, 20), np.uint8).T
    for bad_rows, bad_out in ((rows.astype(np.float64), out), (rows, transposed), (rows[:, ::-1], out)):
        with pytest.raises((TypeError, ValueError)):
            _native.quantize_rows(bad_rows, 4, bad_out)
    with pytest.raises(ValueError, match="bits"):
        _native.quantize_rows(rows, 3, out)
    with pytest.raises(ValueError, match=r"out must be \[20, 8\]"):
        _native.quantize_rows(rows, 4, out[:, :7].copy())


LOW = [p for p in EVERY if p is not Precision.FP32]
IDS, OFFSETS = np.array([0, 19, 3, 3]), np.array([0, 2, 2, 4])


def dots(ids=IDS, offsets=OFFSETS, gradients=None, *, precision=Precision.INT4, mode="sum", weights=None, stored=None):
    stored = ops.quantize(np.ones((20, 7), np.float32), precision) if stored is None else stored
    gradients = np.ones((3, 7), np.float32) if gradients is None else gradients
    return ops.pooled_dots(stored, precision, ids, offsets, gradients, mode=mode, weights=weights)


@pytest.mark.parametrize("precision", LOW)
def test_dots_of_ones_count_the_ids(precision: Precision) -> None:
    np.testing.assert_array_equal(dots(precision=precision), [14, 0, 14])
    np.testing.assert_array_equal(dots(precision=precision, mode="mean"), [7, 0, 7])
    weights = np.array([1, 2, 3, -3], np.float32)
    np.testing.assert_array_equal(dots(precision=precision, weights=weights), [21, 0, 0])
    none = np.empty(0, np.int64)
    assert dots(none, np.zeros(1, np.int64), np.empty((0, 7), np.float32), precision=precision).shape == (0,)
    np.testing.assert_array_equal(dots(none, np.zeros(4, np.int64), precision=precision), [0, 0, 0])


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        ([0, 2, 2, 5], "offsets.3. is 5"),
        ([0, 2, 1, 4], "offsets.2. is 1"),
        ([1, 2, 2, 4], "offsets.0. is 1"),
        ([0, 2, 2, 3], "offsets.3. is 3"),
        ([0, -1, 2, 4], "offsets.1. is -1"),
        ([0, 2, 4], "need 4 offsets; got 3"),
    ],
)
def test_dots_refuse_offsets_that_do_not_fit(offsets: list[int], said: str) -> None:
    with pytest.raises(TrafficError, match=said):
        dots(offsets=np.array(offsets))


@pytest.mark.parametrize("outside", [-1, 20, 2**62])
def test_dots_refuse_an_id_that_is_no_row(outside: int) -> None:
    with pytest.raises(TrafficError, match=rf"ids\[2\] is {outside}, outside the 20 rows"):
        dots(np.array([0, 1, outside, 3]))


def test_dots_refuse_arrays_of_another_form() -> None:
    ones = np.ones((3, 14), np.float32)
    for wrong in ({"ids": IDS.astype(np.int32)}, {"ids": np.repeat(IDS, 2)[::2]}, {"offsets": OFFSETS.astype(float)}):
        with pytest.raises(TypeError, match="ids must be|offsets must be"):
            dots(**wrong)
    for gradients in (ones[:, ::2], ones[:, :7], ones[:, :7].astype(np.float64), ones[0, :7], ones[:, :0]):
        with pytest.raises(TypeError, match="gradients"):
            dots(gradients=gradients)
    with pytest.raises(ValueError, match="of dim 14 have 11 bytes; got 8"):
        dots(gradients=ones)
    with pytest.raises(ValueError, match="fp32"):
        dots(precision=Precision.FP32)
    with pytest.raises(TypeError, match="weights"):
        dots(weights=np.ones(4))
    with pytest.raises(TrafficError, match="4 ids and 3 weights"):
        dots(weights=np.ones(3, np.float32))
    with pytest.raises(ModelError, match="sum pooling"):
        dots(weights=np.ones(4, np.float32), mode="mean")


def test_native_dots_copy_no_argument_and_check_it() -> None:
    good = {"stored": np.zeros((20, 8), np.uint8), "bits": 4, "ids": IDS, "offsets": OFFSETS, "mean": False}
    good |= {"gradients": np.ones((3, 7), np.float32), "out": np.empty(3, np.float32), "weights": None}
    _native.pooled_dots(**good)
    read_only = np.empty(3, np.float32)
    read_only.flags.writeable = False
    others = {
        "stored": [np.zeros((20, 9), np.uint8), np.zeros((20, 8), np.int8), np.zeros((20, 16), np.uint8)[:, ::2]],
        "bits": [3, 16, 32],
        "ids": [
            IDS.astype(np.int32),
            np.repeat(IDS, 2)[::2],
            IDS[:3],
            np.array([0, 1, 2, 20]),
            np.array([0, 1, 2, -1]),
        ],
        "offsets": [OFFSETS[:3], np.repeat(OFFSETS, 2)[::2], OFFSETS.astype(np.int32), OFFSETS + 1],
        "gradients": [np.ones((3, 7)), np.ones((2, 7), np.float32), np.ones((7, 3), np.float32).T],
        "out": [np.empty(3), np.empty(2, np.float32), np.empty(6, np.float32)[::2], read_only],
        "weights": [np.ones(4), np.ones(3, np.float32)],
    }
    for name, wrong in others.items():
        for value in wrong:
            with pytest.raises((TypeError, ValueError, IndexError)):
                _native.pooled_dots(**{**good, name: value})


def test_read_only_rows_are_taken() -> None:
    rows = some_rows()
    rows.flags.writeable = False
    ops.quantize(rows, Precision.INT8)
    ops.quantize_gathered(rows, np.arange(3), Precision.INT8)
    dots(gradients=rows[:3])


def test_rows_may_lie_backwards_and_a_single_column_may_have_any_stride() -> None:
    rows = some_rows()
    np.testing.assert_array_equal(ops.quantize(rows[::-1], Precision.INT4), ops.quantize(rows, Precision.INT4)[::-1])
    column = ops.quantize(rows[:, 3:4], Precision.INT4)
    np.testing.assert_array_equal(column, ops.quantize(rows[:, 3:4].copy(), Precision.INT4))


def test_overflow_is_found() -> None:
    rows = some_rows()
    rows[11] *= 1e9
    for precision in EVERY:
        expected = -1 if precision is Precision.FP32 else 11
        assert ops.first_overflow(ops.quantize(rows, precision), precision) == expected
        assert ops.first_overflow(ops.quantize(rows[:11], precision), precision) == -1


def test_other_threads_run_while_rows_are_quantized() -> None:
    rows = np.ones((400_000, 64), np.float32)
    out = np.empty((len(rows), 68), np.uint8)
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0002)

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        for _ in range(20):  # a busy machine may leave the other thread without a turn in one call, not in all
            began = time.perf_counter()
            _native.quantize_rows(rows, 8, out)
            ended = time.perf_counter()
            # With the GIL held, a tick could fall only beside the call, within one switch interval of its ends.
            margin = (ended - began) / 4
            if any(began + margin < t < ended - margin for t in ticks):
                return
    finally:
        stop.set()
        ticker.join()
    pytest.fail("no other thread ran during 20 calls: is the GIL released?")


def test_missing_module_says_how_to_build() -> None:
    code = """
import sys
sys.modules["lowprec._native"] = None
import numpy as np
from lowprec import ops
from lowprec.errors import KernelError
from lowprec.plan import Precision
assert ops.row_bytes(7, Precision.INT4) == 8
try:
    ops.quantize(np.ones((1, 1), np.float32), Precision.INT8)
except KernelError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "lowprec._native does not load" in done.stdout
    assert "make setup" in done.stdout


def test_module_older_than_its_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    native.check_kernels.cache_clear()
    native.check_kernels()
    monkeypatch.setattr(_native, "SOURCE_DIGEST", "0" * 64)
    native.check_kernels.cache_clear()
    try:
        with pytest.raises(KernelError, match="built from other sources"):
            ops.quantize(some_rows(), Precision.INT8)
    finally:
        native.check_kernels.cache_clear()


def test_sources_lie_where_the_check_looks_for_them() -> None:
    assert (Path(native.__file__).parents[2] / "kernels" / "CMakeLists.txt").is_file()
