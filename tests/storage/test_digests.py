"""The SHA-256 of a file on an object store is computed once, and never that of another version."""

import hashlib

import pytest

from lowprec.core.errors import StorageError
from lowprec.storage import Location, file_sha256


def upload(location, content):
    with location.whole_file() as partial:
        partial.write_bytes(content)


def whole_reads(s3):
    return [path for method, path, _ in s3.requests if method == "GET" and path.endswith("/model.bin")]


def test_it_is_computed_once(s3, bucket):
    where = Location.of(bucket) / "model.bin"
    for content in (b"one" * 1000, b"two" * 1000):
        upload(where, content)
        s3.requests.clear()
        assert file_sha256(where, where.state()) == hashlib.sha256(content).hexdigest()
        assert len(whole_reads(s3)) == 1
        assert file_sha256(where, where.state()) == hashlib.sha256(content).hexdigest()
        assert len(whole_reads(s3)) == 1


@pytest.mark.parametrize("is_remote", [True, False])
def test_a_file_that_is_no_longer_as_it_was(s3, bucket, tmp_path, is_remote):
    where = Location.of(bucket if is_remote else tmp_path) / "model.bin"
    upload(where, b"before")
    state = where.state()
    file_sha256(where, state)
    upload(where, b"after!")
    with pytest.raises(StorageError, match="it was changed while it was read; start again"):
        file_sha256(where, state)


def test_what_is_remembered_is_not_believed_when_it_is_broken(s3, bucket, tmp_path):
    where = Location.of(bucket) / "model.bin"
    upload(where, b"content")
    first = file_sha256(where, where.state())
    (kept,) = (tmp_path / "scratch" / "sha256").iterdir()
    kept.write_text(first[:10])
    assert file_sha256(where, where.state()) == first
