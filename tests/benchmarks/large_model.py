"""A model with 8 GB of tables and its traffic, written without ever being in memory; and how much memory others use."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from lowprec.config import Config, load_config
from lowprec.models.factory import build_model, without_table_init

GB = 10**9
TABLE_BYTES, DIM = 8 * GB, 128
# Shares of the bytes, from huge to small.
SHARES = (0.4, 0.2, 0.15, 0.1, 0.05, 0.05, 0.03, 0.02)
NUM_EXAMPLES, IDS_PER_FEATURE, BATCH_SIZE = 120_000, 6, 1024


def rows_of_tables() -> list[int]:
    return [int(TABLE_BYTES * share) // (4 * DIM) for share in SHARES]


def write_traffic(path: Path) -> None:
    """Uniform ids, a bag of several for each feature."""
    rng = np.random.default_rng(0)
    columns = {"label": rng.integers(0, 2, NUM_EXAMPLES).astype(np.float32)}
    columns |= {f"d{k}": rng.normal(size=NUM_EXAMPLES).astype(np.float32) for k in range(4)}
    for k, num_rows in enumerate(rows_of_tables()):
        # As many ids for a table as it has a share of the bytes: pages are read alike everywhere.
        length = max(1, round(IDS_PER_FEATURE * len(SHARES) * SHARES[k]))
        ids = rng.integers(0, num_rows, NUM_EXAMPLES * length)
        offsets = pa.array(np.arange(NUM_EXAMPLES + 1) * length, pa.int32())
        columns[f"c{k}"] = pa.ListArray.from_arrays(offsets, pa.array(ids, pa.int64()))
    pq.write_table(pa.table(columns), path, row_group_size=20_000)


def make_config(folder: Path, **evaluation: int) -> Config:
    document = {
        "name": "memory",
        "traffic": {
            "path": str(folder / "traffic.parquet"),
            "dense": [f"d{k}" for k in range(4)],
            "sparse": [{"name": f"c{k}", "num_embeddings": n} for k, n in enumerate(rows_of_tables())],
            "batch_size": BATCH_SIZE,
        },
        "windows": {"search": {"end": NUM_EXAMPLES // 2}, "confirm": {"start": NUM_EXAMPLES // 2}},
        "model": {
            "args": {"embedding_dim": DIM, "bottom": [64, DIM], "top": [128]},
            "checkpoint": str(folder / "model.safetensors"),
        },
        "evaluation": evaluation,
        "results": {"root": str(folder / "runs")},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(document))
    return load_config(path)


def write_model(config: Config) -> None:
    """The checkpoint, streamed: this process never has it in memory."""
    with without_table_init(without_rows=True):
        model = build_model(config.model.factory, config.model.args, config.traffic.schema_of_columns())
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        size = 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = np.random.default_rng(1).normal(0, 0.1, 4_000_037).astype(np.float32)
    with Path(config.model.checkpoint).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in model.state_dict().values():
            if not tensor.is_meta:
                file.write(tensor.numpy().tobytes())
                continue
            left = tensor.numel()
            while left:
                file.write(block[: min(left, len(block))].tobytes())
                left -= min(left, len(block))
        file.flush()
        os.fsync(file.fileno())


def drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Peaks:
    """The largest PSS of some processes, all and what is not of files, looked at again and again."""

    def __init__(self, pids: list[int], every_s: float = 0.5) -> None:
        self._every_s = every_s
        self.found = {name: dict.fromkeys(pids, 0) for name in ("Pss", "Pss_Anon")}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(self._every_s):
            for pid in self.found["Pss"]:
                with contextlib.suppress(OSError):
                    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                        name, _, value = line.partition(":")
                        if name in self.found:
                            self.found[name][pid] = max(self.found[name][pid], 1024 * int(value.split()[0]))
