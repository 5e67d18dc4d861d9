"""Checkpoints on an object store: the numbers and the identity of local ones, and no byte more than needed."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

from lowprec.core.errors import CheckpointError
from lowprec.export import write_table
from lowprec.models.checkpoints.checkpoint import (
    checkpoint_sha256,
    load_checkpoint,
    load_dense,
    read_rows,
    save_checkpoint,
)
from lowprec.storage import Location, OpenFile

TABLE = "table.weight"
NUM_ROWS, DIM = 5000, 16


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.EmbeddingBag(NUM_ROWS, DIM)
        self.top = nn.Linear(DIM, 1)
        self.register_buffer("steps", torch.tensor(5))


def state(seed=1):
    return {name: tensor.detach().clone() for name, tensor in Model(seed).state_dict().items()}


def one_file(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    return "model.safetensors"


def sharded(folder, tensors):
    shards = {"model-1.safetensors": [TABLE], "model-2.safetensors": [n for n in tensors if n != TABLE]}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "model.safetensors.index.json"


def sharded_folder(folder, tensors):
    sharded(folder, tensors)
    return ""


def without_index(folder, tensors):
    (folder / sharded(folder, tensors)).unlink()
    return ""


def torch_file(folder, tensors):
    torch.save(tensors, folder / "model.pt")
    return "model.pt"


def distributed(folder, tensors):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it saves in one process
        dcp.save({"model": tensors}, checkpoint_id=folder / "dcp", no_dist=True)
    return "dcp"


FORMATS = [one_file, sharded, sharded_folder, without_index, torch_file, distributed]
every_format = pytest.mark.parametrize("write", FORMATS)


@pytest.fixture
def stored(tmp_path, bucket):
    """Write a checkpoint on this machine and upload it: gives its path and its URL."""

    def store(write, tensors=None):
        folder = tmp_path / "local"
        folder.mkdir(exist_ok=True)
        name = write(folder, tensors or state())
        for file in folder.rglob("*"):
            if file.is_file():
                upload(file.read_bytes(), f"{bucket}/models/{file.relative_to(folder)}")
        return str(folder / name), f"{bucket}/models/{name}".rstrip("/")

    return store


def upload(content, url):
    with Location.of(url).whole_file() as partial:
        partial.write_bytes(content)


def scratch_bytes():
    return sum(file.stat().st_size for file in Path(os.environ["LOWPREC_SCRATCH"]).rglob("*") if file.is_file())


@every_format
def test_it_loads_as_a_local_one_does(write, stored):
    path, url = stored(write)
    here, there = Model(2), Model(3)
    assert load_checkpoint(here, path).num_tensors == load_checkpoint(there, url).num_tensors == 4
    for name, tensor in here.state_dict().items():
        assert torch.equal(tensor, there.state_dict()[name]), name


@every_format
def test_rows_and_the_dense_part_are_read_by_range(write, stored):
    path, url = stored(write)
    for start, stop in ((0, NUM_ROWS), (0, 0), (7, 8), (4000, 5000)):
        np.testing.assert_array_equal(read_rows(url, TABLE, start, stop), read_rows(path, TABLE, start, stop))
    model = Model(2)
    rows = load_dense(model, url)
    assert model.table.weight.is_meta and torch.equal(model.top.weight, state()["top.weight"]) and model.steps == 5
    assert torch.equal(rows.rows(TABLE, 10, 20), state()[TABLE][10:20])
    # What is read by range is no mapped file, which the workers of a machine could share.
    assert rows.is_mapped == (write is torch_file)
    assert (scratch_bytes() == 0) == (write is not torch_file)


@every_format
def test_it_has_the_identity_of_a_local_one(write, stored):
    path, url = stored(write)
    assert checkpoint_sha256(url) == checkpoint_sha256(path)
    load_checkpoint(Model(), url)
    assert checkpoint_sha256(url) == checkpoint_sha256(path)


def bytes_asked(s3):
    """Of all requests for a range; whatever asks without one has asked for everything."""
    ranges = [asked.removeprefix("bytes=").split("-") for method, path, asked in s3.requests if asked]
    return sum(int(last) - int(first) + 1 for first, last in ranges)


def test_rows_cost_their_bytes_and_the_header(stored, s3):
    _, url = stored(one_file)
    del s3.requests[:]
    read_rows(url, TABLE, 4000, 4100)
    assert 100 * DIM * 4 <= bytes_asked(s3) <= 100 * DIM * 4 + (1 << 16)
    assert all(asked for method, path, asked in s3.requests if method == "GET" and path.endswith(".safetensors"))


def test_a_long_header_is_read_to_its_end(stored):
    tensors = {f"{'long' * 50}{k}": torch.full((2, 3), float(k)) for k in range(400)}
    _, url = stored(one_file, tensors)
    assert read_rows(url, f"{'long' * 50}399", 1, 2).tolist() == [[399.0] * 3]


def test_every_dtype_is_read_as_safetensors_reads_it(stored):
    kinds = [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool]
    tensors = {str(kind): torch.arange(12).reshape(4, 3).to(kind) for kind in kinds}
    path, url = stored(one_file, tensors)
    for name in tensors:
        np.testing.assert_array_equal(read_rows(url, name, 1, 4), read_rows(path, name, 1, 4))


def test_a_model_is_downloaded_once_and_hashed_from_its_copy(stored, s3):
    _, url = stored(one_file)
    load_checkpoint(Model(), url)
    del s3.requests[:]
    load_checkpoint(Model(), url)
    checkpoint_sha256(url)
    assert bytes_asked(s3) <= 3 * (1 << 16)  # headers
    assert scratch_bytes() >= NUM_ROWS * DIM * 4


def test_tables_are_written_for_serving_from_a_url(stored, tmp_path):
    path, url = stored(one_file)
    for source, out in ((path, tmp_path / "a"), (url, tmp_path / "b")):
        write_table(source, TABLE, out, "int4", row_range="minmax", block_bytes=1 << 16)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_model_is_saved_to_a_url(bucket):
    save_checkpoint(Model(1), f"{bucket}/a/model.safetensors", {"x": "1"})
    loaded = Model(2)
    load_checkpoint(loaded, f"{bucket}/a/model.safetensors")
    assert torch.equal(loaded.table.weight, state()[TABLE])


def every_way_to_read(url):
    yield lambda: load_checkpoint(Model(), url)
    yield lambda: load_dense(Model(), url)
    yield lambda: checkpoint_sha256(url)
    yield lambda: read_rows(url, TABLE, 0, NUM_ROWS)


@pytest.mark.parametrize("where", ["url", "path"])
@pytest.mark.parametrize("write", [one_file, sharded, sharded_folder, without_index, torch_file])
def test_a_file_cut_short_is_named(write, where, stored, bucket):
    path, url = stored(write)
    largest = max(Path(path).parent.rglob("model*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1000])
    upload(largest.read_bytes(), f"{bucket}/models/{largest.name}")
    for read in every_way_to_read(path if where == "path" else url):
        with pytest.raises(
            CheckpointError, match=r"is cut short: it has .* of .* bytes|is truncated: it ends after .* bytes"
        ) as raised:
            read()
        said = str(raised.value)
        assert "\n" not in said and f"/{largest.name}:" in said and ("s3://" in said) == (where == "url")


@pytest.mark.parametrize("where", ["url", "path"])
@pytest.mark.parametrize("write", [sharded, sharded_folder, distributed])
def test_a_missing_file_is_named(write, where, stored, s3):
    path, url = stored(write)
    victim = next(Path(path).parent.rglob("model-2.safetensors" if write is not distributed else "*.distcp"))
    victim.unlink()
    folder = "dcp/" if write is distributed else ""
    filesystem, inner = Location.of(url)._filesystem()
    filesystem.delete_file(f"{inner.partition('/models')[0]}/models/{folder}{victim.name}")
    for read in every_way_to_read(path if where == "path" else url):
        with pytest.raises(CheckpointError, match=rf"{victim.name} is missing"):
            read()


def test_nothing_there(bucket):
    for url, said in (
        (f"{bucket}/nothing.safetensors", "no such file or folder; train a model, or set model.checkpoint"),
        ("s3://nowhere/model.safetensors", 'cannot be read: there is no bucket "nowhere"'),
        (f"{bucket}/folder", "no such file or folder"),
    ):
        for read in every_way_to_read(url):
            with pytest.raises(CheckpointError, match=f"checkpoint {url}: {said}"):
                read()


@pytest.mark.parametrize("write", [one_file, distributed])
def test_a_checkpoint_that_is_written_anew_while_it_is_read(write, stored):
    """Rows of two checkpoints must not be mixed: neither a worker's nor a process's that reads on."""
    path, url = stored(write)
    rows = {where: load_dense(Model(), where) for where in (path, url)}
    for where, found in rows.items():
        assert torch.equal(found.rows(TABLE, 0, 5), state()[TABLE][:5]), where
    stored(write, {TABLE: torch.zeros(20, DIM)})
    for where, found in rows.items():
        with pytest.raises(CheckpointError, match=rf"checkpoint {where}.*: was changed while it was read; start again"):
            found.rows(TABLE, 4000, 4010)


def test_a_change_between_the_pieces_of_a_range_is_seen(stored, tmp_path, monkeypatch):
    _, url = stored(one_file)
    (tmp_path / "other").mkdir()
    other = (tmp_path / "other" / one_file(tmp_path / "other", state(seed=9))).read_bytes()
    rows = load_dense(Model(), url)
    pieces = []

    def piece(self, start, stop):
        found = original(self, start, stop)
        if not pieces:
            upload(other, url)
        pieces.append((start, stop))
        return found

    original = OpenFile._piece
    monkeypatch.setattr(OpenFile, "_piece", piece)
    monkeypatch.setattr("lowprec.storage.location.PIECE_BYTES", 1 << 16)
    monkeypatch.setattr("lowprec.storage.location.PIECES_IN_FLIGHT", 1)
    with pytest.raises(CheckpointError, match=f"checkpoint {url}: was changed while it was read; start again"):
        rows.rows(TABLE, 0, NUM_ROWS)
    assert len(pieces) == 5
