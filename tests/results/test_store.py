"""The results store: nothing acknowledged is lost or doubled, whatever is repeated, raced or killed."""

from datetime import UTC, datetime
from functools import reduce
from operator import truediv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from lowprec.core.errors import ResultsError
from lowprec.results import ResultsStore
from lowprec.results.schema import SCHEMA_VERSION, TABLES, to_arrow
from lowprec.storage import Location
from lowprec.storage.object_store import delta_options


@pytest.fixture(params=["folder", "url", "relative", "s3"])
def root(request, tmp_path, monkeypatch):
    """Every way to name a root: what holds of a folder holds of an object store."""
    monkeypatch.chdir(tmp_path)
    if request.param == "s3":
        return request.getfixturevalue("bucket") + "/runs"
    return {"folder": str(tmp_path / "a root"), "url": (tmp_path / "root").as_uri(), "relative": "runs"}[request.param]


def put(content, *parts):
    with reduce(truediv, parts[1:], Location.of(parts[0])).whole_file() as partial:
        partial.write_bytes(content)


def options(root):
    return delta_options(root) if "://" in str(root) else None


def keys(store, table="trials"):
    return store.read(table)["row_key"].to_pylist()


def test_rows_come_back_as_they_went_in(root, row):
    store = ResultsStore(root)
    given = row("trials", "k", number=(1 << 62) + 1, gap_pct=None, kl_pct=float("inf"), message_free=None)
    del given["message_free"]
    assert store.append("trials", [given]) == 1
    (found,) = ResultsStore(root).read("trials").to_pylist()
    assert abs(datetime.now(UTC) - found.pop("committed_at")).total_seconds() < 60
    assert found == given
    run = row("runs", "r/0")
    store.append("runs", [run])
    assert ResultsStore(root).read("runs").to_pylist()[0]["started_at"] == run["started_at"]


def test_rows_keep_the_order_of_their_commits(root, row):
    store = ResultsStore(root)
    for wave in range(5):
        store.append("trials", [row("trials", f"{wave}-{i}") for i in (3, 1, 2)])
    assert keys(store) == [f"{wave}-{i}" for wave in range(5) for i in (3, 1, 2)]


def test_append_skips_what_is_there(root, row):
    store = ResultsStore(root)
    rows = [row("trials", f"k{i}", number=i) for i in range(3)]
    assert store.append("trials", rows) == 3
    assert store.append("trials", rows) == 0
    assert ResultsStore(root).append("trials", [row("trials", "k1", number=99), row("trials", "new")]) == 1
    assert store.append("trials", [row("trials", "twice"), row("trials", "twice")]) == 1
    assert keys(store) == ["k0", "k1", "k2", "new", "twice"]
    assert store.read("trials", row_key="k1")["number"].to_pylist() == [1]
    # A commit for each append that had something new, and no other.
    assert store.dataset("trials").count_rows() == 5


def test_append_of_nothing_makes_no_table(root):
    store = ResultsStore(root)
    assert store.append("trials", []) == 0
    assert store.read("trials").num_rows == 0
    assert store.read("trials").schema.names == TABLES["trials"].arrow.names


def test_one_commit_for_many_rows(root, row):
    store = ResultsStore(root)
    store.append("trials", [row("trials", str(i)) for i in range(50)])
    log = Location.of(root) / "trials" / "_delta_log"
    assert len([name for name in log.names() if name.endswith(".json")]) == 2  # the table, and its rows


def test_repetitions_of_a_lost_acknowledgement_are_read_once(root, row):
    """Two writers that both missed the other's commit: the check before the append cannot see everything."""
    store = ResultsStore(root)
    store.append("trials", [row("trials", "a", number=1), row("trials", "b")])
    table = store._open(TABLES["trials"])
    later = to_arrow(TABLES["trials"], [row("trials", "a", number=2)], datetime(2100, 1, 1, tzinfo=UTC))
    write_deltalake(table, later, mode="append")
    assert store.dataset("trials").count_rows() == 3
    found = {r["row_key"]: r["number"] for r in store.read("trials").to_pylist()}
    assert found == {"a": 2, "b": 1}


def test_of_runs_the_highest_version_is_read(root, row):
    store = ResultsStore(root)
    for run, version in (("r", 0), ("s", 0), ("r", 2), ("r", 1), ("r", 10)):
        store.append("runs", [row("runs", f"{run}/{version}", run_id=run, version=version)])
    found = {r["run_id"]: r["version"] for r in store.read("runs").to_pylist()}
    assert found == {"r": 10, "s": 0}
    assert store.read("runs", run_id="s").num_rows == 1
    assert store.read("runs", run_id="r").to_pylist()[0]["version"] == 10


def test_read_filters(root, row):
    store = ResultsStore(root)
    store.append(
        "trials", [row("trials", f"{r}{e}", run_id=r, evaluation=e) for r in "ab" for e in ("exact", "confirm")]
    )
    assert keys(store) == ["aexact", "aconfirm", "bexact", "bconfirm"]
    assert store.read("trials", run_id="a", evaluation="exact")["row_key"].to_pylist() == ["aexact"]
    assert store.read("trials", run_id="z").num_rows == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"number": 1.5}, "number must be an integer; got 1.5 (float)"),
        ({"number": 2.0}, "number must be an integer; got 2.0 (float)"),
        ({"number": True}, "number must be an integer; got True (bool)"),
        ({"number": 1 << 63}, "number must be an integer; got 9223372036854775808"),
        ({"number": np.uint64(1 << 63)}, "number must be an integer"),
        ({"number": "1"}, "number must be an integer; got '1' (str)"),
        ({"gap_pct": (1 << 53) + 1}, "gap_pct must be a number; got 9007199254740993"),
        ({"gap_pct": "0.1"}, "gap_pct must be a number; got '0.1'"),
        ({"kind": 3}, "kind must be text; got 3 (int)"),
        ({"row_key": None}, "row_key must be text; got None"),
        ({"colour": "red"}, "has unknown colour; columns are row_key, run_id"),
        ({"committed_at": datetime.now(UTC)}, "has unknown committed_at"),
    ],
)
def test_values_that_would_change_are_refused(changes, sentence, row, tmp_path):
    store = ResultsStore(tmp_path / "runs")
    with pytest.raises(ResultsError) as raised:
        store.append("trials", [row("trials", "good"), row("trials", "bad") | changes])
    assert sentence in str(raised.value)
    assert "results table trials, row" in str(raised.value)
    assert not (tmp_path / "runs").exists()


def test_times_need_a_zone_and_keep_their_moment(row, tmp_path):
    from datetime import timedelta, timezone

    store = ResultsStore(tmp_path)
    with pytest.raises(ResultsError, match="started_at must be a time with a zone"):
        store.append("runs", [row("runs", "r", started_at=datetime(2026, 1, 1))])
    abroad = datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=5)))
    store.append("runs", [row("runs", "r", started_at=abroad)])
    assert store.read("runs")["started_at"].to_pylist() == [abroad]


def test_numpy_numbers_and_exact_integers_are_welcome(row, tmp_path):
    store = ResultsStore(tmp_path)
    store.append("trials", [row("trials", "k", number=np.int32(7), gap_pct=np.float32(0.5), kl_pct=3)])
    (found,) = store.read("trials").to_pylist()
    assert (found["number"], found["gap_pct"], found["kl_pct"]) == (7, 0.5, 3.0)


def test_a_missing_column_is_named(row, tmp_path):
    incomplete = row("trials", "k")
    del incomplete["gap_pct"], incomplete["kind"]
    with pytest.raises(ResultsError, match="misses kind, gap_pct"):
        ResultsStore(tmp_path).append("trials", [incomplete])


def test_an_unknown_table_is_refused(row, tmp_path):
    for use in (lambda s: s.append("trails", []), lambda s: s.read("trails")):
        with pytest.raises(ResultsError, match='no table "trails"; there are runs, trials, sensitivities'):
            use(ResultsStore(tmp_path))


def test_an_unwritable_root(row, tmp_path):
    (tmp_path / "file").write_text("")
    store = ResultsStore(tmp_path / "file" / "runs")
    with pytest.raises(ResultsError, match=r"file/runs: cannot be written: Not a directory; make it writable"):
        store.append("trials", [row("trials", "k")])
    assert ResultsError.exit_code == 3


def test_a_folder_of_something_else_is_left_alone(row, place):
    put(b"", place, "trials", "holiday.jpg")
    for use in (lambda s: s.append("trials", [row("trials", "k")]), lambda s: s.read("trials")):
        with pytest.raises(ResultsError, match=r"holds holiday.jpg, which is no Delta table; choose another"):
            use(ResultsStore(place))
    assert (Location.of(place) / "trials").names() == ["holiday.jpg"]


def test_a_file_where_a_table_should_be(row, place):
    put(b"", place, "trials")
    with pytest.raises(ResultsError, match="is a file"):
        ResultsStore(place).append("trials", [row("trials", "k")])


@pytest.mark.parametrize("victim", ["log", "data"])
def test_a_corrupt_table_is_reported_in_one_line(victim, row, place):
    store = ResultsStore(place)
    store.append("trials", [row("trials", "k")])
    folder = Location.of(place) / "trials"
    folder = folder / "_delta_log" if victim == "log" else folder
    (name,) = (name for name in folder.names() if name.endswith("1.json" if victim == "log" else ".parquet"))
    put(b"{garbage", folder, name)
    for use in (lambda: store.read("trials"), lambda: store.append("trials", [row("trials", "k")])):
        with pytest.raises(ResultsError) as raised:
            use()
        assert f"{place}/trials" in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_table_with_other_columns_is_refused(row, place):
    Location.of(place).is_url or Path(place).mkdir()
    other = pa.table({"row_key": ["k"], "number": [1.5]})
    text = f"lowprec results, schema {SCHEMA_VERSION}"
    write_deltalake(f"{place}/trials", other, storage_options=options(place), description=text)
    for use in (lambda s: s.append("trials", [row("trials", "k")]), lambda s: s.read("trials")):
        with pytest.raises(ResultsError, match="was written by another version of lowprec"):
            use(ResultsStore(place))


def test_a_table_whose_columns_had_another_meaning_is_refused(row, place):
    before = to_arrow(TABLES["trials"], [row("trials", "k")], datetime.now(UTC))
    Location.of(place).is_url or Path(place).mkdir()
    write_deltalake(f"{place}/trials", before, storage_options=options(place))
    for use in (lambda s: s.append("trials", [row("trials", "m")]), lambda s: s.read("trials")):
        with pytest.raises(ResultsError, match=f"results schema 1, this version .* schema {SCHEMA_VERSION}"):
            use(ResultsStore(place))


def test_artifacts_lie_below_the_root(tmp_path):
    for root, below in (
        (tmp_path, tmp_path / "artifacts" / "r1"),
        (tmp_path.as_uri(), tmp_path / "artifacts" / "r1"),
        ("runs", "runs/artifacts/r1"),
        ("s3://bucket/x/", "s3://bucket/x/artifacts/r1"),
    ):
        assert str(ResultsStore(root).artifacts("r1")) == str(below)
    assert not (tmp_path / "artifacts").exists()


def test_what_an_object_store_says_is_one_sentence(row, s3, monkeypatch):
    for root, said in (
        ("s3://nowhere/runs", f'there is no bucket "nowhere" at {s3.endpoint}'),
        ("s3://bucket/runs?region=x", "a URL of results takes no options and no keys; set them in the environment"),
        ("s3://key:secret@bucket/runs", "a URL of results takes no options and no keys"),
    ):
        for use in (lambda s: s.append("trials", [row("trials", "k")]), lambda s: s.check_not_empty()):
            with pytest.raises(ResultsError) as raised:
                use(ResultsStore(root))
            assert said in str(raised.value) and "\n" not in str(raised.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(ResultsError, match="http://127.0.0.1:1 cannot be reached: nothing listens there"):
        ResultsStore("s3://bucket/runs").append("trials", [row("trials", "k")])


def test_a_store_that_overwrites_commits_is_noticed(row, s3, bucket):
    """It ignores If-None-Match, and another process lists the log before, and commits after us."""
    ours, others = ResultsStore(bucket), ResultsStore(bucket)
    ours.append("trials", [row("trials", "a")])
    late = []

    def answer(environ):
        environ.pop("HTTP_IF_NONE_MATCH", None)
        if environ["PATH_INFO"].endswith("2.json") and environ["REQUEST_METHOD"] == "PUT" and not late:
            late.append(environ["PATH_INFO"])
            ours.append("trials", [row("trials", "b")])

    s3.answer = answer
    others.append("trials", [row("trials", "c")])
    assert late and keys(ResultsStore(bucket)) == ["a", "c"]
    others.check_kept()
    for use in (ours.check_kept, lambda: ours.append("trials", [row("trials", "d")])):
        with pytest.raises(
            ResultsError, match="1 rows that were committed are gone: .* one process at a time, and resume"
        ):
            use()


def test_a_store_without_conditional_put_is_refused(row, s3, bucket):
    refused = "501 Not Implemented", b"<Error><Code>NotImplemented</Code></Error>"
    s3.answer = lambda environ: refused if environ.get("HTTP_IF_NONE_MATCH") else None
    with pytest.raises(ResultsError, match=r"cannot be written: the store has no conditional put"):
        ResultsStore(bucket).append("trials", [row("trials", "k")])


def test_tables_are_read_without_python_in_arrows_threads(root, row):
    """Delta's own file system calls back into Python, which aborted some processes that ended right after reading."""
    import pyarrow.fs as pafs

    store = ResultsStore(root)
    store.append("trials", [row("trials", "a")])
    assert not isinstance(store.dataset("trials").filesystem, pafs.PyFileSystem)


def test_a_damaged_log_is_named(row, tmp_path):
    store = ResultsStore(tmp_path)
    for number in range(2):
        store.append("runs", [row("runs", f"a/{number}")])
    commit = tmp_path / "runs" / "_delta_log" / f"{1:020}.json"
    commit.write_text("{broken")
    for use in (lambda: store.append("runs", [row("runs", "b")]), lambda: ResultsStore(tmp_path).read("runs")):
        damage = f"_delta_log is damaged: {commit.name} .*another results.root"
        with pytest.raises(ResultsError, match=damage) as raised:
            use()
        assert "unknown" not in str(raised.value)
