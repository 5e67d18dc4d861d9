"""Which snapshot was live when."""

import re
from datetime import UTC, datetime

import pytest

from lowprec.core.errors import CheckpointError, ConfigError
from lowprec.monitor.snapshots import Snapshots


def seconds(text):
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


@pytest.fixture
def folder(tmp_path):
    for name in ("2026-01-05", "2026-01-07", "2026-02-31", "2026-01-06-old", "latest"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    (tmp_path / "2026-01-08").mkdir()  # its checkpoint is not there yet
    return tmp_path


@pytest.mark.parametrize(
    "time, live", [("2026-01-05", "2026-01-05"), ("2026-01-06T23:00", "2026-01-05"), ("2026-03-01", "2026-01-07")]
)
@pytest.mark.parametrize("unit, ticks", [("s", 1), ("ms", 1000)])
def test_the_latest_snapshot_from_before_is_live(folder, time, live, unit, ticks):
    found = Snapshots(f"{folder}/%Y-%m-%d/model.safetensors", unit).live_at(seconds(time) * ticks)
    assert found == f"{folder}/{live}/model.safetensors"


def test_moments_may_be_in_file_names_and_to_the_second(tmp_path):
    for name in ("model-20260105T0600.pt", "model-20260105T1800.pt", "model-20260105T1800.pt.tmp"):
        (tmp_path / name).touch()
    found = Snapshots(f"{tmp_path}/model-%Y%m%dT%H%M.pt", "s")
    assert found.live_at(seconds("2026-01-05T17:59:59")).endswith("0600.pt")
    assert found.live_at(seconds("2026-01-05T18:00:00")).endswith("1800.pt")
    (tmp_path / f"{seconds('2026-01-06')}").touch()
    assert Snapshots(f"{tmp_path}/%s", "s").live_at(seconds("2026-01-07")).endswith(str(seconds("2026-01-06")))


def test_relative_patterns_are_of_the_current_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert Snapshots("%Y-%m-%d/model.safetensors", "s").live_at(seconds("2026-01-06")) == (
        "2026-01-05/model.safetensors"
    )


def test_patterns_may_be_urls(bucket):
    import pyarrow.fs as pafs

    from lowprec.storage import Location

    with (Location.of(bucket) / "m" / "2026-01-05.pt").whole_file() as partial:
        partial.write_bytes(b"x")
    assert pafs is not None
    assert Snapshots(f"{bucket}/m/%Y-%m-%d.pt", "s").live_at(seconds("2026-01-06")) == f"{bucket}/m/2026-01-05.pt"


def test_a_path_without_fields_is_always_live():
    assert Snapshots("runs/100%%/model.pt", None).live_at(5) == "runs/100%/model.pt"


def test_no_snapshot_from_before_is_an_error_that_says_what_there_is(folder):
    pattern = f"{folder}/%Y-%m-%d/model.safetensors"
    with pytest.raises(CheckpointError, match=r"no snapshot was live at .*the first of 2 is .*2026-01-05"):
        Snapshots(pattern, "s").live_at(seconds("2026-01-04"))
    with pytest.raises(CheckpointError, match="nothing matches the pattern"):
        Snapshots(f"{folder}/%Y%m%d.pt", "s").live_at(seconds("2026-01-04"))


@pytest.mark.parametrize(
    "pattern, unit, message",
    [
        ("%Y-%m/x", "s", "does not name a day"),
        ("%Y-%m-%d/%d", "s", "at most once"),
        ("%Y-%m-%q", "s", "has the fields"),
        ("%Y-%m-%d", None, "no time"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(pattern, unit, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Snapshots(pattern, unit)
