"""Whether the monitor names the table whose low precision began to hurt.

The demo model at a mixed plan; its certified window is measured once. Then 100 windows of 20,000 examples, each with a
drift planted in one table drawn at random: nine of ten lookups go to the few rows that its precision changes most
(by the mean square of the logit's change on the certified window's examples). A table whose rows are all so well kept
that this raises the label-free gap of the window by less than a tenth hurts nobody and is drawn again.

Prints one JSON object as its last line: `top1`, the share of windows whose first-named unit is the planted one; `top3`;
`tables`, how many different ones were planted; `drawn_again`.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from demo_model import large_demo_config
from numpy.typing import NDArray
from sizes import sized

from lowprec.evaluation.workers.worker import LocalWorkers
from lowprec.monitor.certified import Certified, CertifiedCounts
from lowprec.monitor.inputs.drift import DriftRule
from lowprec.monitor.inputs.normal_drift import History
from lowprec.monitor.observe import low_units, observe
from lowprec.monitor.window_evidence import MeasuredWindow, measure_window, precisions_of
from lowprec.plan import Plan, Precision
from lowprec.search import SearchJob, open_job
from lowprec.storage import Location
from lowprec.traffic import Window, open_traffic

NUM_REPLAYS, NUM_ROWS, SHARE, NUM_WORST, MIN_LOOKUPS = sized((100, 20_000, 0.9, 20, 5), (2, 2_000, 0.9, 20, 5))
HURTS = sized(1.1, 0.0)


def row_effects(job: SearchJob, workers: LocalWorkers, plan: Plan) -> dict[str, NDArray[np.int64]]:
    """For each one-hot feature the ids whose rows the plan changes most, by the logit, on the confirm window."""
    units = low_units(plan)
    sums = {u.name: np.zeros(u.num_rows) for u in job.units}
    counts = {u.name: np.zeros(u.num_rows) for u in job.units}
    evaluator = workers._worker._evaluator
    for batch in job.window("confirm").batches():
        traced = evaluator.traced(batch, plan, units)
        for k, unit in enumerate(units):
            for feature, table in job.features.items():
                bags = batch.sparse[feature]
                if table == unit and len(bags.values) == batch.num_rows:
                    np.add.at(sums[unit], bags.values, traced.changes[k].astype(float) ** 2)
                    np.add.at(counts[unit], bags.values, 1)
    found = {}
    for feature, table in job.features.items():
        known = counts[table] >= MIN_LOOKUPS
        if table in units and known.sum() > 2 * NUM_WORST:
            mean = np.where(known, sums[table] / np.maximum(counts[table], 1), -1)
            found[feature] = np.argsort(-mean, kind="stable")[:NUM_WORST]
    return found


def measure(job: SearchJob, workers: LocalWorkers, plan: Plan, certified: Certified, folder: Path) -> MeasuredWindow:
    """Everything that the monitor measures of the traffic in a folder."""
    reader = open_traffic(str(folder), job.reader.schema, batch_size=job.config.traffic.batch_size)
    window = reader.window(Window())
    return measure_window(
        job,
        workers,
        plan,
        window,
        certified,
        DriftRule(0.01, 0.1),
        History([], certified.inputs),
        num_labels=window.num_rows,
        quarantine=Location.of(folder / "quarantine"),
        name="planted",
    )


def main() -> None:
    torch.set_num_threads(1)
    job = open_job(large_demo_config("space.row_range=mse"))
    workers = LocalWorkers(job.spec, job.adapter)
    # Small tables at int8, larger ones at int4, the largest at int2: what searches of the demo find.
    ordered = sorted(job.units, key=lambda u: u.num_rows)
    chosen = [Precision.INT8] * 8 + [Precision.INT4] * 9 + [Precision.INT2] * (len(ordered) - 17)
    by_size = {u.name: p for u, p in zip(ordered, chosen, strict=True)}
    plan = Plan({u.name: by_size[u.name] for u in job.units})
    counts = CertifiedCounts(job.reader.schema)
    window = job.window("confirm")
    observation = observe(workers, window, plan, on_inputs=counts.add)
    certified = Certified.of(counts, observation, precisions_of(plan), "confirm")
    worst = row_effects(job, workers, plan)
    whole = pq.ParquetDataset(job.config.traffic.path).read()
    bounds = job.window("search").window
    times = whole["ts"].to_numpy()
    inside = np.flatnonzero((times >= bounds.start) & (times < bounds.end))
    rng = np.random.default_rng(0)
    ranks: list[int] = []
    planted, again = [], 0
    with tempfile.TemporaryDirectory() as folder:
        while len(ranks) < NUM_REPLAYS:
            assert again < 20 * NUM_REPLAYS, "hardly any drift hurts"
            rows = np.sort(rng.choice(inside, NUM_ROWS, replace=False))
            feature = str(rng.choice(sorted(worst)))
            table = whole.take(pa.array(rows))
            plain = Path(folder, "plain")
            plain.mkdir(exist_ok=True)
            pq.write_table(table, plain / "part.parquet")
            ids = table[feature].to_numpy().copy()
            moved = rng.random(NUM_ROWS) < SHARE
            ids[moved] = rng.choice(worst[feature], int(moved.sum()))
            drifted = Path(folder, "drifted")
            drifted.mkdir(exist_ok=True)
            column = table.column_names.index(feature)
            pq.write_table(table.set_column(column, feature, pa.array(ids)), drifted / "part.parquet")
            found = measure(job, workers, plan, certified, drifted)
            if found.kl_pct < HURTS * measure(job, workers, plan, certified, plain).kl_pct:
                again += 1
                continue
            names = [share.unit for share in found.units]
            ranks.append(names.index(job.features[feature]))
            planted.append(feature)
            if len(ranks) % 10 == 0:
                print(
                    f"{len(ranks)} windows, {sum(r == 0 for r in ranks)} named first, {again} drawn again", flush=True
                )
    top1 = float(np.mean([rank == 0 for rank in ranks]))
    print(
        json.dumps(
            {
                "top1": top1,
                "top3": float(np.mean([rank < 3 for rank in ranks])),
                "tables": len(set(planted)),
                "drawn_again": again,
                "replays": NUM_REPLAYS,
                "examples": NUM_ROWS,
            }
        )
    )
    assert top1 >= 0.95, f"the drifted table is named first in {top1:.0%} of windows"


if __name__ == "__main__":
    main()
