from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lowprec.traffic import Schema, Window, open_traffic

READ = """
import json, sys
import numpy, pyarrow.compute
from lowprec.traffic import Batch, Schema, SparseFeature, Window, open_traffic

def status(key):
    # Not getrusage: its peak is inherited from the process that started this one.
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) / 1024

before = status("VmRSS")
schema = Schema(
    label="label",
    dense=("d0", "d1"),
    sparse=(SparseFeature("a", "a", 100_000), SparseFeature("l", "l", 1000)),
    time="ts",
)
window = open_traffic(sys.argv[1], schema, batch_size=4096).window(Window(0, None))
num_rows = sum(batch.num_rows for batch in window.batches())
sequential = status("VmHWM") - before
for _, batch in zip(range(5), window.batches_in_random_order(0)):
    pass
print(json.dumps({"num_rows": num_rows, "sequential_mb": sequential, "random_mb": status("VmHWM") - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("group_rows", [1_000_000, 50_000])
def test_ten_million_rows_are_read_in_constant_memory(tmp_path: Path, group_rows: int) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 6, group_rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    lists = pa.ListArray.from_arrays(offsets, pa.array(rng.integers(0, 1000, offsets[-1])))
    group = pa.table(
        {
            "label": rng.integers(0, 2, group_rows).astype(np.int8),
            # Begins before the window: every row group straddles its start, and the time column is read for the index.
            "ts": np.arange(-1, group_rows - 1),
            "d0": rng.random(group_rows, np.float32),
            "d1": rng.random(group_rows),
            "a": rng.integers(0, 100_000, group_rows),
            "l": lists,
        }
    )
    path = tmp_path / "traffic.parquet"
    with pq.ParquetWriter(path, group.schema) as writer:
        for _ in range(10_000_000 // group_rows):
            writer.write_table(group, row_group_size=group_rows)
    result = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    print(measured)
    assert measured["num_rows"] == 10_000_000 - 10_000_000 // group_rows
    # The promise is 500 MB; one row group of a million rows would take 60 MB decoded, all of them 600 MB.
    assert measured["sequential_mb"] < 500 and measured["random_mb"] < 500


def test_what_a_window_decoded_goes_with_it_without_the_garbage_collector(
    columns: Callable[..., dict[str, Any]], write: Callable[..., str], schema: Schema
) -> None:
    window = open_traffic(write(columns(2000), row_group_size=500), schema, batch_size=8).window(Window())
    gc.collect()
    gc.disable()
    try:
        for k in (0, 100, window.num_batches - 1):
            window.batch(k)
        gone = weakref.ref(window)
        del window
        assert gone() is None
    finally:
        gc.enable()
