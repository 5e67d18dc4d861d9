"""Checkpoints of every kind: round trips, row ranges, identity, and everything that can be wrong with their files."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_formats import (
    every_format,
    model_with,
    state_of,
    write_distributed,
    write_distributed_nested,
    write_folder_without_index,
    write_one,
    write_sharded,
    write_sharded_folder,
)
from safetensors.torch import save_file

from lowprec.core.errors import CheckpointError
from lowprec.models.checkpoints.checkpoint import checkpoint_sha256, load_checkpoint, read_rows, save_checkpoint
from lowprec.storage import Location


@every_format
def test_round_trip(write, tmp_path):
    saved, model = model_with(1), model_with(2)
    loaded = load_checkpoint(model, write(state_of(saved), tmp_path))
    assert loaded.num_tensors == 6
    assert loaded.cast == {}
    for name, tensor in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_path_that_is_not_there_says_where_it_was_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, said in (
        ("runs/m.pt", f"file or folder (looked up from {tmp_path}); train"),
        ("/m.pt", "or folder; train"),
    ):
        with pytest.raises(CheckpointError) as raised:
            load_checkpoint(model_with(1), path)
        assert f"checkpoint {path}: no such" in str(raised.value) and said in str(raised.value)


@every_format
def test_row_ranges_equal_slices(write, tmp_path):
    saved = model_with(1)
    path = write(state_of(saved), tmp_path)
    weight = saved.tables["c3"].weight.detach().numpy()
    for start, stop in ((0, 100), (0, 0), (13, 14), (40, 100), (100, 100)):
        rows = read_rows(path, "tables.c3.weight", start, stop)
        assert rows.dtype == np.float32
        assert rows.flags.c_contiguous and rows.flags.owndata and rows.flags.writeable
        np.testing.assert_array_equal(rows, weight[start:stop])


@every_format
def test_bad_row_ranges_are_refused(write, tmp_path):
    path = write(state_of(model_with(1)), tmp_path)
    with pytest.raises(CheckpointError, match='has no tensor "tables.zz.weight"; it has "'):
        read_rows(path, "tables.zz.weight", 0, 1)
    for start, stop in ((0, 101), (-1, 4), (5, 4)):
        with pytest.raises(CheckpointError, match='"tables.c3.weight" is 100 x 16; asked for rows'):
            read_rows(path, "tables.c3.weight", start, stop)
    with pytest.raises(CheckpointError, match='"steps" is a scalar'):
        read_rows(path, "steps", 0, 1)


@every_format
def test_the_identity_follows_the_content_not_the_place(write, tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
    here = write(state_of(model_with(1)), folders[0])
    there = folders[1] / here.relative_to(folders[0])
    if write not in (write_distributed, write_distributed_nested):  # these hold a random id of the save
        write(state_of(model_with(1)), folders[1])
        assert checkpoint_sha256(here) == checkpoint_sha256(there)
    assert checkpoint_sha256(here) == checkpoint_sha256(here)
    assert checkpoint_sha256(here) != checkpoint_sha256(write(state_of(model_with(2)), folders[2]))


def test_the_identity_of_one_file_is_its_sha256(tmp_path):
    path = write_one(state_of(model_with(1)), tmp_path)
    assert checkpoint_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_identity_of_shards_is_that_of_names_and_hashes(tmp_path):
    path = write_sharded(state_of(model_with(1)), tmp_path)
    files = sorted(tmp_path.iterdir())
    lines = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files]
    expected = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    assert checkpoint_sha256(path) == checkpoint_sha256(tmp_path) == expected
    # A file that the index does not name belongs to somebody else.
    (tmp_path / "README.md").write_text("hello")
    assert checkpoint_sha256(tmp_path) == expected


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "model.safetensors"
    save_checkpoint(model_with(1), path, {"config": "{}"})
    before = path.read_bytes()
    load_checkpoint(model_with(2), path)

    def fail(tensors, filename, metadata):
        Path(filename).write_bytes(b"half a ch")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowprec.models.checkpoints.checkpoint.save_file", fail)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        save_checkpoint(model_with(3), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


def test_save_same_bytes_for_the_same_model(tmp_path):
    for name in "ab":
        save_checkpoint(model_with(1), tmp_path / f"{name}.safetensors", {"x": "1", "y": "2", "z": "3"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_save_refuses_other_names_and_places(tmp_path):
    with pytest.raises(CheckpointError, match=r"ends in \.safetensors"):
        save_checkpoint(model_with(1), tmp_path / "model.pt")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(model_with(1), tmp_path / "file" / "model.safetensors")


@every_format
def test_truncated(write, tmp_path):
    path = write(state_of(model_with(1)), tmp_path)
    victim = max((file for file in tmp_path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(model_with(2), path)
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "m.safetensors.index.json", "m.bin", "nothing.pt"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 100, b"{}"])
def test_files_that_are_no_checkpoints(name, content, tmp_path):
    path = tmp_path / name
    if name != "nothing.pt":
        path.write_bytes(content)
    for use in (lambda: load_checkpoint(model_with(1), path), lambda: read_rows(path, "x", 0, 1)):
        with pytest.raises(CheckpointError) as raised:
            use()
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)
    with pytest.raises(CheckpointError):
        checkpoint_sha256(path)


@pytest.mark.parametrize("write", [write_sharded, write_sharded_folder, write_distributed])
def test_a_missing_shard_is_named(write, tmp_path):
    path = write(state_of(model_with(1)), tmp_path)
    shard = next(tmp_path.rglob("model-2.safetensors"), None) or next(tmp_path.rglob("*.distcp"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name} is missing"):
        load_checkpoint(model_with(2), path)


def test_an_index_that_does_not_match_its_shard(tmp_path):
    path = write_sharded(state_of(model_with(1)), tmp_path)
    index = json.loads(path.read_text())
    index["weight_map"]["invented"] = "model-1.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match='the index says that it holds "invented", but .*; copy or save it whole'):
        load_checkpoint(model_with(2), path)


def test_a_tensor_in_two_files_without_an_index(tmp_path):
    folder = write_folder_without_index(state_of(model_with(1)), tmp_path)
    save_file({"top.bias": torch.zeros(1)}, folder / "again.safetensors")
    with pytest.raises(CheckpointError, match='"top.bias" is in both'):
        load_checkpoint(model_with(2), folder)


def test_an_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match="a folder needs safetensors files"):
        load_checkpoint(model_with(2), tmp_path)


class Evil:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickled_code_is_refused_and_not_run(tmp_path):
    trace = tmp_path / "trace"
    torch.save({"w": torch.zeros(2), "x": Evil(trace)}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="holds Python objects, which are not run"):
        load_checkpoint(model_with(1), tmp_path / "evil.pt")
    torch.save(model_with(1), tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match=r"save model.state_dict\(\) instead"):
        load_checkpoint(model_with(1), tmp_path / "whole.pt")
    folder = write_distributed(state_of(model_with(1)), tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(trace)))
    with pytest.raises(CheckpointError, match="it refers to"):
        load_checkpoint(model_with(1), folder)
    assert not trace.exists()


def test_members_of_enums_as_some_pythons_pickle_them(tmp_path, monkeypatch):
    """Python 3.11.2 writes `getattr(cls, name)`, which must give nothing but members of enums."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, TensorProperties

    folder = write_distributed(state_of(model_with(1)), tmp_path)
    document = pickle.loads((folder / ".metadata").read_bytes())
    monkeypatch.setattr(
        _MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self.name)), raising=False
    )
    content = pickle.dumps(document)
    assert b"getattr" in content
    (folder / ".metadata").write_bytes(content)
    model = model_with(2)
    load_checkpoint(model, folder)
    assert torch.equal(model.tables["c3"].weight, model_with(1).tables["c3"].weight)
    for kind, name in ((_MEM_FORMAT_ENCODING, "__class__"), (TensorProperties, "__init__")):
        (folder / ".metadata").write_bytes(pickle.dumps(Attribute(kind, name)))
        with pytest.raises(CheckpointError, match="it refers to an attribute of"):
            load_checkpoint(model, folder)


class Attribute:
    """Pickled as an attribute of something."""

    def __init__(self, kind, name):
        self.of = kind, name

    def __reduce__(self):
        return getattr, self.of


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"w": "text"}, torch.zeros(2), {"state_dict": {"epoch": 3}}])
def test_a_torch_file_without_a_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="must hold a state dict"):
        load_checkpoint(model_with(1), tmp_path / "odd.pt")


def test_distributed_chunks_are_put_together(tmp_path, monkeypatch):
    """A tensor stored in chunks by rows and by columns, as several ranks write it."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    from lowprec.models.checkpoints.distributed_folder import DistributedFolder

    whole = torch.arange(60.0).reshape(10, 6)
    pieces = {f"{r}.{c}": whole[r : r + 5, c : c + 3].clone() for r in (0, 5) for c in (0, 3)}
    folder = Location.of(write_distributed({"t": whole, **pieces}, tmp_path))
    source = DistributedFolder(folder, (), (), is_copied=False)
    entry, stored = source._entries["t"], source._metadata.storage_data
    entry.chunks = [
        ChunkStorageMetadata(torch.Size((r, c)), torch.Size((5, 3))) for r, c in ((0, 0), (0, 3), (5, 0), (5, 3))
    ]
    for chunk in entry.chunks:
        piece = "{}.{}".format(*chunk.offsets)
        stored[MetadataIndex("t", chunk.offsets)] = stored[MetadataIndex(piece, torch.Size((0, 0)))]
    assert torch.equal(source.tensor("t"), whole)
    for start, stop in ((0, 10), (3, 7), (6, 9), (4, 4)):
        assert torch.equal(source.rows("t", start, stop), whole[start:stop])
