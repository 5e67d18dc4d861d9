"""What a certified plan does for serving, and whether the calibrated cost table said so.

The trained demo model: a plan that a search certified (bytes minimised, tables and layers), int8 everywhere, and fp32.
Both plans are exported and served by `lowprec.load`, beside the fp32 model, in turns on the same requests of 1,024
examples, one thread. Nine rounds, in each a calibration of this machine (the model's own dims and layer shapes, that
size of requests) and then the measurements, so that a slow minute is slow for both; medians are compared.

Prints one JSON object as its last line: for each model bytes, `requests_per_s`, `p50_ms`, `p99_ms`, and what tables and
layers take for an example, measured by clocks around their modules (`units_ns`) and predicted (`predicted_ns`);
`latency_error`, the largest relative error of the prediction among the three, and `errors` of each. `out_of_cache`: the
same requests a second for a model with 8 GB of tables (dim 128, uniform ids, untrained: nothing is certified), int8 and
int4 everywhere against fp32, from mapped files and from memory in huge pages.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from demo_model import demo_config
from large_model import make_config, write_model, write_traffic
from sizes import sized

from lowprec.config import Config
from lowprec.evaluation.workers.worker import LocalWorkers
from lowprec.export import export_plan, measure_serving
from lowprec.latency.calibration_file import write_calibration
from lowprec.latency.measure import calibrate
from lowprec.ops.timing import default_grid
from lowprec.plan import Plan, PlanFile, Precision, RowRange, write_plan
from lowprec.search import open_job, run_search
from lowprec.search.record.describe import what_to_time
from lowprec.search.space.layer_forms import fitted_forms
from lowprec.storage import AnyPath

SETTINGS = ("space.layers=[fp32, bf16, int8_dynamic, int8_static]", "evaluation.num_workers=0", "search.budget=0.02")
BATCH_SIZE, NUM_ROUNDS, SECONDS = sized((1024, 9, 1.0), (64, 1, 0.05))


def write_uniform(config: Config, precision: Precision, path: Path) -> None:
    """A plan with all tables at a precision, and where layers are units, these at int8_static."""
    job = open_job(config)
    forms: dict[Any, Any] = {}
    if config.space.layers:
        workers = LocalWorkers(job.spec, job.adapter)
        forms = fitted_forms(workers, job.window("search"), job.space, config.space.layers, batches_per_task=4)
    plan = Plan({u.name: Precision.INT8_STATIC if u.is_layer else precision for u in job.units})
    write_plan(
        PlanFile(
            plan=plan,
            model=config.model.factory,
            checkpoint_sha256=job.checkpoint_sha256,
            size_bytes=job.space.size_bytes(plan),
            row_ranges={unit: RowRange.MINMAX for unit, p in plan.items() if p.is_rowwise},
            layer_forms={unit: forms[unit, p] for unit, p in plan.items() if (unit, p) in forms},
        ),
        path,
    )


def measured(folder: Path, *overrides: str, in_memory: bool = False) -> dict[str, Any]:
    """One measurement of an exported folder and of its fp32 model."""
    report = measure_serving(
        folder, batch_sizes=[BATCH_SIZE], seconds=SECONDS, in_memory=in_memory, overrides=overrides
    )
    return report.to_dict()


def demo(folder: Path) -> dict[str, Any]:
    """The demo model."""
    config = demo_config(*SETTINGS, f"results.root={folder / 'runs'}")
    outcome = run_search(config)
    assert outcome.verdict == "certified"
    write_uniform(config, Precision.INT8, folder / "int8.json")
    plans: dict[str, AnyPath] = {"certified": outcome.plan_paths[0], "int8": folder / "int8.json"}
    exported = {name: export_plan(config, plan, folder / name) for name, plan in plans.items()}
    rounds: dict[tuple[str, str], list[float]] = defaultdict(list)
    dims, layers = what_to_time(config, BATCH_SIZE)
    for k in range(NUM_ROUNDS):
        write_calibration(calibrate(default_grid(dims=dims, num_bags=BATCH_SIZE), layers), folder / "calibration.json")
        for name in plans:
            found = measured(folder / name, f"cost.calibration={folder / 'calibration.json'}")
            for speed in found["speeds"]:
                model = name if speed["model"] == "served" else "fp32"
                for key in ("requests_per_s", "p50_ms", "p99_ms"):
                    rounds[model, key].append(speed[key])
                for key, source in (("units_ns", "measured"), ("predicted_ns", "predicted")):
                    rounds[model, key].append(found["units"][f"{source}_ns_per_example"][speed["model"]])
        print(f"round {k + 1} of {NUM_ROUNDS}", flush=True)
    models: dict[str, dict[str, float]] = defaultdict(dict)
    for (model, key), values in rounds.items():
        models[model][key] = round(statistics.median(values), 3)
    for name, done in exported.items():
        models[name]["bytes"], models["fp32"]["bytes"] = done.plan_bytes, done.fp32_bytes
    errors = {name: round(of["predicted_ns"] / of["units_ns"] - 1, 3) for name, of in models.items()}
    return {
        "latency_error": max(abs(error) for error in errors.values()),
        "errors": errors,
        "models": dict(models),
        "gap_pct": round(outcome.recommendations[0].best.metrics.gap_pct, 4),
    }


def out_of_cache(folder: Path) -> dict[str, Any]:
    """A model whose tables are in memory and in no cache."""
    config = make_config(folder, num_workers=0, threads_per_worker=2)
    write_traffic(folder / "traffic.parquet")
    write_model(config)
    found: dict[str, Any] = {}
    for precision in (Precision.INT8, Precision.INT4):
        write_uniform(config, precision, folder / "plan.json")
        exported = export_plan(config, folder / "plan.json", folder / str(precision))
        found[f"{precision} gb"] = round(exported.plan_bytes / 1e9, 3)
        for place in ("mapped", "in huge pages"):
            for speed in measured(folder / str(precision), in_memory=place != "mapped")["speeds"]:
                model = str(precision) if speed["model"] == "served" else f"fp32 beside {precision}"
                of = {key: round(speed[key], 3) for key in ("requests_per_s", "p50_ms", "p99_ms")}
                found[f"{model}, {place}"] = of
    return found


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        found = demo(Path(name))
        print(json.dumps(found), flush=True)
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps({**found, "out_of_cache": out_of_cache(Path(name)), "batch_size": BATCH_SIZE}))


if __name__ == "__main__":
    main()
