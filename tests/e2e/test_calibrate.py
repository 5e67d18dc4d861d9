"""`lowprec calibrate`, as a user types it."""

import json

from lowprec.latency.calibration_file import read_calibration
from lowprec.plan import TABLE_PRECISIONS


def test_it_prints_tables_and_writes_a_file_that_reads_back(lowprec, tmp_path):
    done = lowprec("calibrate", "--quick", "--dim", 8, "--dim", 24, "--dim", 8, cwd=tmp_path)
    assert done.code == 0, done.err
    for part in ("ns per bag of 1 id, 100,000 rows", "ns per bag of 64 ids", "dim 24", "int2", "threads: 1"):
        assert part in done.out
    assert done.out.endswith("written to runs/calibration.json\n")
    assert "left out" not in done.out
    calibration = read_calibration(tmp_path / "runs" / "calibration.json")
    assert calibration.precisions == TABLE_PRECISIONS
    assert {p.dim for p in calibration.points} == {8, 24}


def test_json_is_one_document_that_equals_the_file(lowprec, tmp_path):
    limit_mb = 12  # 100,000 rows of fp32 at dim 32 take 12.8 MB, which is more
    options = ("--quick", "--dim", 16, "--dim", 32, "--memory-mb", limit_mb, "--seed", 3, "--threads", 1)
    done = lowprec("calibrate", *options, "--out", "mine.json", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    document = done.document
    assert (document["schema_version"], document["command"], document["path"]) == (1, "calibrate", "mine.json")
    written = json.loads((tmp_path / "mine.json").read_text())
    assert written == {"schema_version": 1, "machine": document["machine"], "points": document["points"]}
    assert document["machine"]["seed"] == 3
    assert document["memory_limit_bytes"] == limit_mb * 2**20
    assert document["left_out"] == [{"precision": "fp32", "dim": 32, "rows": 100_000, "bytes": 12_800_000}]


def test_what_was_left_out_is_printed(lowprec, tmp_path):
    done = lowprec("calibrate", "--quick", "--dim", 32, "--memory-mb", 12, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "left out: 100,000 rows of fp32 at dim 32, over the memory limit of 12 MiB (--memory-mb)" in done.out
    assert "ns per bag of 64 ids, 1,000 rows" in done.out  # the most rows that every precision has


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(lowprec, one_sentence, tmp_path):
    (tmp_path / "file").write_text("")
    done = lowprec("calibrate", "--out", "file/calibration.json", cwd=tmp_path)  # not --quick: it does not get there
    one_sentence(done, 3, ["calibration file/calibration.json: cannot be written", "choose another --out"])
    document = lowprec("calibrate", "--out", "file/calibration.json", "--json", cwd=tmp_path).document
    assert document["error"]["exit_code"] == 3


def test_wrong_options_are_refused(lowprec, one_sentence, tmp_path):
    one_sentence(lowprec("calibrate", "--dim", 0, cwd=tmp_path), 64, ["--dim"])
    done = lowprec("calibrate", "--quick", "--dim", 10_000, "--memory-mb", 1, cwd=tmp_path)
    one_sentence(done, 64, ["1,000 rows of fp32 at dim 10000", "--memory-mb"])
    assert not list(tmp_path.glob("runs/*"))
