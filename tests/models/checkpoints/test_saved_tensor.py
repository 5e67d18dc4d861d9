"""Rows of a tensor are found in what `torch.save` wrote of it, or it is said that they do not lie there."""

import zipfile

import pytest
import torch

from lowprec.models.checkpoints.saved_tensor import find_tensor
from lowprec.storage import Location

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]


@pytest.fixture
def saved(tmp_path):
    """A file with other bytes before and after what `torch.save` writes; returns where that begins and ends."""
    path = tmp_path / "chunks"

    def save(content):
        with path.open("wb") as file:
            file.write(b"before")
            torch.save(content, file)
            stop = file.tell()
            file.write(b"after")
        return Location.of(path), 6, stop

    return save


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_the_tensor(saved, dtype):
    whole = torch.randint(0, 2, (1000, 7)).to(dtype)
    path, start, stop = saved(whole)
    with path.open() as file:
        found = find_tensor(file, start, stop)
        assert (found.shape, found.dtype) == ((1000, 7), dtype)
        for first, end in ((0, 1000), (0, 0), (13, 14), (990, 1000)):
            assert torch.equal(found.rows(file, first, end), whole[first:end])


def test_values_are_not_read_to_find_them(saved, monkeypatch):
    path, start, stop = saved(torch.zeros(1 << 20, 4))
    with path.open() as file:
        read, original = [], file._read_at
        monkeypatch.setattr(file, "_read_at", lambda size, offset: read.append(size) or original(size, offset))
        find_tensor(file, start, stop)
        assert sum(read) < 1 << 18 < stop


@pytest.mark.parametrize(
    "content",
    [
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(12.0).reshape(3, 4)[1:],
        torch.arange(3.0).expand(2, 3),
        torch.zeros(2, 2, dtype=torch.float8_e4m3fn),
        torch.nn.Parameter(torch.zeros(2, 2)),
        {"t": torch.zeros(2, 2)},
        [1, 2],
    ],
)
def test_what_is_not_stored_row_by_row_is_said(saved, content):
    path, start, stop = saved(content)
    with path.open() as file:
        assert find_tensor(file, start, stop) is None


def test_other_bytes(tmp_path):
    (tmp_path / "file").write_bytes(bytes(5000))
    with Location.of(tmp_path / "file").open() as file, pytest.raises(zipfile.BadZipFile):
        find_tensor(file, 0, 5000)
