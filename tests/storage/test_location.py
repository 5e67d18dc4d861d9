"""One suite for paths and URLs: what is written is read back, whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from lowprec.core.errors import ConfigError, StorageError
from lowprec.storage import Location
from lowprec.storage import location as location_module


@pytest.fixture(params=["folder", "file-url", "s3"])
def root(request, tmp_path):
    if request.param == "s3":
        return Location.of(request.getfixturevalue("bucket") + "/some/prefix/")
    folder = tmp_path / "a root"
    return Location.of(folder if request.param == "folder" else folder.as_uri())


def write(location, content):
    with location.whole_file() as partial:
        partial.write_bytes(content)


def test_what_is_written_is_there(root):
    file = root / "runs" / "plan.json"
    assert (file.kind(), root.kind(), root.names()) == (None, None, [])
    write(file, b"first")
    write(file, b"second")
    assert file.read_bytes() == b"second"
    assert (file.kind(), file.parent.kind(), root.names()) == ("file", "folder", ["runs"])
    assert file.parent.names() == ["plan.json"] and file.name == "plan.json"
    assert Location.of(str(file)) == file and str(file).endswith("/runs/plan.json")
    assert root.missing(["runs/plan.json", "runs/other", "top"]) == ["runs/other", "top"]


def test_any_name_that_a_folder_gives_is_found_again(root):
    names = sorted(("part%201.safetensors", "100%", "a b", "c0=x?y#z", "é"))
    for name in names:
        write(root / f"folder {name}/{name}", name.encode())
    assert root.names() == [f"folder {name}" for name in names]
    for name in names:
        (file,) = [root / f"folder {name}" / inside for inside in (root / f"folder {name}").names()]
        assert (file.name, file.kind(), file.parent.kind()) == (name, "file", "folder")
        assert file.read_bytes() == name.encode() and Location.of(str(file)) == file
    assert root.missing(["folder 100%/100%", "folder a b/a%20b"]) == ["folder a b/a%20b"]


def test_a_block_that_fails_leaves_what_was_there(root):
    file = root / "profile.npz"
    for before in (None, b"before"):
        if before is not None:
            write(file, before)
        with pytest.raises(KeyboardInterrupt), file.whole_file() as partial:
            partial.write_bytes(b"half a pro")
            raise KeyboardInterrupt
        assert (file.read_bytes() if before else file.kind()) == before
        assert root.names() == (["profile.npz"] if before else [])


def test_pieces_are_the_file(root, monkeypatch):
    monkeypatch.setattr(location_module, "PIECE_BYTES", 7)
    content = os.urandom(100)
    write(root / "x", content)
    with (root / "x").open() as file:
        assert file.state.size == 100
        assert file.read() == content and file.read(3, 3) == b"" and file.read(13, 50) == content[13:50]
        pieces = list(file.pieces(5, 100))
        assert [begin for begin, _ in pieces] == list(range(5, 100, 7))
        assert b"".join(piece for _, piece in pieces) == content[5:]
        with pytest.raises(StorageError, match="it is cut short: bytes 98 to 101 are wanted, it ends at 100"):
            file.read(98, 101)


def test_the_state_tells_a_file_that_was_replaced(root):
    file = root / "x"
    write(file, b"one")
    before = file.state()
    assert file.state() == before
    write(file, b"two")
    assert file.state() != before


def test_a_missing_file(root):
    for use in (lambda: (root / "no").read_bytes(), lambda: (root / "no").state()):
        with pytest.raises(FileNotFoundError) as raised:
            use()
        assert raised.value.errno == errno.ENOENT


def test_a_large_file_goes_up_in_parts_and_comes_down_in_pieces(s3, bucket):
    content = os.urandom(20 << 20)
    file = Location.of(bucket) / "large"
    write(file, content)
    del s3.requests[:]
    assert file.read_bytes() == content
    ranges = [asked for method, _, asked in s3.requests if method == "GET"]
    assert len(ranges) == 3 and "bytes=0-8388607" in ranges


def test_a_url_that_became_a_path_is_refused():
    with pytest.raises(ConfigError, match='"s3:/bucket/x": give a URL as text'):
        Location.of(Path("s3://bucket/x"))


def test_a_tilde_is_the_home_folder_in_a_path_and_a_letter_in_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("~/runs", Path("~/runs"), tmp_path / "runs"):
        assert Location.of(path).local == Location.of(path).absolute().local == tmp_path / "runs"
    assert Location.of("s3://bucket/~/runs").text == "s3://bucket/~/runs"
    assert (Location.of(tmp_path) / "~").local == tmp_path / "~"


def test_relative_paths_become_absolute_and_urls_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Location.of("a/../b").absolute() == Location.of(tmp_path / "b")
    assert str(Location.of("s3://a/b/").absolute()) == "s3://a/b"


def test_a_folder_that_another_process_makes_meanwhile_is_never_a_file(tmp_path, monkeypatch):
    folder = tmp_path / "table"
    look = Path.stat

    def stat(path, **options):
        try:
            return look(path, **options)
        except FileNotFoundError:
            folder.mkdir(exist_ok=True)
            raise

    monkeypatch.setattr(Path, "stat", stat)
    assert Location(str(folder)).kind() is None
    assert Location(str(folder)).kind() == "folder"
