"""Row ranges and whole checkpoints are mapped, not copied into memory."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

MEASURE = """
import sys, torch
from torch import nn
from lowprec.models.checkpoints.checkpoint import load_checkpoint, read_rows
from lowprec.models.factory import without_table_init

def resident():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))

path, rows = sys.argv[1], int(sys.argv[2])
read_rows(path, "weight", 0, 10)
before = resident()
assert read_rows(path, "weight", rows - 10, rows)[9, 0] == rows - 1
after_rows = resident()
with without_table_init():
    bag = nn.EmbeddingBag(rows, 64)
load_checkpoint(bag, path)
after_load = resident()
assert bag.weight[rows - 1, 0] == rows - 1
bag.weight.sum()
print(after_rows - before, after_load - before, resident() - before)
"""


@pytest.mark.parametrize(("name", "save"), [("t.safetensors", save_file), ("t.pt", torch.save)])
def test_rows_and_loading_commit_no_memory(name, save, tmp_path):
    rows = 1 << 20
    weight = torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, 64).contiguous()
    path = tmp_path / name
    save({"weight": weight}, path)
    arguments = [sys.executable, "-c", MEASURE, str(path), str(rows)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=120)
    by_rows, by_load, by_use = map(int, done.stdout.split())
    assert by_rows < 8 << 20
    assert by_load < 16 << 20
    # The measurement itself: using the table brings its 256 MB in.
    assert by_use > weight.nbytes
