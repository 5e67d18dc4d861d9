"""Lookup times between, at and outside measured points, and the file that holds them."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowprec.core.errors import ConfigError, ResultsError
from lowprec.latency.calibration import Calibration, LatencyPoint, unit_latency_ns
from lowprec.latency.calibration_file import calibration_document, check_writable, read_calibration, write_calibration
from lowprec.latency.measure import calibrate
from lowprec.ops.timing import Grid
from lowprec.plan import TABLE_PRECISIONS, Precision, Unit

DIMS, ROWS, POOLINGS = (16, 64, 128), (1_000, 100_000, 10_000_000), (1, 4, 16)
MACHINE = {"cpu": "a CPU", "num_threads": 1}


def time_of(precision: Precision, dim: int, rows: int, pooling: float) -> float:
    """Rises with everything, and is of the form that interpolation reproduces: linear, and linear in log rows."""
    return precision.bits * dim * pooling * math.log10(rows)


def grid_of(*precisions: Precision, time=time_of, keep=lambda p: True) -> Calibration:
    points = (
        LatencyPoint(precision, dim, rows, pooling, time(precision, dim, rows, pooling), 0.1)
        for precision in precisions or TABLE_PRECISIONS
        for dim in DIMS
        for rows in ROWS
        for pooling in POOLINGS
    )
    return Calibration(tuple(point for point in points if keep(point)), MACHINE)


REGULAR = grid_of()
# Without the largest tables of fp32, as a memory limit leaves them out.
RAGGED = grid_of(keep=lambda p: not (p.precision is Precision.FP32 and p.dim >= 64 and p.rows == ROWS[-1]))
# Times as noise may leave them: neither rising nor smooth, but always the same.
NOISY = grid_of(time=lambda p, d, r, k: 1 + hash((p.bits, d, r, k)) % 997)

INSIDE = {
    "precision": st.sampled_from(list(TABLE_PRECISIONS)),
    "dim": st.integers(DIMS[0], DIMS[-1]),
    "rows": st.integers(ROWS[0], ROWS[-1]),
    "pooling": st.floats(POOLINGS[0], POOLINGS[-1]),
}


def around(x: float, known: tuple[int, ...]) -> list[int]:
    return [max(k for k in known if k <= x), min(k for k in known if k >= x)]


@pytest.mark.parametrize("calibration", [REGULAR, RAGGED, NOISY])
def test_measured_points_are_exact(calibration: Calibration) -> None:
    for point in calibration.points:
        at = (point.precision, point.dim, point.rows, point.pooling)
        assert calibration.ns_per_bag(*at) == point.ns_per_bag
        assert calibration.outside(*at) is None


@given(**INSIDE)
def test_between_points_lie_the_times_of_the_corners(precision, dim, rows, pooling) -> None:
    corners = [
        NOISY.ns_per_bag(precision, d, r, k)
        for d in around(dim, DIMS)
        for r in around(rows, ROWS)
        for k in around(pooling, POOLINGS)
    ]
    assert min(corners) <= NOISY.ns_per_bag(precision, dim, rows, pooling) <= max(corners)
    assert NOISY.outside(precision, dim, rows, pooling) is None


@given(**INSIDE)
def test_it_is_linear_in_dim_and_pooling_and_logarithmic_in_rows(precision, dim, rows, pooling) -> None:
    expected = time_of(precision, dim, rows, pooling)
    assert REGULAR.ns_per_bag(precision, dim, rows, pooling) == pytest.approx(expected, rel=1e-9)


@given(**INSIDE, more=st.fixed_dictionaries({"dim": st.integers(0, 50), "pooling": st.floats(0, 9)}))
def test_where_points_rise_it_rises(precision, dim, rows, pooling, more) -> None:
    less = REGULAR.ns_per_bag(precision, dim, rows, pooling)
    larger = REGULAR.ns_per_bag(precision, dim + more["dim"], 2 * rows, pooling + more["pooling"])
    assert larger >= less * (1 - 1e-12)  # a few roundings of 2**-53


@given(dim=st.integers(DIMS[-1], 2000), pooling=st.floats(POOLINGS[-1], 500))
def test_beyond_dims_and_poolings_it_goes_on_along_the_line(dim, pooling) -> None:
    at = (Precision.INT8, dim, 100_000, pooling)
    assert REGULAR.ns_per_bag(*at) == pytest.approx(time_of(*at), rel=1e-9)


@given(
    precision=INSIDE["precision"],
    dim=st.integers(1, 2000),
    rows=st.integers(1, 10**10),
    pooling=st.floats(0, 500),
)
def test_it_never_falls_below_the_fastest_point(precision, dim, rows, pooling) -> None:
    fastest = min(p.ns_per_bag for p in NOISY.points if p.precision is precision)
    assert NOISY.ns_per_bag(precision, dim, rows, pooling) >= fastest


def test_outside_it_never_falls_below_the_nearest_point() -> None:
    falling = grid_of(time=lambda p, d, r, k: 1e4 - d - k)
    nearest = 1e4 - DIMS[-1] - POOLINGS[-1]
    assert falling.ns_per_bag(Precision.FP16, 5000, 1_000, 900.0) == nearest
    assert REGULAR.ns_per_bag(Precision.FP16, 1, 1_000, 0.0) == time_of(Precision.FP16, DIMS[0], 1_000, POOLINGS[0])


def test_rows_outside_count_as_the_nearest() -> None:
    for rows, nearest in ((1, 1_000), (10**12, 10_000_000)):
        got = REGULAR.ns_per_bag(Precision.INT4, 16, rows, 4)
        assert got == REGULAR.ns_per_bag(Precision.INT4, 16, nearest, 4)
    # Each dim by its own rows: dim 40 lies halfway between 16, with all rows, and 64, with fewer.
    here, there = (RAGGED.ns_per_bag(Precision.FP32, d, r, 4) for d, r in ((16, 10_000_000), (64, 100_000)))
    assert RAGGED.ns_per_bag(Precision.FP32, 40, 10_000_000, 4) == pytest.approx((here + there) / 2)


def test_what_lies_outside_is_said() -> None:
    assert REGULAR.outside(Precision.INT8, 128, 10_000_000, 16) is None
    assert REGULAR.outside(Precision.INT8, 200, 50, 40) == (
        "dim 200 is outside the measured 16 to 128 (extrapolated); "
        "50 rows of int8 are outside the measured 1,000 to 10,000,000 (the nearest is taken); "
        "40 ids per bag are outside the measured 1 to 16 (extrapolated)"
    )
    assert "0.5 ids per bag" in (REGULAR.outside(Precision.INT8, 16, 1000, 0.5) or "")
    assert "dim 8 " in (REGULAR.outside(Precision.INT8, 8, 1000, 1) or "")
    for dim in (17, 64, 100, 500):
        assert "1,000 to 100,000" in (RAGGED.outside(Precision.FP32, dim, 10_000_000, 1) or "")
    assert RAGGED.outside(Precision.FP32, 16, 10_000_000, 1) is None
    assert RAGGED.outside(Precision.INT8, 64, 10_000_000, 1) is None


def test_a_single_point_is_taken_everywhere() -> None:
    one = Calibration((LatencyPoint(Precision.INT8, 16, 1_000, 4, 50.0, 0.0),), {})
    assert one.ns_per_bag(Precision.INT8, 64, 7, 9) == 50.0
    assert "dim 64 is outside the measured 16 (it is taken)" in (one.outside(Precision.INT8, 64, 7, 9) or "")


def test_a_precision_that_was_not_measured_is_refused() -> None:
    part = grid_of(Precision.FP32, Precision.INT8)
    assert part.precisions == (Precision.FP32, Precision.INT8)
    for ask in (part.ns_per_bag, part.outside):
        with pytest.raises(ConfigError, match="no times of int4, only of fp32, int8; run `lowprec calibrate` again"):
            ask(Precision.INT4, 16, 1_000, 1)


@pytest.mark.parametrize(("dim", "rows", "pooling"), [(0, 1, 1), (1, 0, 1), (1, 1, -1), (1, 1, math.nan)])
def test_sizes_that_no_lookup_has_are_refused(dim, rows, pooling) -> None:
    with pytest.raises(ConfigError, match="a lookup needs dim and rows above 0"):
        REGULAR.ns_per_bag(Precision.INT4, dim, rows, pooling)


def test_latency_of_a_table_is_that_of_its_bags() -> None:
    unit = Unit("table:a", 100_000, 64)
    bag = REGULAR.ns_per_bag(Precision.INT8, 64, 100_000, 2.5)
    got = unit_latency_ns(REGULAR, unit, Precision.INT8, bags_per_example=3, ids_per_bag=2.5)
    assert got == pytest.approx(3 * bag)
    assert unit_latency_ns(REGULAR, unit, Precision.INT8, bags_per_example=0, ids_per_bag=0) == 0
    with pytest.raises(ConfigError, match='unit "layer:top.0": only tables'):
        unit_latency_ns(REGULAR, Unit("layer:top.0", 8, 8), Precision.INT8, bags_per_example=1, ids_per_bag=1)
    with pytest.raises(ConfigError, match='unit "table:a": bags per example'):
        unit_latency_ns(REGULAR, unit, Precision.INT8, bags_per_example=math.inf, ids_per_bag=1)


@pytest.mark.parametrize("calibration", [REGULAR, RAGGED, NOISY])
def test_written_and_read_back(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "new" / "calibration.json"
    for _ in range(2):  # the second time over the first
        write_calibration(calibration, path)
        assert read_calibration(path) == calibration
    assert [file.name for file in path.parent.iterdir()] == ["calibration.json"]


def changed(**fields):
    def change(document):
        document["points"][5].update(fields)

    return change


def without(index):
    return lambda document: document["points"].pop(index)


BAD_FILES = {
    "version": (lambda d: d.update(schema_version=2), "schema_version must be 1; got 2"),
    "no version": (lambda d: d.pop("schema_version"), "schema_version must be 1; got None"),
    "no machine": (lambda d: d.pop("machine"), "needs machine"),
    "points": (lambda d: d.update(points={}), "points"),
    "no points": (lambda d: d.update(points=[]), "there are no points"),
    "entry": (lambda d: d["points"].insert(5, 7), r"points\[5\]: needs precision, dim, .*got 7"),
    "missing key": (lambda d: d["points"][5].pop("spread"), r"points\[5\]: needs precision, dim"),
    "unknown key": (changed(p99=3), r"points\[5\]: needs .* and nothing else"),
    "precision": (changed(precision="int5"), r'points\[5\]: precision must be one of .*; got "int5"'),
    "dim": (changed(dim=0), r"points\[5\]: dim must be a whole number above 0; got 0"),
    "dim kind": (changed(dim="16"), "dim must be a whole number above 0; got '16'"),
    "rows": (changed(rows=1.5), "rows must be a whole number above 0; got 1.5"),
    "rows kind": (changed(rows=True), "rows must be a whole number above 0; got True"),
    "pooling": (changed(pooling=0), "pooling must be a number above 0; got 0"),
    "zero time": (changed(ns_per_bag=0), "ns_per_bag must be a number above 0; got 0"),
    "negative time": (changed(ns_per_bag=-3.5), "ns_per_bag must be a number above 0; got -3.5"),
    "nan": (changed(ns_per_bag=math.nan), "ns_per_bag must be a number above 0; got nan"),
    "text time": (changed(ns_per_bag="3"), "ns_per_bag must be a number above 0; got '3'"),
    "spread": (changed(spread=-0.1), "spread must be a number from 0; got -0.1"),
    "hole": (without(0), "grid has holes: fp32 at dim 16, 1,000 rows, pooling 1"),
    "hole at the most rows": (without(8), "grid has holes: fp32 at dim 16, 10,000,000 rows, pooling 16"),
    "two holes": (lambda d: (d["points"].pop(0), d["points"].pop(0)), "pooling 1 and 1 more"),
    "twice": (lambda d: d["points"].append(dict(d["points"][0])), "stands there twice"),
    "no such dim": (
        lambda d: d.update(points=[p for p in d["points"] if (p["precision"], p["dim"]) != ("int4", 64)]),
        "grid has holes: int4 at dim 64, 1,000 rows, pooling 1 and 8 more",
    ),
}


@pytest.mark.parametrize(("change", "said"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_files_that_are_no_calibration_are_refused(change, said: str, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(REGULAR, path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=said) as error:
        read_calibration(path)
    assert str(error.value).startswith(f"calibration {path}: ")
    assert str(error.value).endswith("run `lowprec calibrate` again")


def test_missing_files_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    with pytest.raises(ConfigError, match="No such file or directory; `lowprec calibrate --out .* makes it"):
        read_calibration(path)
    path.write_text("ns\n3\n")
    with pytest.raises(ConfigError, match="is not JSON.*run `lowprec calibrate` again"):
        read_calibration(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_calibration(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="schema_version must be 1; got None"):
        read_calibration(path)


def test_places_that_cannot_be_written_are_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "calibration.json", tmp_path / "folder"):
        for attempt in (check_writable, lambda path: write_calibration(REGULAR, path)):
            with pytest.raises(ResultsError, match="cannot be written: .*; choose another --out"):
                attempt(path)
    check_writable(tmp_path / "new" / "calibration.json")
    assert not list((tmp_path / "new").iterdir())


def test_a_failed_write_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(REGULAR, path)
    (tmp_path / f"calibration.json.{os.getpid()}.partial").mkdir()  # in the way of the new file
    with pytest.raises(ResultsError):
        write_calibration(NOISY, path)
    assert read_calibration(path) == REGULAR


def test_points_do_not_change() -> None:
    point = REGULAR.points[0]
    assert replace(point, spread=0.2) != point
    with pytest.raises(AttributeError):
        point.spread = 0.2  # type: ignore[misc]


def test_a_measured_grid_reads_back_and_names_what_was_left_out(tmp_path: Path) -> None:
    grid = Grid(
        dims=(4, 16), rows=(100, 2_000), poolings=(1, 8), num_repeats=2, num_bags=64, memory_limit_bytes=2_000 * 32
    )
    measured = calibrate(grid, seed=1)
    assert len(measured.points) == len(grid.cells()) == 38
    write_calibration(measured, tmp_path / "c.json")
    assert read_calibration(tmp_path / "c.json") == measured
    document = calibration_document(measured, grid)
    assert document["left_out"] == [{"precision": "fp32", "dim": 16, "rows": 2_000, "bytes": 128_000}]
    assert "2,000 rows of fp32" in (measured.outside(Precision.FP32, 16, 2_000, 1) or "")
