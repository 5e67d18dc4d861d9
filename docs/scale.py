"""What a model of 10 TB with 2,000 tables and 10 billion examples a day needs: computes docs/scale.md.

python docs/scale.py --measure    measure this machine (some minutes), write docs/scale.json, then docs/scale.md
python docs/scale.py              write docs/scale.md from docs/scale.json
python docs/scale.py --check      fail where docs/scale.md is not what comes out
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RATES, PAGE = HERE / "scale.json", HERE / "scale.md"

GB, TB = 10**9, 10**12
NUM_TABLES, TABLE_BYTES, DIM = 2000, 10 * TB, 128
# Sizes fall with a power of the rank, so that the largest table is far larger than a machine; ids of one example.
SIZE_POWER, MULTI_HOT_TABLES, MULTI_HOT_IDS = 0.9, 100, 20
EXAMPLES_A_DAY = 10e9
SEARCH_EXAMPLES, CONFIRM_EXAMPLES = 20e6, 200e6
BATCH_SIZE = 512
# A dense part of 2 x 1024 x 1024 and 3 x 2048 x 1024 weights, beside the interaction.
LAYERS = ((13, 1024), (1024, 1024), (1024, 128), (4096, 2048), (2048, 1024), (1024, 512), (512, 1))
MACHINE = {"memory": 256 * GB, "cores": 32, "network": 25e9 / 8}
# Of 32 threads' worth of what one thread does, what is left when all run: memory bandwidth is shared.
THREAD_EFFICIENCY = 0.6
NUM_PLANS = 48


def spec() -> dict[str, Any]:
    """The tables, as `lowprec search --tables` reads them."""
    weights = [(k + 1) ** -SIZE_POWER for k in range(NUM_TABLES)]
    tables = []
    for k, weight in enumerate(weights):
        rows = max(100, int(TABLE_BYTES * weight / sum(weights)) // (4 * DIM))
        ids = MULTI_HOT_IDS if k % (NUM_TABLES // MULTI_HOT_TABLES) == 0 else 1
        tables.append({"name": f"t{k}", "num_rows": rows, "dim": DIM, "ids": ids})
    dense = 4 * sum(a * b + b for a, b in LAYERS)
    return {"tables": tables, "dense_bytes": dense, "batch_size": BATCH_SIZE, "num_examples": EXAMPLES_A_DAY}


def measure() -> dict[str, Any]:
    """Rates of one thread of this machine: lookups, dense passes, decoding of traffic."""
    from lowprec.core.progress import Silent
    from lowprec.latency.calibration_file import write_calibration
    from lowprec.latency.measure import calibrate
    from lowprec.ops.timing import default_grid

    grid = default_grid(quick=False, dims=(DIM,), memory_limit_bytes=2 << 30)
    calibration = calibrate(grid, seed=0, num_threads=1, progress=Silent())
    with tempfile.TemporaryDirectory() as folder:
        write_calibration(calibration, Path(folder, "calibration.json"))
        document = json.loads(Path(folder, "calibration.json").read_text())
    return {
        "calibration": document,
        "dense_flops": _dense_flops(),
        "decoded_values_per_s": _decoded_values(),
    }


def _dense_flops() -> float:
    """Multiplications and additions a second of one thread in fp32 layers, as they come in the dense part."""
    import torch

    torch.set_num_threads(1)
    layer = torch.nn.Linear(1024, 1024)
    x = torch.randn(BATCH_SIZE, 1024)
    times = []
    with torch.inference_mode():
        for _ in range(30):
            began = time.perf_counter()
            layer(x)
            times.append(time.perf_counter() - began)
    return 2.0 * BATCH_SIZE * 1024 * 1024 / statistics.median(times)


def _decoded_values() -> float:
    """Values a second that one thread reads from Parquet into batches."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lowprec.traffic import Schema, SparseFeature, TrafficReader, open_traffic
    from lowprec.traffic.window import Window

    rng = np.random.default_rng(0)
    num_rows, num_columns = 50_000, 100
    columns = {"label": rng.integers(0, 2, num_rows).astype(np.float32)}
    columns |= {f"c{k}": rng.integers(0, 10**8, num_rows) for k in range(num_columns)}
    sparse = tuple(SparseFeature(name=f"c{k}", column=f"c{k}", num_embeddings=10**8) for k in range(num_columns))
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table(columns), f"{folder}/traffic.parquet")
        reader: TrafficReader = open_traffic(
            f"{folder}/traffic.parquet", Schema(label="label", dense=(), sparse=sparse), batch_size=BATCH_SIZE
        )
        times = []
        for _ in range(3):
            began = time.perf_counter()
            for _ in reader.window(Window(None, None)).batches():
                pass
            times.append(time.perf_counter() - began)
    return num_rows * num_columns / statistics.median(times)


def page(rates: dict[str, Any]) -> str:
    """docs/scale.md."""
    from lowprec.core.errors import ConfigError
    from lowprec.session.placement import Machines, place_spec

    flops = 2 * sum(a * b for a, b in LAYERS)
    with tempfile.TemporaryDirectory() as folder:
        tables, calibration = Path(folder, "tables.json"), Path(folder, "calibration.json")
        tables.write_text(json.dumps(spec()))
        calibration.write_text(json.dumps(rates["calibration"]))
        rows = []
        for num_workers in (48, 64, 96, 128):
            machines = Machines(num_workers, MACHINE["memory"], MACHINE["network"], calibration)
            try:
                rows.append(_row(num_workers, place_spec(tables, machines), rates, flops))
            except ConfigError as error:
                if "do not fit" not in str(error):
                    raise
                rows.append([str(num_workers), "too small", *[""] * 5])
    ids = sum(table["ids"] for table in spec()["tables"])
    return TEMPLATE.format(
        num_tables=f"{NUM_TABLES:,}",
        terabytes=TABLE_BYTES // TB,
        largest=f"{spec()['tables'][0]['num_rows'] * 4 * DIM / TB:.2f}",
        dim=DIM,
        ids=f"{ids:,}",
        dense_mb=round(spec()["dense_bytes"] / 1e6),
        mflops=round(flops / 1e6),
        examples=f"{EXAMPLES_A_DAY / 1e9:g} billion",
        table=_table(
            [
                "machines",
                "fullest machine",
                "network, bytes an example: profile, exact",
                "a day's traffic profiled",
                f"a search: {SEARCH_EXAMPLES / 1e6:g} M examples profiled, {NUM_PLANS} plans on them",
                f"{CONFIRM_EXAMPLES / 1e6:g} M examples confirmed, 3 plans",
                "what is used up first",
            ],
            rows,
        ),
        cpu=rates["calibration"]["machine"]["cpu"],
        gflops=round(rates["dense_flops"] / 1e9),
        decoded=round(rates["decoded_values_per_s"] / 1e6, 1),
        cores=MACHINE["cores"],
        memory=MACHINE["memory"] // GB,
        network=round(MACHINE["network"] * 8 / 1e9),
        hashed=_duration(TABLE_BYTES / MACHINE["network"]),
        efficiency=THREAD_EFFICIENCY,
    )


def _row(num_workers: int, placed: dict[str, Any], rates: dict[str, Any], flops: float) -> list[str]:
    """One line of the table: each of lookups, network, dense passes and decoding overlaps with none of the others."""
    threads = MACHINE["cores"] * THREAD_EFFICIENCY
    seconds = {k: v / EXAMPLES_A_DAY for k, v in placed["time"].items() if k != "num_examples"}  # for one example
    values = sum(table["ids"] for table in spec()["tables"]) + 1

    def took(num_examples: float, *, lookups: float, network: float, passes: float) -> float:
        dense = passes * flops / rates["dense_flops"] / num_workers / threads
        decode = values / rates["decoded_values_per_s"] / num_workers / threads
        return num_examples * (lookups / threads + network + dense + decode)

    profile = {"lookups": seconds["profile_lookup_s"], "network": seconds["profile_network_s"]}
    exact = {"lookups": seconds["exact_lookup_s"], "network": seconds["exact_network_s"]}

    def profiled(num_examples: float) -> float:
        # A pass forward and one back, which costs two.
        return took(num_examples, **profile, passes=3)

    fullest = max(worker["memory"] for worker in placed["workers"])
    network = placed["network"]
    return [
        str(num_workers),
        f"{fullest / GB:.0f} GB",
        f"{network['profile_bytes_per_example'] / 1e6:.2f} MB, {network['exact_bytes_per_example'] / 1e6:.2f} MB",
        _duration(profiled(EXAMPLES_A_DAY)),
        _duration(profiled(SEARCH_EXAMPLES) + took(SEARCH_EXAMPLES, **exact, passes=NUM_PLANS + 1)),
        _duration(took(CONFIRM_EXAMPLES, **exact, passes=4)),
        placed["limits"][0]["says"],
    ]


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TEMPLATE = """# What a huge model needs

Computed by `python docs/scale.py` from the planner and from rates that `python docs/scale.py --measure` measured on one
thread of a machine ({cpu}); both files are beside this page. For tables of your own:

    lowprec search --dry-run --tables FILE --workers 64 --worker-memory {memory}GB --network {network}Gbit

**The model.** {num_tables} tables of {terabytes} TB in fp32, the largest {largest} TB, dim {dim}; an example looks
up {ids} ids. The dense part has {dense_mb} MB and takes {mflops} MFLOP an example. There are {examples} examples a day.

**The machines.** {cores} cores, {memory} GB, {network} Gbit/s; one worker on each that uses all cores. All threads
together are taken for {efficiency:g} of as many single ones, as they share a memory bus. Measured on one thread:
lookups by `lowprec calibrate`, {gflops} GFLOP/s in fp32 layers, {decoded} million values decoded a second. Nothing
is taken to overlap.

{table}

A search needs no whole day. Its window is a sample that it profiles once and then evaluates its plans on, and so is the
confirmation, whose size decides how small a change of accuracy can be proven (`make bench NAME=coverage` says how
intervals behave). A whole day is what a monitor would pay that profiles everything.

Memory decides the number of machines; then every worker asks all others for the rows of its examples, and in an exact
evaluation each pooled vector comes once for every precision. Small and busy tables are held by all workers as long as
memory allows it.

Beside that every byte is read twice more: the driver's machine hashes the checkpoint when a new one is first searched
({hashed} at {network} Gbit/s; what was found is kept), and in the end the workers look through the rows of all tables.
"""


def main() -> int:
    """Measure, compute, check."""
    arguments = sys.argv[1:]
    if arguments == ["--measure"]:
        RATES.write_text(json.dumps(measure(), indent=1) + "\n")
    elif arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 64
    text = page(json.loads(RATES.read_text()))
    if arguments == ["--check"]:
        if PAGE.read_text() != text:
            print(f"{PAGE.name} is not what {Path(__file__).name} computes: run it again", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
