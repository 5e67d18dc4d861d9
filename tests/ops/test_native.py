"""The Python face of the native module: arguments, errors, gathering, plain precisions."""

import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lowprec import _native, ops
from lowprec.core.errors import ConfigError, KernelError, WeightError
from lowprec.ops import native
from lowprec.plan import TABLE_PRECISIONS, Precision

RNG = np.random.default_rng(3)
EVERY = list(TABLE_PRECISIONS)
ROWWISE = [p for p in EVERY if p.is_rowwise]


def some_rows(num_rows: int = 20, dim: int = 7) -> np.ndarray:
    return RNG.standard_normal((num_rows, dim), dtype=np.float32)


def test_row_bytes_are_those_of_serving() -> None:
    expected = {Precision.FP32: 28, Precision.FP16: 14, Precision.INT8: 11, Precision.INT4: 8, Precision.INT2: 6}
    assert {p: ops.row_bytes(7, p) for p in TABLE_PRECISIONS} == expected


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
    assert ops.quantize(some_rows(), precision, ids=no_ids).shape == (0, ops.row_bytes(7, precision))
    assert _native.quantize(some_rows(0), None, 4, "minmax", np.empty((0, 8), np.uint8)) == -1


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
        ops.quantize(rows, precision, ids=np.array([1, 2, 4400, 4321]))


@pytest.mark.parametrize("precision", EVERY)
def test_gathered_is_quantized_rows_picked(precision: Precision) -> None:
    table = some_rows(50, 9)[:, 1:8]
    ids = RNG.integers(0, 50, 200)
    expected = ops.quantize(np.ascontiguousarray(table[ids]), precision)
    np.testing.assert_array_equal(ops.quantize(table, precision, ids=ids), expected)
    np.testing.assert_array_equal(ops.quantize(table, precision, ids=ids[::2]), expected[::2])


@pytest.mark.parametrize("outside", [-1, 50, 2**62])
def test_gathering_a_row_that_is_not_there(outside: int) -> None:
    ids = np.array([0, outside, 3])
    with pytest.raises(WeightError, match=rf"ids\[1\] is {outside}, outside the 50 rows"):
        ops.quantize(some_rows(50), Precision.INT4, ids=ids)
    with pytest.raises(IndexError, match=r"ids\[1\]"):
        _native.quantize(some_rows(50), ids, 4, "minmax", np.empty((3, 8), np.uint8))


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
            _native.quantize(bad_rows, None, 4, "minmax", bad_out)
    with pytest.raises(ValueError, match="bits"):
        _native.quantize(rows, None, 3, "minmax", out)
    with pytest.raises(ValueError, match=r"out must be \[20, 8\]"):
        _native.quantize(rows, None, 4, "minmax", out[:, :7].copy())
    with pytest.raises(ValueError, match="range must be minmax or mse; got best"):
        _native.quantize(rows, None, 4, "best", out)


def test_read_only_rows_are_taken() -> None:
    rows = some_rows()
    rows.flags.writeable = False
    ops.quantize(rows, Precision.INT8)
    ops.quantize(rows, Precision.INT8, ids=np.arange(3))


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
            _native.quantize(rows, None, 8, "minmax", out)
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
from lowprec.core.errors import KernelError
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


def test_sources_that_hide_the_installed_module_say_so(tmp_path: Path) -> None:
    """Without the hook of an editable install, as lowprec is installed on a cluster."""
    package = Path(__file__).parents[2] / "lowprec"
    for folder in ("sources", "working_dir_files/pkg"):
        shutil.copytree(package, tmp_path / folder / "lowprec", ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "lowprec").symlink_to(package)
    code = """
import sys
sys.path[:0] = sys.argv[1:]
from lowprec import ops
from lowprec.core.errors import KernelError
try:
    ops.check_kernels()
except KernelError as error:
    print(error)
"""

    def said(*folders: str, cwd: Path = tmp_path, **environment: str) -> str:
        paths = [*(str(tmp_path / folder) for folder in folders), sysconfig.get_path("purelib")]
        paths += [path for path in sys.path if Path(path).name == "site-packages"]
        command = [sys.executable, "-S", "-c", code, *paths]
        environment = {**os.environ, **environment}
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd, env=environment).stdout

    hides = said("sources", "installed")
    assert f"imported from {tmp_path}/sources/lowprec, sources without their native module" in hides
    assert f"they hide the lowprec installed in {tmp_path}/installed" in hides and "--working-dir jobs" in hides
    submitted = "submitted as the working dir of this Ray job: lowprec has to be installed instead"
    assert submitted in said("working_dir_files/pkg")
    # A working dir that was there already, as on the machine of the cluster: the job runs in it.
    in_job = said("sources", cwd=tmp_path / "sources", RAY_JOB_CONFIG_JSON_ENV_VAR="{}")
    assert submitted in in_job and "make setup" not in in_job and "--working-dir jobs" in in_job
    assert "lowprec._native does not load" in said("sources") and not said("installed", "sources")


def test_module_older_than_its_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    native.kernels.cache_clear()
    native.check_kernels()
    monkeypatch.setattr(_native, "SOURCE_DIGEST", "0" * 64)
    native.kernels.cache_clear()
    try:
        with pytest.raises(KernelError, match="built from other sources"):
            ops.quantize(some_rows(), Precision.INT8)
    finally:
        native.kernels.cache_clear()


def test_a_cpu_path_is_asked_for_and_given_back() -> None:
    before = ops.cpu_path()
    assert before in ops.cpu_paths()
    assert ops.cpu_paths()[-1] == "portable"
    with ops.using_cpu_path("portable"):
        assert ops.cpu_path() == "portable"
    assert ops.cpu_path() == before
    with pytest.raises(ConfigError, match='CPU path: this CPU has .*portable; got "sse9"'), ops.using_cpu_path("sse9"):
        pass
    with pytest.raises(ValueError, match="sse9"):
        _native.use_cpu_path("sse9")


@pytest.mark.parametrize(("asked", "said"), [("portable", "portable\n"), ("sse9", "LOWPREC_CPU_PATH: this CPU has")])
def test_the_environment_chooses_the_cpu_path(asked: str, said: str) -> None:
    code = """
from lowprec import ops
from lowprec.core.errors import ConfigError
try:
    print(ops.cpu_path())
except ConfigError as error:
    print(error)
"""
    environment = {**os.environ, "LOWPREC_CPU_PATH": asked}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert said in done.stdout


def test_sources_lie_where_the_check_looks_for_them() -> None:
    assert (Path(native.__file__).parents[2] / "kernels" / "CMakeLists.txt").is_file()
