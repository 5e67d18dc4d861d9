"""Workers and a checkpoint on an object store: rows by range, and never another one than the run began with."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lowprec.core.errors import CheckpointError
from lowprec.evaluation.workers.worker import ShardLoader, load_adapter, load_adapter_without_rows
from lowprec.models.checkpoints.checkpoint import checkpoint_sha256
from lowprec.search.job import open_job
from lowprec.shards.planner import Placement, Shard, TableLoad
from lowprec.storage import Location


def upload(path, url):
    with Location.of(url).whole_file() as partial:
        partial.write_bytes(Path(path).read_bytes())


@pytest.fixture
def url(bucket, small_folder):
    upload(small_folder / "model.safetensors", f"{bucket}/model.safetensors")
    return f"{bucket}/model.safetensors"


def cut_in_two(job):
    tables = tuple(TableLoad(u.name, u.num_rows, u.dim) for u in job.units)
    shards = [Shard(t.name, 0, t.num_rows // 2, 0) for t in tables]
    shards += [Shard(t.name, t.num_rows // 2, t.num_rows, 1) for t in tables]
    return Placement(tables, (10**6,) * 2, (), tuple(sorted(shards)))


def test_a_worker_reads_its_own_rows_and_no_others(small_config, small_folder, url, s3):
    remote = open_job(small_config(f"model.checkpoint={url}", "evaluation.num_workers=2"))
    local = open_job(small_config())
    placement = cut_in_two(local)
    assert remote.checkpoint_sha256 == local.checkpoint_sha256
    s3.requests.clear()
    loader = ShardLoader(remote.spec, placement)
    held = loader.held([1])
    assert not loader.is_mapped and {worker for _, worker in held} == {t.num_rows // 2 for t in placement.tables}
    for (name, first), shard in held.items():
        np.testing.assert_array_equal(shard._rows, local.adapter.weights[name].numpy()[first:])
    asked = [tuple(map(int, r.removeprefix("bytes=").split("-"))) for _, _, r in s3.requests if r]
    size = (small_folder / "model.safetensors").stat().st_size
    assert max(last - first + 1 for first, last in asked) <= max(size // 2, 1 << 16)


def changed(small_folder, tmp_path, *, same_size):
    """Another checkpoint of that model."""
    file = tmp_path / "changed.safetensors"
    content = bytearray((small_folder / "model.safetensors").read_bytes())
    content[-4:] = b"\0\0\0\0"
    file.write_bytes(content)
    if not same_size:
        save_file(load_file(file) | {"more": torch.zeros(1)}, file)
    return file


@pytest.mark.parametrize(("where", "same_size"), [("url", True), ("path", True), ("path", False)])
def test_a_checkpoint_that_was_replaced_is_refused(where, same_size, small_config, small_folder, url, tmp_path):
    """A worker that is restarted hours later must not evaluate what a training has put there meanwhile."""
    path = url
    if where == "path":
        path = str(tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors").write_bytes((small_folder / "model.safetensors").read_bytes())
    job = open_job(small_config(f"model.checkpoint={path}"))
    other = changed(small_folder, tmp_path, same_size=same_size)
    upload(other, path)
    for load in (
        lambda: load_adapter(job.spec),
        lambda: load_adapter_without_rows(job.spec),
        lambda: ShardLoader(job.spec, cut_in_two(job)),
        lambda: checkpoint_sha256(path, stamp=job.spec.checkpoint_stamp),
    ):
        with pytest.raises(CheckpointError, match=f"checkpoint {path}: was replaced by another one since this began"):
            load()
    # The same one again, if only by its content on this machine, will do.
    if where == "path":
        upload(small_folder / "model.safetensors", path)
        load_adapter(job.spec)
