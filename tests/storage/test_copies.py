"""Copies of remote files: made once for a machine, whole, of the version that was asked for."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest

from lowprec.core.errors import StorageError
from lowprec.storage import Location, local_copy
from lowprec.storage.copies import existing_copy
from lowprec.storage.scratch import scratch_folder


def write(location, content):
    with location.whole_file() as partial:
        partial.write_bytes(content)


@pytest.fixture
def file(bucket):
    location = Location.of(f"{bucket}/models/model.bin")
    write(location, b"weights")
    return location


def downloads(s3):
    return sum(method == "GET" and path.endswith("model.bin") for method, path, _ in s3.requests)


def files_in(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file() and path.name != "lock"]


def test_a_local_file_is_its_own_copy(tmp_path):
    assert local_copy(Location.of(tmp_path / "x")) == tmp_path / "x"


def test_it_is_downloaded_once(file, s3):
    copy = local_copy(file)
    assert copy.name == "model.bin" and copy.read_bytes() == b"weights"
    assert copy.is_relative_to(os.environ["LOWPREC_SCRATCH"])
    assert local_copy(file) == copy and downloads(s3) == 1
    assert existing_copy(file, file.state()) == Location.of(copy)


def test_a_new_version_takes_the_place_of_the_old_one(file):
    old, before = local_copy(file), file.state()
    write(file, b"sthgiew")  # of the same size
    assert existing_copy(file, file.state()) == file
    new = local_copy(file)
    assert new.read_bytes() == b"sthgiew" and files_in(scratch_folder()) == [new] and not old.exists()
    with pytest.raises(StorageError, match="it was changed while it was read; start again"):
        local_copy(file, before)


PROCESS = """
import sys
from lowprec.storage import Location, local_copy
print("ready", flush=True)
sys.stdin.readline()
print(local_copy(Location.of(sys.argv[1])).read_bytes().decode())
"""


def test_processes_that_want_it_at_once_share_one_download(file, s3):
    command = [sys.executable, "-c", PROCESS, str(file)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[0] for process in processes] == ["weights\n"] * 3
    assert downloads(s3) == 1


def test_what_a_killed_download_left_is_no_copy(file):
    """A process that is killed leaves a partial file behind; the next one clears it away."""
    copy = local_copy(file)
    partial = copy.with_name(f"{copy.name}.1.partial")
    copy.rename(partial)
    partial.write_bytes(b"wei")
    assert local_copy(file).read_bytes() == b"weights"
    assert files_in(scratch_folder()) == [copy]


def test_a_file_that_changes_meanwhile_is_not_kept(file, monkeypatch):
    monkeypatch.setattr("lowprec.storage.copies.check_room", lambda *_: write(file, b"another"))
    with pytest.raises(StorageError, match="it was changed while it was copied; start again"):
        local_copy(file)
    assert files_in(scratch_folder()) == []


def test_a_full_disk_is_told_before_and_during_the_copy(file, monkeypatch):
    said = rf"scratch folder {os.environ['LOWPREC_SCRATCH']}.*: has no room for {file} of .* GB .*; make room, or set "
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(6))
        with pytest.raises(StorageError, match=f"{said}LOWPREC_SCRATCH to"):
            local_copy(file)

    def full(self, start, stop):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lowprec.storage.location.OpenFile._piece", full)
        with pytest.raises(StorageError, match=f"{said}LOWPREC_SCRATCH to"):
            local_copy(file)
    assert files_in(scratch_folder()) == [] and local_copy(file).read_bytes() == b"weights"


def test_a_full_disk_while_an_upload_is_prepared(file):
    with pytest.raises(StorageError, match=r"has no room for model.bin .* set LOWPREC_SCRATCH"), file.whole_file():
        raise OSError(28, "No space left on device")
    assert file.read_bytes() == b"weights" and files_in(scratch_folder()) == []


def test_where_the_scratch_folder_is(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWPREC_SCRATCH", str(tmp_path / "a" / "b"))
    assert scratch_folder() == tmp_path / "a" / "b" and scratch_folder().is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOWPREC_SCRATCH", str(tmp_path / "file" / "x"))
    with pytest.raises(StorageError, match=r"file/x: cannot be made: Not a directory; set LOWPREC_SCRATCH"):
        scratch_folder()
    monkeypatch.delenv("LOWPREC_SCRATCH")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert scratch_folder() == tmp_path / f"lowprec-{os.getuid()}"
    assert scratch_folder().stat().st_mode & 0o777 == 0o700


def test_a_folder_that_somebody_else_made_is_refused(monkeypatch, tmp_path):
    """In a temporary folder that all users share, its owner could change what is read from it."""
    monkeypatch.delenv("LOWPREC_SCRATCH", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(StorageError, match=r"lowprec-4711: belongs to another user; set LOWPREC_SCRATCH"):
        scratch_folder()
