"""A model with 8 GB of tables to a folder that serves: how fast, and how much memory beside the mapped files.

The checkpoint is written without ever being in memory. A process of its own exports a plan whose tables are fp16, int8,
int4 and int2, a third of them with `mse` ranges: everything that `lowprec export` does, the comparison with the
evaluation and the SHA-256 of the checkpoint included. Beside it, in the same run: one table alone to a file
(`convert_gb_per_s`), by precision and range, and FBGEMM's own kernel from memory to memory on it (`fbgemm_gb_per_s`,
int4 by minmax), which reads and writes no file. Two threads throughout.

Prints one JSON object as its last line: `gb_per_s` of fp32 tables for the whole command, and `peak_extra_gb`, the most
memory that is not of mapped files.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from large_model import DIM, GB, Peaks, drop_from_page_cache, make_config, rows_of_tables, write_model, write_traffic

from lowprec.config import Config
from lowprec.export import write_table
from lowprec.models.checkpoints.checkpoint import checkpoint_sha256, read_rows
from lowprec.ops import quantize
from lowprec.plan import Plan, PlanFile, Precision, RowRange, write_plan
from lowprec.search import open_job

PRECISIONS = (Precision.INT4, Precision.INT8, Precision.INT2, Precision.FP16)
EXPORTER = """
import json, sys
from lowprec.config import load_config
from lowprec.export import export_plan
config, plan, out = sys.argv[1:]
print(json.dumps(export_plan(load_config(config), plan, out).to_dict()))
"""


def plan_of(config: Config, path: Path) -> None:
    """Precisions and ranges take turns."""
    job = open_job(config)
    precisions, ranges = cycle(PRECISIONS), cycle((RowRange.MSE, RowRange.MINMAX, RowRange.MINMAX))
    plan = Plan({unit.name: next(precisions) for unit in job.units})
    write_plan(
        PlanFile(
            plan=plan,
            model=config.model.factory,
            checkpoint_sha256=checkpoint_sha256(config.model.checkpoint),
            size_bytes=job.space.size_bytes(plan),
            row_ranges={unit: next(ranges) for unit, p in plan.items() if p.is_rowwise},
        ),
        path,
    )


def exported(config: Config, folder: Path) -> tuple[dict[str, Any], float, float]:
    """The document of the command, the seconds of its process, and its largest memory without files, in GB."""
    (folder / "config.json").write_text(config.to_json())
    drop_from_page_cache(Path(config.model.checkpoint))
    began = time.monotonic()
    command = [sys.executable, "-c", EXPORTER, *(str(folder / n) for n in ("config.json", "plan.json", "served"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peaks = Peaks([process.pid], every_s=0.05)
        output, _ = process.communicate()
        seconds = time.monotonic() - began
        peaks.close()
    assert process.returncode == 0
    return json.loads(output), seconds, peaks.found["Pss_Anon"][process.pid] / GB


def converted(config: Config, folder: Path) -> dict[str, float]:
    """GB of fp32 a second, of the second largest table, to a file."""
    num_bytes = 4 * DIM * rows_of_tables()[1]
    found = {}
    for precision, row_range in [(p, r) for p in PRECISIONS for r in RowRange if p.is_rowwise or r is RowRange.MINMAX]:
        began = time.monotonic()
        write_table(
            config.model.checkpoint,
            "tables.c1.weight",
            folder / "rows",
            precision,
            row_range=row_range,
            num_threads=2,
        )
        label = f"{precision} {row_range}" if precision.is_rowwise else str(precision)
        found[label] = round(num_bytes / GB / (time.monotonic() - began), 3)
    (folder / "rows").unlink()
    return found


def by_fbgemm(config: Config) -> float:
    """FBGEMM's own kernel on the first 400 MB of that table, from memory to memory; its rows are the same."""
    import fbgemm_gpu  # noqa: F401  (registers the operators)

    rows = torch.from_numpy(read_rows(config.model.checkpoint, "tables.c1.weight", 0, 400_000_000 // (4 * DIM)))
    began = time.monotonic()
    stored = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(rows, 4)
    seconds = time.monotonic() - began
    ours = quantize(rows[:1000].numpy(), Precision.INT4, row_range=RowRange.MINMAX)
    assert (stored[:1000, : DIM // 2].numpy() == ours[:, 4:]).all()
    return rows.numel() * 4 / GB / seconds


def main() -> None:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_config(folder, num_workers=0, threads_per_worker=2)
        write_traffic(folder / "traffic.parquet")
        write_model(config)
        plan_of(config, folder / "plan.json")
        document, seconds, peak = exported(config, folder)
        table_gb = sum(rows_of_tables()) * DIM * 4 / GB
        assert document["parity"]["num_examples"] > 5000 and document["num_tables"] == len(rows_of_tables())
        print(
            json.dumps(
                {
                    "gb_per_s": round(table_gb / seconds, 3),
                    "peak_extra_gb": round(peak, 3),
                    "table_gb": round(table_gb, 3),
                    "exported_gb": round(document["table_bytes"] / GB, 3),
                    "seconds": round(seconds, 1),
                    "convert_gb_per_s": converted(config, folder),
                    "fbgemm_gb_per_s": round(by_fbgemm(config), 3),
                    "num_threads": 2,
                }
            )
        )


if __name__ == "__main__":
    main()
