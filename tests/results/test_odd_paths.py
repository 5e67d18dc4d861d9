"""Results in folders with unusual names: there they work, or one sentence says that they cannot."""

import os
import re

import pytest

import lowprec
from lowprec.core.errors import ResultsError
from lowprec.results import ResultsStore

WORK = ["R&D données (v2)", "run #1", "50% off", "a?b", "a*b", 'quote\'d "x"', "s3:bucket", "~x", " a;b=c, d@e!$", "é"]
REFUSED = ["50%25", "%41", "a[1]", "a{b}", "a|b", "a^b", "back\\slash", "new\nline", "bell\x07", "a`b"]


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("is_relative", [True, False])
def test_results_there_are_kept_and_found(name, is_relative, row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    root = f"{name}/runs" if is_relative else str(tmp_path / name / "runs")
    store = ResultsStore(root)
    store.append("runs", [row("runs", "a/0", run_id="a", version=0)])
    store.append("runs", [row("runs", "b/0", run_id="b", version=0)])
    assert store.read("runs", run_id="b").num_rows == 1
    assert sorted(lowprec.query("SELECT run_id FROM runs", root)["run_id"]) == ["a", "b"]
    assert os.listdir(tmp_path) == [name] and os.listdir(tmp_path / name) == ["runs"]
    assert lowprec.query("SELECT run_id FROM runs", f"file://{tmp_path}/{name}/runs".replace("%", "%25")).size == 2


@pytest.mark.parametrize("name", REFUSED)
def test_roots_that_would_be_taken_for_others_are_refused(name, row, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    for folder, root in ((tmp_path, f"{name}/runs"), (tmp_path, str(tmp_path / name / "runs")), (tmp_path / name, "r")):
        monkeypatch.chdir(folder)
        for use in (
            lambda r: ResultsStore(r).append("runs", [row("runs", "a/0")]),
            lambda r: lowprec.query("SELECT 1", r),
        ):
            with pytest.raises(
                ResultsError, match="(?s)results root .*: Delta's client cannot use a path with"
            ) as raised:
                use(root)
            assert "choose another path" in str(raised.value)
    assert list(tmp_path.rglob("_delta_log")) == []


def test_a_link_to_an_odd_folder_is_refused_as_well(tmp_path):
    (tmp_path / "a[1]").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a[1]")
    with pytest.raises(ResultsError, match=re.escape("with '[' and ']' in it")):
        ResultsStore(tmp_path / "link" / "runs")


def test_everything_that_has_to_change_in_a_root_is_named_at_once(tmp_path):
    with pytest.raises(ResultsError, match=re.escape("with '%41' and '[' and ']' in it")):
        ResultsStore(tmp_path / "%41[1][2]" / "runs")


@pytest.mark.parametrize("name", ["R&D données (v2)", "50%25", "a*b", "s3:bucket", "a%20b"])
def test_results_on_an_object_store_are_kept_and_found(name, row, bucket):
    root = f"{bucket}/{name}/runs"
    ResultsStore(root).append("runs", [row("runs", "a/0", run_id="a", version=0)])
    assert lowprec.query("SELECT run_id FROM runs", root)["run_id"].tolist() == ["a"]


@pytest.mark.parametrize("name", ["run #1", "a?b", "a[1]", "50%2525"])
def test_urls_that_would_be_taken_for_others_are_refused(name, bucket):
    with pytest.raises(ResultsError, match="results root"):
        ResultsStore(f"{bucket}/{name}/runs")
