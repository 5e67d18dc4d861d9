"""What the disk says of results that cannot be written, in words."""

import pytest

from lowprec.core.errors import ResultsError
from lowprec.results import ResultsStore

ON_A_FULL_DISK = (
    "Failed to parse parquet: External: Generic LocalFileSystem error: Unable to copy data to file: No space left on "
    "device (os error 28)",
    "Generic LocalFileSystem error\n  \x1b[31m↳\x1b[0m Unable to copy data to file\n   \x1b[31m↳\x1b[0m No space left "
    "on device (os error 28)\n",
    "Generic LocalFileSystem error\n ↳ Disk quota exceeded (os error 122)",
)


@pytest.mark.parametrize("said", ON_A_FULL_DISK)
def test_a_full_disk_is_said_in_words(said, row, tmp_path, monkeypatch):
    """As Delta says it of a data file and of a commit, on a file system without room (a tmpfs of 300 KB)."""

    def fails(*_args, **_kwargs):
        raise OSError(said)

    monkeypatch.setattr("lowprec.results.store.write_deltalake", fails)
    with pytest.raises(ResultsError) as raised:
        ResultsStore(tmp_path).append("trials", [row("trials", "k")])
    place = f"results table trials ({tmp_path}/trials): cannot be written: "
    assert str(raised.value) == f"{place}no space is left there; make room, or choose another results.root"


def test_other_reasons_stay_with_all_their_causes(row, tmp_path, monkeypatch):
    def fails(*_args, **_kwargs):
        raise OSError("Generic LocalFileSystem error\n  \x1b[31m↳\x1b[0m Permission denied (os error 13)\n0: frame\n")

    monkeypatch.setattr("lowprec.results.store.write_deltalake", fails)
    with pytest.raises(
        ResultsError, match=r"error: Permission denied \(os error 13\); check results.root and its perm"
    ):
        ResultsStore(tmp_path).append("trials", [row("trials", "k")])
