"""A table of a checkpoint becomes a file of stored rows, whole or not at all, in bounded memory."""

import hashlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from numpy.typing import NDArray
from safetensors.torch import save_file

from lowprec import ops
from lowprec.core.errors import CheckpointError, ExportError, PlanError, WeightError
from lowprec.export import write_table
from lowprec.plan import TABLE_PRECISIONS, Precision, RowRange

Floats = NDArray[np.float32]
NAME = "tables.user.weight"
MSE = RowRange.MSE


def some_rows(num_rows: int = 1000, dim: int = 11) -> Floats:
    return np.random.default_rng(0).standard_normal((num_rows, dim), dtype=np.float32)


def save_distributed(state: dict[str, torch.Tensor], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it saves in one process
        dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


@pytest.fixture(params=["safetensors", "pt", "distributed", "bf16"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Floats]:
    rows = torch.from_numpy(some_rows())
    state = {NAME: rows, "over.weight": torch.ones(4, 4), "bias": torch.ones(3)}
    if request.param == "distributed":
        path = save_distributed(state, tmp_path)
    elif request.param == "pt":
        path = tmp_path / "model.pt"
        torch.save(state, path)
    else:
        if request.param == "bf16":
            state[NAME] = rows.to(torch.bfloat16)
        path = tmp_path / "model.safetensors"
        save_file(state, path)
    return path, state[NAME].to(torch.float32).numpy()


@pytest.mark.parametrize("row_range", RowRange)
@pytest.mark.parametrize("precision", TABLE_PRECISIONS)
def test_a_file_holds_the_stored_rows(
    checkpoint: tuple[Path, Floats], tmp_path: Path, precision: Precision, row_range: RowRange
) -> None:
    path, rows = checkpoint
    out = tmp_path / "deep" / "user.rows"
    written = write_table(path, NAME, out, precision, row_range=row_range, block_bytes=11 * 4 * 64, num_threads=2)
    content = out.read_bytes()
    assert content == ops.quantize(rows, precision, row_range=row_range).tobytes()
    assert written.sha256 == hashlib.sha256(content).hexdigest()
    assert (written.num_rows, written.dim) == rows.shape
    assert written.row_bytes * written.num_rows == len(content)
    assert [p.name for p in out.parent.iterdir()] == ["user.rows"]


@pytest.mark.parametrize(("is_transposed", "num_loads"), [(False, 0), (True, 1)])
def test_a_chunk_of_a_distributed_checkpoint_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_transposed: bool, num_loads: int
) -> None:
    """Block by block, by its bytes, or where they are in another order whole."""
    rows = some_rows()
    stored = torch.from_numpy(np.ascontiguousarray(rows.T)).T if is_transposed else torch.from_numpy(rows)
    path = save_distributed({NAME: stored}, tmp_path)
    loads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: loads.append(args) or load(*args, **kwargs))
    write_table(path, NAME, tmp_path / "out", Precision.INT8, row_range=MSE, block_bytes=4096)
    assert len(loads) == num_loads
    assert (tmp_path / "out").read_bytes() == ops.quantize(rows, Precision.INT8, row_range=MSE).tobytes()


def test_a_bad_row_is_named_and_leaves_the_old_file(tmp_path: Path) -> None:
    rows = some_rows()
    rows[777, 3] = np.nan
    save_file({NAME: torch.from_numpy(rows)}, tmp_path / "m.safetensors")
    out = tmp_path / "out"
    out.write_bytes(b"old")
    with pytest.raises(WeightError, match=f'"{NAME}": row 777 holds nan in column 3'):
        write_table(tmp_path / "m.safetensors", NAME, out, Precision.INT4, row_range=MSE, block_bytes=4096)
    assert out.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("precision", [p for p in TABLE_PRECISIONS if p is not Precision.FP32])
def test_a_row_beyond_fp16_is_named(tmp_path: Path, precision: Precision) -> None:
    rows = some_rows()
    rows[500] = 1e8
    save_file({NAME: torch.from_numpy(rows)}, tmp_path / "m.safetensors")
    with pytest.raises(WeightError, match=f'"{NAME}": row 500 spans 1e\\+08 to 1e\\+08, which {precision} cannot hold'):
        write_table(tmp_path / "m.safetensors", NAME, tmp_path / "out", precision, row_range=MSE, block_bytes=4096)
    assert not (tmp_path / "out").exists()


def test_what_is_no_table_is_refused(checkpoint: tuple[Path, Floats], tmp_path: Path) -> None:
    path, _ = checkpoint
    with pytest.raises(CheckpointError, match='no table "item"; it has .*"over.weight"'):
        write_table(path, "item", tmp_path / "out", Precision.INT8, row_range=MSE)
    with pytest.raises(CheckpointError, match='no table "table:user"; it has "tables.user.weight"$'):
        write_table(path, "table:user", tmp_path / "out", Precision.INT8, row_range=MSE)
    with pytest.raises(CheckpointError, match=r'"bias" is \[3\]; a table is'):
        write_table(path, "bias", tmp_path / "out", Precision.INT8, row_range=MSE)


def test_a_place_that_cannot_be_written_is_said(checkpoint: tuple[Path, Floats], tmp_path: Path) -> None:
    path, _ = checkpoint
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        write_table(path, NAME, tmp_path / "file" / "out", Precision.INT8, row_range=MSE)


def test_what_is_no_new_file_is_not_written_to(checkpoint: tuple[Path, Floats], tmp_path: Path) -> None:
    path, _ = checkpoint
    file = path if path.is_file() else next(path.glob("*.distcp"))
    content = file.read_bytes()
    with pytest.raises(ExportError, match="is a file of the checkpoint"):
        write_table(path, NAME, file, Precision.INT8, row_range=MSE)
    assert file.read_bytes() == content
    (tmp_path / "folder").mkdir()
    with pytest.raises(ExportError, match="is there already and is not a file"):
        write_table(path, NAME, tmp_path / "folder", Precision.INT8, row_range=MSE)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ExportError, match="is there already and is not a file"):
        write_table(path, NAME, tmp_path / "pipe", Precision.INT8, row_range=MSE)
    assert (tmp_path / "pipe").is_fifo()


def test_precisions_and_ranges_may_be_text(checkpoint: tuple[Path, Floats], tmp_path: Path) -> None:
    path, rows = checkpoint
    write_table(path, NAME, tmp_path / "out", "int4", row_range="mse")
    assert (tmp_path / "out").read_bytes() == ops.quantize(rows, Precision.INT4, row_range=MSE).tobytes()
    for wrong, said in (({"precision": "int3"}, "precision must be"), ({"row_range": "foo"}, "range must be")):
        with pytest.raises(PlanError, match=said):
            write_table(path, NAME, tmp_path / "out", **{"precision": "int4", "row_range": "mse", **wrong})


MEASURED = """
import sys, threading
from pathlib import Path
from lowprec.export import write_table
from lowprec.plan import Precision, RowRange

def own_memory():  # of this process alone: pages of the mapped file can be dropped at any time
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024

checkpoint, out = map(Path, sys.argv[1:])
write_table(checkpoint, "small", out, Precision.INT4, row_range=RowRange.MSE)
before, most, done = own_memory(), [0], threading.Event()

def watch():
    while not done.wait(0.002):
        most[0] = max(most[0], own_memory())

watcher = threading.Thread(target=watch)
watcher.start()
write_table(checkpoint, "large", out, Precision.INT4, row_range=RowRange.MINMAX)
done.set()
watcher.join()
print(most[0] - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_memory_does_not_grow_with_the_table(tmp_path: Path, suffix: str) -> None:
    table = torch.full((2**21, 64), 0.5)  # 512 MiB
    path = tmp_path / f"m.{suffix}"
    state = {"large": table, "small": torch.ones(2**17, 64)}
    if suffix == "pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    del table, state
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 * 2**20
